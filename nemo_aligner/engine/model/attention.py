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

from nemo_aligner.algorithms.shared_prefix import Layout, Suffixes
from nemo_aligner.engine.kernels.stream_attention import Spans, spans_of
from nemo_aligner.engine.model.context import ContextPart
from nemo_aligner.engine.model.experts import RowsOfPlaces


class StreamParams(PackedSeqParams):
    """What the model is told of a stream: Megatron hands it to every attention, through recomputation too.

    `wanted` `[N']` int64: those of this rank's places whose logits are asked for; None = all. `longest`: tokens of the
    longest row. `part`: which places are this rank's; None = all. `members`: whose they are, for losses of routers,
    where there are some in training. `rotary`: angles, and their cos and signed sin, which layers have in common.
    """

    layout: Layout
    wanted: Tensor | None
    spans: Spans
    part: ContextPart | None
    members: RowsOfPlaces | None = None
    rotary: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __init__(self, layout: Layout, wanted: Tensor | None, longest: int, part: ContextPart | None = None) -> None:
        # Megatron makes its rotary table as long as the longest
        super().__init__(max_seqlen_q=longest, max_seqlen_kv=longest)
        self.layout, self.wanted, self.part = layout, wanted, part
        self.spans = spans_of(layout.groups)

    @property
    def tokens(self) -> Tensor:
        """Of this rank's places."""
        return self.layout.tokens if self.part is None else self.layout.tokens[self.part.own]

    @property
    def positions(self) -> Tensor:
        """Of this rank's places, in their rows."""
        return self.layout.positions if self.part is None else self.layout.positions[self.part.own]


class SdpaCoreAttention(MegatronModule):
    """Causal attention, of a stream within its rows; plugged into Megatron's layer spec for its DotProductAttention."""

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
        packed_seq_params: StreamParams | None = None,
    ) -> Tensor:
        """query `[S, B, n, D]`, key and value `[S, B, G, D]` (G divides n) → context `[S, B, n·D]`.

        Without a layout every row is causal by itself, right-padded; with one B is 1 and S this rank's places of the
        stream.
        """
        options: dict[str, Any] = {
            "window": self.window,
            "scale": self.scale,
            "dropout": self.dropout if self.training else 0.0,
        }
        if packed_seq_params is None:
            return causal_attention(query, key, value, **options)
        stream = (query.squeeze(1), key.squeeze(1), value.squeeze(1))
        if packed_seq_params.part is not None:
            return part_attention(*stream, packed_seq_params.part, **options).unsqueeze(1)
        return stream_attention(*stream, packed_seq_params.layout.groups, **options).unsqueeze(1)


def stream_attention(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Suffixes], **options: Any) -> Tensor:
    """`causal_attention` within the rows of a stream: query `[N, n, D]`, key and value `[N, G, D]` → `[N, n·D]`.

    A prefix is attended once; all suffixes of a group attend as one batch to [prefix, own suffix]. Places after the
    last group get 0.
    """
    dtype, parts = query.dtype, []
    query, key, value = (_computed(t) for t in (query, key, value))
    for group in groups:
        m, prefix = len(group.lengths), slice(group.start, group.start + group.prefix)
        if group.prefix:
            parts.append(causal_attention(*(t[prefix].unsqueeze(1) for t in (query, key, value)), **options).squeeze(1))
        if len(group.padded):
            own = [t.index_select(0, group.padded).unflatten(0, (m, -1)).transpose(0, 1) for t in (query, key, value)]
            seen = [
                torch.cat([t[prefix].unsqueeze(1).expand(-1, m, -1, -1), part]) if group.prefix else part
                for t, part in zip((key, value), own[1:], strict=True)
            ]
            context = causal_attention(own[0], *seen, **options)
            parts.append(context.transpose(0, 1).flatten(0, 1).index_select(0, group.real))
    found = torch.cat(parts)
    return F.pad(found, (0, 0, 0, len(query) - len(found))).to(dtype)


def part_attention(query: Tensor, key: Tensor, value: Tensor, part: ContextPart, **options: Any) -> Tensor:
    """`stream_attention` of this rank's places: query `[N/c, n, D]`, key and value `[N/c, G, D]` → `[N/c, n·D]`."""
    # gathered as one: the gradients of two could meet in another order on another rank
    keys_values = part.all_places(torch.cat([key, value], dim=1)).chunk(2, dim=1)
    found = [
        causal_attention(
            query[piece.queries].unsqueeze(1),
            *(torch.cat([t[piece.prefix], t[piece.seen]]).unsqueeze(1) for t in keys_values),
            **options,
        )
        for piece in part.pieces
    ]
    return torch.cat(found).squeeze(1)


def _computed(tensor: Tensor) -> Tensor:
    """In the dtype to compute in: torch's CPU kernel takes three times as long in bf16 as in float32."""
    return tensor.float() if tensor.device.type == "cpu" else tensor


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
    """Attention to oneself and what came before, of `window` positions at most: query `[L, B, n, D]`, key and value
    `[S, B, G, D]` (G divides n) → `[L, B, n·D]`; the queries are the last L of the S positions. `scale` is 1/√D unless
    given."""
    dtype = query.dtype
    query, key, value = (_computed(t).permute(1, 2, 0, 3) for t in (query, key, value))
    length, seen = query.size(2), key.size(2)
    mask = None if window is None and length == seen else causal_mask(length, seen, window, query.device)
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


def causal_mask(length: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """`[length, seen]` bool, for the last `length` of `seen` positions: each sees those that end in it, `window` at
    most."""
    positions = torch.arange(seen, device=device)
    distance = positions[seen - length :, None] - positions[None, :]
    return (distance >= 0) & (distance < (seen if window is None else window))
