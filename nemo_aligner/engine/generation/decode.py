"""Incremental forward passes over the live Megatron model: prefill a prompt once, then one token per step.

Reads the model's own weight tensors (so any TP and PP, and no second copy), with keys and values kept in a cache; the
modules around the weights are for training and cost more than the products of a single token.
Notation: B rows, N tokens fed (one per row in a step, whole prompts in a prefill), G key/value heads of this rank, R
query heads per key/value head, D head dimension, T cached positions, V vocabulary. Hidden states are `[N, H]`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from nemo_aligner.algorithms.cache_widths import GPU_BLOCK_ROWS, GPU_GRAIN
from nemo_aligner.algorithms.heads import kernels_take
from nemo_aligner.algorithms.sampling import likeliest
from nemo_aligner.algorithms.shared_prefix import Layout
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.generation.cached_attention import (
    BlockAttention,
    CachedAttention,
    KernelAttention,
    PromptAttention,
    Rotary,
    RowAttention,
)
from nemo_aligner.engine.generation.experts import Experts
from nemo_aligner.engine.generation.graphs import GraphedSteps
from nemo_aligner.engine.generation.kv_cache import CachedPrompt, KVCache, place_of
from nemo_aligner.engine.interfaces import PromptScores, TopLogprobs
from nemo_aligner.engine.kernels.layer import CpuLayer, LayerWeights
from nemo_aligner.engine.kernels.library import cpu_kernels
from nemo_aligner.engine.kernels.packed_weights import PackedWeights
from nemo_aligner.engine.kernels.stream_attention import spans_of
from nemo_aligner.engine.model.forward import from_last_stage

SCORED_TOGETHER = 256
"""Positions of texts whose logits are held at once."""


class Linear(NamedTuple):
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None


class Layer:
    """What the forward pass reads of a decoder layer, found once: to look up a module's parts takes longer than a small
    product."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self.qkv, self.projection = _linear(attention.linear_qkv), _linear(attention.linear_proj)
        self.experts = Experts(mlp) if isinstance(mlp, MoELayer) else None
        if self.experts is None:
            self.fc1, self.fc2 = _linear(mlp.linear_fc1), _linear(mlp.linear_fc2)
        self.input_norm = Norm(layer.input_layernorm, attention.linear_qkv)
        self.mlp_norm = Norm(layer.pre_mlp_layernorm, None if self.experts else mlp.linear_fc1)
        self.norms_heads = not isinstance(attention.q_layernorm, IdentityOp | None)
        self.query_norm, self.key_norm = attention.q_layernorm, attention.k_layernorm
        self.activation, self.gated = mlp.config.activation_func, mlp.config.gated_linear_unit
        self.number = layer.layer_number - 1  # from 0, over all stages

    def product_weights(self) -> Iterator[torch.nn.Parameter]:
        yield from (self.qkv.weight, self.projection.weight)
        yield from (self.fc1.weight, self.fc2.weight) if self.experts is None else self.experts.parameters()


def _linear(linear: Any) -> Linear:
    # without a bias Transformer Engine has an empty one
    return Linear(linear.weight, None if linear.bias is None or not linear.bias.numel() else linear.bias)


class Norm:
    """A norm, and the weight that makes it a root-mean-square norm, if it is one."""

    def __init__(self, module: Any, linear: Any) -> None:
        """`linear` follows `module`, and is both where Transformer Engine makes them one."""
        self.module = module
        self.rms_weight = module.weight if isinstance(module, torch.nn.RMSNorm) else None
        if isinstance(module, IdentityOp):
            weight, eps = linear.layer_norm_weight, linear.config.layernorm_epsilon
            if linear.config.normalization == "RMSNorm":
                self.rms_weight = weight
                self.module = functools.partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
            else:
                bias = linear.layer_norm_bias
                options = {"normalized_shape": weight.shape, "weight": weight, "bias": bias, "eps": eps}
                self.module = functools.partial(F.layer_norm, **options)


