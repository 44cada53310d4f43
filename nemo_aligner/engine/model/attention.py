"""Core attention over torch's scaled_dot_product_attention: no S × S score matrix is ever stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SdpaCoreAttention(MegatronModule):
    """Causal attention; plugged into Megatron's layer spec in place of its DotProductAttention.

    Rows are right-padded, so causality alone keeps padding out of every real position.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        window_of: Callable[[int], int | None],
    ) -> None:
        """`window_of` gives the sliding window of a layer, counted from 0; `layer_number` counts from 1."""
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(
            config.kv_channels or config.hidden_size // config.num_attention_heads
        )
        self.window = window_of(layer_number - 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query `[S, B, n, D]`, key and value `[S, B, G, D]` (G divides n) → context `[S, B, n·D]`.

        With `packed_seq_params` the tensors are `[T, n, D]`, all sequences one after another, and no token sees
        another sequence's.
        """
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is None:
            return causal_attention(query, key, value, window=self.window, scale=self.scale, dropout=dropout)
        edges = packed_seq_params.cu_seqlens_q.tolist()
        return packed_attention(query, key, value, edges, window=self.window, scale=self.scale, dropout=dropout)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, edges: Sequence[int], *, window: int | None, **options: Any
) -> Tensor:
    """`causal_attention` of sequences that stand one after another: query `[T, n, D]`, key and value `[T, G, D]`.

    Sequence i is `edges[i]` to `edges[i + 1]`; no token sees another sequence's. Returns `[T, n·D]`.
    """
    parts = [
        causal_attention(*(t[start:end].unsqueeze(1) for t in (query, key, value)), window=window, **options).squeeze(1)
        for start, end in itertools.pairwise(edges)
    ]
    return torch.cat(parts)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention to oneself and what came before, of `window` positions at most: query `[S, B, n, D]`, key and value
    `[S, B, G, D]` (G divides n) → `[S, B, n·D]`. `scale` is 1/√D unless given."""
    dtype = query.dtype
    if query.device.type == "cpu":  # torch's CPU kernel takes three times as long in bf16 as in float32
        query, key, value = query.float(), key.float(), value.float()
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    mask = None if window is None else sliding_window_mask(query.size(2), window, query.device)
    context = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return context.permute(2, 0, 1, 3).flatten(2).to(dtype)


def sliding_window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """`[length, length]` bool: position t sees the `window` positions that end in t."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)
