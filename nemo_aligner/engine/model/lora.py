"""LoRA (arXiv 2106.09685): y = W x + s·B A x, where W stays as it is and A, B are trained; s = alpha / adapter_dim.

Ours, since Megatron-Bridge's needs Transformer Engine, and megatron-core has none. An adapter adds to what a linear
layer returns, and all of them lie in one part of the model: layers, and the names of weights, are what they were.

    column-parallel (qkv, fc1)   A `[r, in]` on every TP rank    B `[out/TP, r]`
    row-parallel (proj, fc2)     A `[r, in/TP]`                  B `[out, r]` on every TP rank
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.peft import LoraTuning

_LINEAR = (ColumnParallelLinear, RowParallelLinear)
_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")


class LowRank(nn.Module):
    """The adapter of one linear layer: A (`linear_in`) and B (`linear_out`), B at 0."""

    parts: Tensor | None

    def __init__(self, linear: Any, name: str, layer: int, arch: Architecture, lora: LoraTuning, seed: int) -> None:
        """`linear` is Megatron's `name` of the layer, which is counted from 0 over all stages."""
        super().__init__()
        config: TransformerConfig = linear.config
        self.weight_of_base = (linear.weight,)  # in a tuple: it is not a parameter of the adapter
        self._column, self._scale, self._dropout = name in _COLUMN_PARALLEL, lora.scale, lora.adapter_dropout
        self._sequence_parallel = config.sequence_parallel
        self.halves = name == "linear_fc1" and config.gated_linear_unit  # gate and up, as MLP's checkpoints cut them
        out, inner = linear.weight.shape
        part = _part_of_rows(name, out, arch, gated=config.gated_linear_unit)
        canonical = lora.variant == "canonical" and bool(part[-1])
        rank = lora.adapter_dim * (1 + int(part[-1]) if canonical else 1)
        device = linear.weight.device
        # the part of one matrix that is a function of seed, layer and name, however the model is cut
        cuts = 1 if self._column else config.tensor_model_parallel_size
        generator = torch.Generator().manual_seed(_number(f"{seed} {layer} {name}"))
        std = (2 / (inner * cuts + lora.adapter_dim)) ** 0.5  # Xavier's normal
        whole = torch.empty(rank, inner * cuts).normal_(std=std, generator=generator)
        own = whole if self._column else whole.chunk(cuts, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
        self.linear_in = nn.Parameter(own.contiguous().to(device))  # as fused optimizers take it
        self.linear_out = nn.Parameter(torch.zeros(out, rank, device=device))
        # [out, r] bool: with an A for each part of the output, B is 0 elsewhere, and stays so
        mask = (part[:, None] == torch.arange(rank) // lora.adapter_dim).to(device) if canonical else None
        self.register_buffer("parts", mask, persistent=False)
        cut, whole_one = (self.linear_out, self.linear_in) if self._column else (self.linear_in, self.linear_out)
        set_tensor_model_parallel_attributes(cut, True, 0 if self._column else 1, 1)
        # its gradient is of this rank's part of the sequence alone: Megatron sums it
        whole_one.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def out_weight(self) -> Tensor:
        """B."""
        return self.linear_out if self.parts is None else self.linear_out * self.parts

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output, cut as it is; `x` is the layer's input."""
        if self._dropout and self.training:
            if self._sequence_parallel or not self._column:
                with get_cuda_rng_tracker().fork():  # TP ranks have different numbers in `x`
                    x = F.dropout(x, self._dropout)
            else:
                x = F.dropout(x, self._dropout)
        inner = F.linear(x, self.linear_in)
        if self._column:
            gather = gather_from_sequence_parallel_region
            inner = gather(inner) if self._sequence_parallel else copy_to_tensor_model_parallel_region(inner)
        else:
            scatter = reduce_scatter_to_sequence_parallel_region
            inner = scatter(inner) if self._sequence_parallel else reduce_from_tensor_model_parallel_region(inner)
        return F.linear(inner, self.out_weight()) * self._scale

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s·B A `[out, in]` of this rank, in W's dtype; the sum is made in float32."""
        [weight] = self.weight_of_base
        return (weight.float() + self._scale * (self.out_weight().float() @ self.linear_in.float())).to(weight.dtype)

    def sharded_state_dict(self, prefix: str) -> ShardedStateDict:
        """Its tensors for checkpoints that any TP reads."""
        axis = {"linear_out": 0} if self._column else {"linear_in": 1}
        state = make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, axis)
        if self.halves:
            state[f"{prefix}linear_out"] = apply_swiglu_sharded_factory(state[f"{prefix}linear_out"], ())
        return state


def _part_of_rows(name: str, rows: int, arch: Architecture, *, gated: bool) -> Tensor:
    """Which part of a fused layer each of its output rows `[rows]` belongs to: 0, 1, ..."""
    if name == "linear_qkv":
        per_group = arch.num_attention_heads // arch.query_groups
        group = torch.tensor([0] * per_group + [1, 2]).repeat_interleave(arch.head_dim)
        return group.repeat(rows // len(group))
    if name == "linear_fc1" and gated:
        return torch.arange(2).repeat_interleave(rows // 2)
    return torch.zeros(rows, dtype=torch.int64)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _folded(x: Tensor) -> Tensor:
    """`x` and its gradient, `[S, B, H]`, with the strides of `[S · B, H]`.

    B is 1, and its stride may be any. By a matrix that needs no gradient torch multiplies `[S, B, H]` as `[S · B, H]`
    only where the strides fit, and elsewhere, on a CPU, by S copies of the matrix.
    """
    return x.flatten(0, 1).unflatten(0, x.shape[:2])


def _fold_input(linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_folded(inputs[0]), *inputs[1:])


def _fold_output(linear: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return _folded(output[0]), output[1]


class Adapters(nn.Module):
    """All adapters of this rank's part of a model, by the layer's number from 0 and the name of the linear layer."""

    def __init__(self, model: Any, arch: Architecture, lora: LoraTuning, seed: int) -> None:
        """Freezes `model` but for a reward head, and adds the adapters to its linear layers."""
        super().__init__()
        self._on = True
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("rm_head."))
        self._hooks = []
        for linear in (module for module in model.modules() if isinstance(module, _LINEAR)):
            self._hooks += [linear.register_forward_pre_hook(_fold_input), linear.register_forward_hook(_fold_output)]
        for layer in model.decoder.layers:
            number, own = layer.layer_number - 1, nn.ModuleDict()
            for name in lora.linears:
                linear = getattr(layer.mlp if "_fc" in name else layer.self_attention, name)
                own[name] = LowRank(linear, name, number, arch, lora, seed)
                self._hooks.append(linear.register_forward_hook(self._adding(cast(LowRank, own[name]))))
            self.add_module(str(number), own)
        self._of_weight = {id(adapter.weight_of_base[0]): adapter for adapter in self._each()}

    def join(self, model: Any) -> None:
        """Become a part of `model`, of which they were made."""
        for part in (model, *model.chunks):
            part.adapters = self

    def _adding(self, adapter: LowRank) -> Any:
        def add(linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> Any:
            return (output[0] + adapter(inputs[0]), output[1]) if self._on else output

        return add

    def _each(self) -> Iterator[LowRank]:
        return (module for module in self.modules() if isinstance(module, LowRank))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the model is what it is without adapters."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def has(self, weight: nn.Parameter) -> bool:
        """Whether `weight` has an adapter."""
        return id(weight) in self._of_weight

    def merged(self, weight: nn.Parameter) -> Tensor | None:
        """What `weight` is with its adapter; None for one that has none, and when they are off."""
        adapter = self._of_weight.get(id(weight)) if self._on else None
        return None if adapter is None else adapter.merged()

    def dissolve(self, model: Any) -> None:
        """Merge for good: `model`, to which they belong, has no adapters afterwards, and all of it may be trained."""
        for adapter in self._each():
            adapter.weight_of_base[0].data = adapter.merged()
        for hook in self._hooks:
            hook.remove()
        for part in (model, *model.chunks):
            part.adapters = None
        model.requires_grad_(True)

    @property
    def dropout(self) -> float:
        return max(adapter._dropout for adapter in self._each())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        """Megatron asks every part of a model for it. Layers are named by their number over all stages."""
        state: ShardedStateDict = {}
        for name, module in self.named_modules():
            if isinstance(module, LowRank):
                state |= module.sharded_state_dict(f"{prefix}{name}.")
        return state
