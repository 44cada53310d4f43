"""Incremental forward passes over the live Megatron model: prefill a prompt once, then one token per step.

Runs on the model's own modules (so on its weights, whatever TP and PP), with keys and values kept in a cache.
Notation: S prompt length (padded), B rows, G key/value heads of this rank, R query heads per key/value head, D head
dimension, T cached positions, V vocabulary. Hidden states are `[S, B, H]`, Megatron's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from nemo_aligner.config.architecture import Architecture


class KVCache:
    """Keys and values of the rows being decoded: per layer `[rows, G, T, D]`, grown as needed."""

    def __init__(self, layers: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (groups, head_dim)
        empty = torch.empty(0, groups, 0, head_dim, dtype=dtype, device=device)
        self.keys = [empty] * layers
        self.values = [empty] * layers

    def ensure(self, rows: int, length: int) -> None:
        """Make room for at least `rows` rows of `length` positions; what is cached stays."""
        old_rows, _, old_length, _ = self.keys[0].shape if self.keys else (rows, 0, length, 0)
        if rows <= old_rows and length <= old_length:
            return
        new_rows = max(old_rows, rows)
        new_length = old_length if length <= old_length else _rounded_up(max(length, old_length * 5 // 4), 32)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                grown = old.new_zeros(new_rows, self._shape[0], new_length, self._shape[1])
                grown[:old_rows, :, :old_length] = old
                tensors[layer] = grown

    def put_prompt(self, row: int, prompt: CachedPrompt) -> None:
        """Copy a prefilled prompt's keys and values into `row`."""
        for layer, (key, value) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
            self.keys[layer][row, :, : key.size(1)] = key
            self.values[layer][row, :, : value.size(1)] = value

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row over another's."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class CachedPrompt:
    """A prefilled prompt: per layer keys and values `[G, S, D]`, and the logits `[V]` of its next token.

    `logits` is None except on the last pipeline stage.
    """

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor | None


class CachedForward:
    """The forward passes of generation, for this rank's part of the model."""

    def __init__(self, model: GPTModel, arch: Architecture) -> None:
        self.model = model
        self.arch = arch
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.layers = list(model.decoder.layers)
        self._first, self._last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        self._rotary = self._rotary_tables()

    def new_cache(self) -> KVCache:
        attention = self.layers[0].self_attention
        groups = attention.num_query_groups_per_partition
        return KVCache(len(self.layers), groups, attention.hidden_size_per_attention_head, self.dtype, self.device)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Tensor) -> list[CachedPrompt]:
        """Run right-padded prompts `tokens` `[B, S]` int64 of true `lengths` `[B]` int64; one CachedPrompt each."""
        batch, width = tokens.shape
        positions = torch.arange(width, device=self.device)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            keys.append(key)
            values.append(value)
            mask = None
            if self.arch.window_size is not None:
                distance = positions[:, None] - positions[None, :]
                mask = (distance >= 0) & (distance < self.arch.window_size)
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            return context.permute(2, 0, 1, 3).flatten(2)

        hidden = self._layers(tokens, positions.expand(batch, width), attend)
        # only the last real position of each prompt is needed for the first response token
        ends = hidden[lengths - 1, torch.arange(batch, device=self.device)].unsqueeze(0)
        logits = self._logits(ends)
        return [
            CachedPrompt(
                [key[b, :, :length] for key in keys],
                [value[b, :, :length] for value in values],
                None if logits is None else logits[b],
            )
            for b, length in enumerate(lengths.tolist())
        ]

    @torch.no_grad()
    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache, longest: int) -> Tensor | None:
        """Feed one token per row: `tokens` and their `positions`, both `[B]` int64; rows are the cache's first B.

        `longest` is max(positions) + 1. Returns logits `[B, V]` float32 on the last pipeline stage, else None.
        """
        batch = tokens.size(0)
        rows = torch.arange(batch, device=self.device)
        cached = torch.arange(longest, device=self.device)
        visible = cached <= positions[:, None]
        if self.arch.window_size is not None:
            visible &= cached > (positions - self.arch.window_size)[:, None]
        visible = visible[:, None, None, :]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.keys[layer][rows, :, positions] = key[0]
            cache.values[layer][rows, :, positions] = value[0]
            groups, head_dim = key.shape[-2:]
            # the R query heads of a key/value head stand as R query rows, so keys are never repeated
            grouped = query[0].view(batch, groups, -1, head_dim)
            context = F.scaled_dot_product_attention(
                grouped,
                cache.keys[layer][:batch, :, :longest],
                cache.values[layer][:batch, :, :longest],
                attn_mask=visible,
            )
            return context.reshape(1, batch, -1)

        return self._logits(self._layers(tokens[:, None], positions[:, None], attend))

    def _layers(
        self, tokens: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Hidden states `[S, B, H]` after this stage's layers, handed on to the next stage where there is one.

        `tokens` and `positions` are `[B, S]`.
        """
        if self._first:
            hidden = self.model.embedding(input_ids=tokens, position_ids=positions)
        else:
            hidden = self._receive(tokens)
        turn = None
        if self._rotary is not None:
            turn = [table[positions.t()].unsqueeze(2) for table in self._rotary]  # cos and sin, [S, B, 1, D/2]
        for index, layer in enumerate(self.layers):
            attention = layer.self_attention
            query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden))
            if turn is not None:
                query, key = rotate(query, *turn), rotate(key, *turn)
            hidden = _residual(hidden, attention.linear_proj(attend(index, query, key, value)))
            hidden = _residual(hidden, layer.mlp(layer.pre_mlp_layernorm(hidden)))
        if not self._last:
            torch.distributed.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor | None:
        """Logits `[B, V]` float32 of hidden states `[1, B, H]`; None off the last stage."""
        if not self._last:
            return None
        hidden = self.model.decoder.final_layernorm(hidden)
        shared = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if shared else None
        logits, _ = self.model.output_layer(hidden, weight=weight)
        logits = gather_from_tensor_model_parallel_region(logits)
        return logits[0, :, : self.arch.vocab_size].float()

    def _receive(self, tokens: Tensor) -> Tensor:
        batch, width = tokens.shape
        hidden = torch.empty(width, batch, self.arch.hidden_size, dtype=self.dtype, device=self.device)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _rotary_tables(self) -> tuple[Tensor, Tensor] | None:
        """cos and sin of every position's rotary angles, `[max positions, D/2]` in the model's dtype."""
        if self.arch.position_embedding_type != "rope":
            return None
        cos, sin = self.model.rotary_pos_emb.get_cos_sin(self.arch.max_position_embeddings)
        return cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves form (arXiv 2104.09864): `heads` `[S, B, n, D]`, cos/sin `[S, B, 1, D_rot/2]`.

    (a, b) → (a·cos − b·sin, b·cos + a·sin), with a and b the halves of the first D_rot dimensions.
    """
    half = cos.size(-1)
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _residual(hidden: Tensor, output_and_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = output_and_bias
    return hidden + output if bias is None else hidden + output + bias