class CachedForward:
    """The forward passes of generation, for this rank's part of the model."""

    def __init__(self, model: GPTModel, arch: Architecture, *, alike: bool = False) -> None:
        """Collective where experts are cut over ranks.

        With `alike` what is computed of a row never depends on the rows beside it, which takes more of the few rows of
        a decode step.
        """
        self.model = model
        self.arch = arch
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.layers = [Layer(layer) for layer in model.decoder.layers]
        ends = list(itertools.accumulate(len(chunk.decoder.layers) for chunk in model.chunks))
        self._chunks = [range(start, stop) for start, stop in itertools.pairwise([0, *ends])]
        self._windows = [arch.window_of(layer.number) for layer in self.layers]
        self._first, self._last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        self._tp = parallel_state.get_tensor_model_parallel_world_size()
        self._groups: int = model.decoder.layers[0].self_attention.num_query_groups_per_partition
        self._rotary = self._rotary_tables()
        self.kernels = cpu_kernels(self.dtype, self.device)  # None: torch does it
        self._attends = self.kernels is not None and kernels_take(arch.head_dim)
        embedding = model.embedding.word_embeddings.weight if self._first else None
        adapted = {} if model.adapters is None else {"merged": model.adapters.merged}
        self._weights = PackedWeights(self.product_weights(), self.kernels, looked_up=embedding, alike=alike, **adapted)
        self._whole_layers: list[CpuLayer | None] = [None] * len(self.layers)
        # graphs hold neither what ranks say to each other nor how many tokens an expert has
        alone = self._first and self._last and self._tp == 1 and arch.num_moe_experts is None
        self._graphed = GraphedSteps(self._step_over, self.device) if self.device.type == "cuda" and alone else None

    def product_weights(self) -> list[torch.nn.Parameter]:
        """The weights `[out, in]` that a step multiplies with, in their order."""
        weights = list(itertools.chain.from_iterable(layer.product_weights() for layer in self.layers))
        has_logits = self._last and not self.model.gives_rewards
        return [*weights, self._output_weight()] if has_logits else weights

    def _output_weight(self) -> torch.nn.Parameter:
        """That of the logits, on the last stage."""
        if self.model.share_embeddings_and_output_weights:
            return self.model.shared_embedding_or_output_weight()
        return self.model.output_layer.weight

    @contextmanager
    def ready(self) -> Iterator[None]:
        """To be entered around prefill and steps: the weights are then in the layout that is fastest to read."""
        with self._weights.packed():
            self._whole_layers = [self._whole_layer(index, layer) for index, layer in enumerate(self.layers)]
            try:
                yield
            finally:
                self._whole_layers = [None] * len(self.layers)
                if self._graphed is not None:
                    self._graphed.clear()

    def _whole_layer(self, index: int, layer: Layer) -> CpuLayer | None:
        """The layer for KernelAttention in two calls of the kernels, if it is of the kind they know."""
        if layer.experts is not None:
            return None
        known = self._attends and layer.gated and layer.activation is F.silu and not layer.norms_heads
        panels = self._weights.panels
        weights = [
            *(layer.input_norm.rms_weight, panels(layer.qkv.weight), panels(layer.projection.weight)),
            *(layer.mlp_norm.rms_weight, panels(layer.fc1.weight), panels(layer.fc2.weight)),
        ]
        found = [weight for weight in weights if weight is not None]
        if self.kernels is None or not known or len(found) < len(weights):
            return None
        return CpuLayer(
            self.kernels,
            LayerWeights(*found),
            (layer.qkv.bias, layer.fc1.bias),
            self._rotary,
            index=index,
            groups=self._groups,
            head_dim=self.arch.head_dim,
            window=self._windows[index] or 0,
            eps=self.arch.layernorm_epsilon,
        )

    def new_cache(self, slots: int) -> KVCache:
        """An empty cache for `slots` rows."""
        grain, block_rows = (128, 64) if self.device.type == "cpu" else (GPU_GRAIN, GPU_BLOCK_ROWS)
        if self._attends:
            grain, block_rows = 32, 4
        return KVCache(slots, grain, block_rows, shares_prompts=self._attends)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], scored: int | None = None) -> list[CachedPrompt]:
        """Run whole prompts, one after another in a single row of tokens: nothing is padded. One CachedPrompt each.

        With `scored`, their tokens' log-probabilities too, and the `scored` likeliest tokens at each.
        """
        hidden, keys_values = self.extend(prompts)
        # only the last position of each prompt is needed for the first response token
        logits = self.logits(torch.stack([part[-1] for part in hidden]))
        found = itertools.repeat(None) if logits is None else logits
        scores: Sequence[PromptScores | None] = [None] * len(prompts)
        if scored is not None:
            parts = [part[:-1] for part in hidden]
            scores = from_last_stage([self._scores(*pair, scored) for pair in zip(parts, prompts, strict=True)])
        return [CachedPrompt(*parts) for parts in zip(keys_values, found, scores, strict=False)]

    @property
    def streams(self) -> bool:
        """Whether there is `stream`."""
        return self._attends

    @torch.no_grad()
    def stream(self, layout: Layout) -> Tensor:
        """Hidden states `[N, H]` of rows laid out as a stream, of which each row's are a function of the row alone.

        The true ones on the last stage; to be `alike`, products have to be so too.
        """
        assert self.kernels is not None
        rotary = self._rotary and Rotary(self._rotary.cos[layout.positions], self._rotary.sin[layout.positions])
        attend = RowAttention(self.kernels, rotary, spans_of(layout.groups), self._windows)
        return self._layers(layout.tokens, layout.positions, attend)

    @torch.no_grad()
    def extend(self, texts: Sequence[Sequence[int]]) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Run whole texts.

        Returns, for each text of S tokens, its hidden states `[S, H]` (the true ones on the last stage) and its keys
        and values `[layers, 2, G, S, D]`.
        """
        lengths, shape = [len(text) for text in texts], (len(self.layers), 2, self._groups)
        tokens = torch.tensor(list(itertools.chain(*texts)), device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        own = [torch.empty(*shape, s, self.arch.head_dim, dtype=self.dtype, device=self.device) for s in lengths]
        attend: CachedAttention
        if self._attends:
            # every token's own row is its text's, as far as it goes
            places = [(0,) * 5 + place_of(one) for one in own]
            attend = self._kernel_attention(torch.from_numpy(np.repeat(places, lengths, axis=0)), positions)
        else:
            attend = PromptAttention(self._rotary, positions, own, self._windows)
        return self._layers(tokens, positions, attend).split(lengths), own

    def _scores(self, hidden: Tensor, prompt: Sequence[int], top: int) -> PromptScores | None:
        """Of a prompt, from the hidden states `[S - 1, H]` before its last; None off the last stage."""
        if not self._last:
            return None
        logprobs: list[float] = []
        top_logprobs: list[TopLogprobs] = []
        targets = torch.tensor(prompt[1:], dtype=torch.int64, device=self.device)
        for start in range(0, len(targets), SCORED_TOGETHER):
            part = slice(start, start + SCORED_TOGETHER)
            logits = self.logits(hidden[part])
            assert logits is not None
            found = logits.float().log_softmax(dim=-1)
            logprobs += found.gather(-1, targets[part, None]).squeeze(-1).tolist()
            top_logprobs += likeliest(found, top)
        return PromptScores(logprobs, top_logprobs)

    @torch.no_grad()
    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor | None:
        """Feed one token per row: `tokens` and their `positions`, both `[B]` int64, in the order of `cache.slots`.

        The cache has room for every position. Returns logits `[B, V]` on the last pipeline stage, else None.
        """
        if self._attends:
            attend = self._kernel_attention(cache.places(), positions)
            return self.logits(self._layers(tokens, positions, attend))
        if self._graphed is not None:
            return self._graphed(tokens, positions, cache)
        return self._step_over(tokens, positions, cache.blocks())

    def _step_over(self, tokens: Tensor, positions: Tensor, blocks: Iterable[tuple[slice, Tensor]]) -> Any:
        """`step` over blocks of the cache."""
        attend = BlockAttention(self._rotary, positions, blocks, self._windows)
        return self.logits(self._layers(tokens, positions, attend))

    def _kernel_attention(self, places: Tensor, positions: Tensor) -> KernelAttention:
        assert self.kernels is not None
        return KernelAttention(self.kernels, self._rotary, places, positions, self._windows)

    def _layers(self, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        """Hidden states `[N, H]` after this rank's layers, handed on to the next stage where there is one.

        `tokens` and `positions` are `[N]`.
        """
        hidden = torch.empty(0)
        for chunk in self._chunks:
            begins, ends = self._first and chunk.start == 0, self._last and chunk.stop == len(self.layers)
            hidden = self._embed(tokens, positions) if begins else self._receive(len(tokens))
            hidden = self._through(chunk, hidden, attend)
            if not ends:
                torch.distributed.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return hidden

    def _through(self, layers: range, hidden: Tensor, attend: CachedAttention) -> Tensor:
        """Hidden states `[N, H]` after these of this rank's layers; `hidden` itself may change."""
        delta: Tensor | None = None  # what is yet to be added to `hidden`: the next norm does it in passing
        for index in layers:
            layer, whole = self.layers[index], self._whole_layers[index]
            if whole is not None and isinstance(attend, KernelAttention):
                delta = self._summed(whole.attention(hidden, delta, attend.places, attend.positions), layer.projection)
            else:
                mixed = self._mixed_heads(layer, self._add_and_norm(layer.input_norm, hidden, delta))
                delta = self._row_parallel(layer.projection, attend(index, mixed))
            if whole is not None:
                delta = self._summed(whole.feed_forward(hidden, delta), layer.fc2)
            else:
                delta = self._feed_forward(layer, self._add_and_norm(layer.mlp_norm, hidden, delta))
        if delta is not None:
            hidden += delta
        return hidden

    def _add_and_norm(self, norm: Norm, hidden: Tensor, delta: Tensor | None) -> Tensor:
        """`hidden` += `delta`, in place; returns its norm."""
        if self.kernels is not None and norm.rms_weight is not None:
            return self.kernels.add_rms_norm(hidden, delta, norm.rms_weight, self.arch.layernorm_epsilon)
        if delta is not None:
            hidden += delta
        return norm.module(hidden)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        table = self.model.embedding.word_embeddings
        if self._tp == 1:
            hidden = self._weights.rows(tokens, table.weight)
        else:  # each rank holds some rows of the table
            mine = (tokens >= table.vocab_start_index) & (tokens < table.vocab_end_index)
            found = self._weights.rows((tokens - table.vocab_start_index).where(mine, 0), table.weight)
            hidden = reduce_from_tensor_model_parallel_region(found * mine[:, None])
        if self.arch.position_embedding_type == "learned_absolute":
            hidden = hidden + self.model.embedding.position_embeddings(positions)
        return hidden

    def _mixed_heads(self, layer: Layer, hidden: Tensor) -> Tensor:
        """`[N, G, R + 2, D]`: group by group, as the fused weight holds them, R query heads, a key and a value."""
        mixed = self._weights.product(hidden, *layer.qkv).view(len(hidden), self._groups, -1, self.arch.head_dim)
        if layer.norms_heads:
            query, key = layer.query_norm(mixed[:, :, :-2]), layer.key_norm(mixed[:, :, -2:-1])
            mixed = torch.cat((query, key, mixed[:, :, -1:]), dim=2)
        return mixed

    def _feed_forward(self, layer: Layer, hidden: Tensor) -> Tensor:
        activate = functools.partial(self._activated, layer)
        if layer.experts is not None:
            output = layer.experts(hidden, self._weights.product, activate)
            return output if self._tp == 1 else reduce_from_tensor_model_parallel_region(output)
        return self._row_parallel(layer.fc2, activate(self._weights.product(hidden, *layer.fc1)))

    def _activated(self, layer: Layer, inner: Tensor) -> Tensor:
        if not layer.gated:
            return layer.activation(inner)
        if self.kernels is not None and layer.activation is F.silu:
            return self.kernels.silu_mul(inner)
        gate, value = inner.chunk(2, dim=-1)
        return layer.activation(gate).mul_(value)

    def _row_parallel(self, linear: Linear, hidden: Tensor) -> Tensor:
        """A product whose inner dimension is cut over TP ranks."""
        return self._summed(self._weights.product(hidden, linear.weight), linear)

    def _summed(self, output: Tensor, linear: Linear) -> Tensor:
        """What is still to be done to such a product: the sum over TP ranks, and the bias."""
        if self._tp > 1:
            output = reduce_from_tensor_model_parallel_region(output)
        return output if linear.bias is None else output + linear.bias

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Logits `[B, V]` of hidden states `[B, H]`, in the model's dtype; None off the last stage."""
        if not self._last:
            return None
        logits = self._weights.product(self.model.decoder.final_layernorm(hidden), self._output_weight())
        if self._tp > 1:
            logits = gather_from_tensor_model_parallel_region(logits)
        return logits[:, : self.arch.vocab_size]

    def _receive(self, count: int) -> Tensor:
        hidden = torch.empty(count, self.arch.hidden_size, dtype=self.dtype, device=self.device)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _rotary_tables(self) -> Rotary | None:
        """None where positions are not rotary."""
        if self.arch.position_embedding_type != "rope":
            return None
        cos, sin = self.model.rotary_pos_emb.get_cos_sin(self.arch.positions)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return Rotary(cos.to(self.device, self.dtype), sin.to(self.device, self.dtype))
