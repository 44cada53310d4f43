"""Parts of a layer: through our kernels on a CPU, where torch takes many passes; elsewhere through torch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from nemo_aligner.algorithms.heads import kernels_take
from nemo_aligner.engine.kernels.library import CpuKernels, cpu_kernels
from nemo_aligner.engine.kernels.pointwise import RmsNorm, SiluGate
from nemo_aligner.engine.kernels.stream_attention import StreamAttention
from nemo_aligner.engine.model.attention import StreamParams


def kernels_for(tensor: Tensor) -> CpuKernels | None:
    return cpu_kernels(tensor.dtype, tensor.device)


class FusedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        kernels = kernels_for(x)
        if kernels is None or x.dtype != self.weight.dtype:
            return super().forward(x)
        assert self.eps is not None
        return RmsNorm.apply(x, self.weight, self.eps, kernels)


def silu_gate(inner: Tensor) -> Tensor:
    """silu(first half) · second half of the last dimension of `inner` `[..., 2F]`: `[..., F]`."""
    kernels = kernels_for(inner)
    if kernels is not None:
        return SiluGate.apply(inner, kernels)
    gate, value = inner.chunk(2, dim=-1)
    return nn.functional.silu(gate) * value


# the default, False, is "not None" to it, and asks Transformer Engine, which need not be there, about fp8
tensor_parallel.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


class LeanMLP(MLP):
    """Megatron's, which keeps what its activation takes, and in the backward pass computes again what it gives.

    As Megatron's `recompute_modules` treats norms; of a dense feed-forward it would compute the products again as well.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, *args, **kwargs)
        inner, bias = self.linear_fc1(hidden_states)
        activation = tensor_parallel.CheckpointWithoutOutput()
        output, output_bias = self.linear_fc2(activation.checkpoint(self._activated, inner, bias))
        activation.discard_output_and_register_recompute(output)
        return output, output_bias

    def _activated(self, inner: Tensor, bias: Tensor | None) -> Tensor:
        inner = inner if bias is None else inner + bias
        if self.config.use_te_activation_func or not self.config.gated_linear_unit:
            return self.activation_func(inner)
        gate, value = inner.chunk(2, dim=-1)
        return self.activation_func(gate) * value


class StreamSelfAttention(SelfAttention):
    """Megatron's, whose heads of a stream go from one product to the other through one kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: StreamParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kernels = kernels_for(hidden_states)
        params = packed_seq_params
        # of a stream that is cut over ranks the other ranks have some of the keys
        if params is None or params.part is not None or kernels is None or not self._is_plain():
            options = {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
            return super().forward(hidden_states, attention_mask, *args, **options, **kwargs)
        mixed, _ = self.linear_qkv(hidden_states)
        core = self.core_attention
        rotary = None if rotary_pos_emb is None else _rotary(params, rotary_pos_emb, mixed.dtype)
        heads = mixed.view(len(mixed), self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        # selective recomputation does without it: the kernel keeps nothing that the products around it do not
        context = StreamAttention.apply(heads, rotary, params.spans, core.window, core.scale, kernels)
        return self.linear_proj(context.unsqueeze(1))

    def _is_plain(self) -> bool:
        """Whether the kernel computes this attention."""
        drops = self.training and self.core_attention.dropout > 0
        normed = not isinstance(self.q_layernorm, IdentityOp | None)
        return not (drops or normed) and kernels_take(self.hidden_size_per_attention_head)


def _rotary(params: StreamParams, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`cos_and_signed_sin` of `angles` `[N, 1, 1, D_rot]`, computed in a stream's first layer for all of them."""
    if params.rotary is None or params.rotary[0] is not angles:
        params.rotary = angles, cos_and_signed_sin(angles.flatten(1), dtype)
    return params.rotary[1]


def cos_and_signed_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of rotary `angles` `[N, D_rot]`, whose halves are the same; sin is negative in the first half. In `dtype`."""
    sign = torch.ones_like(angles[:1])
    sign[:, : angles.size(1) // 2] = -1
    return angles.cos().to(dtype), (angles.sin() * sign).to(dtype)
