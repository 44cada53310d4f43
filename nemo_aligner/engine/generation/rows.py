"""Rewards and log-probabilities of whole rows on a CPU, without a gradient, through the forward passes of generation.

What is computed of a row is a function of that row alone, to the last bit: neither the rows beside it nor how many
processes share the work change it. A beginning that rows have in common is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from nemo_aligner.algorithms.shared_prefix import Group, lay_out, prefix_groups, stream_places
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.generation.decode import SCORED_TOGETHER, CachedForward
from nemo_aligner.engine.model.forward import from_last_stage
from nemo_aligner.engine.model.logprobs import log_sums_of

T = TypeVar("T")

TOKENS_TOGETHER = 2048
"""Run at once; this bounds memory, and more would not be faster."""


class RowForward:
    """This rank's part of it; every rank of a replica calls with the same rows."""

    def __init__(self, model: GPTModel, arch: Architecture) -> None:
        self._model = model
        self._forward = CachedForward(model, arch, alike=True)

    def ready(self) -> AbstractContextManager[None]:
        """To be entered around the calls below; see CachedForward."""
        return self._forward.ready()

    @torch.no_grad()
    def rewards(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """K rewards of each row, read at its last token."""
        found: list[list[float]] = [[]] * len(rows)
        for i, hidden in self._hidden(rows, [len(row) - 1 for row in rows]):
            if self._model.post_process:
                head, state = self._model.rm_head, self._model.decoder.final_layernorm(hidden)[0]
                found[i] = (head.weight.float() @ state.float() + head.bias.float()).tolist()
        return from_last_stage(found)

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """`[len(row)]` float32 for each row: log p(token | those before it) from token `starts[i]` on, 0 before."""
        found = [torch.zeros(len(row)) for row in rows]
        for batch in _batches(self._scored(rows, starts), SCORED_TOGETHER, lambda part: len(part[2])):
            logits = self._forward.logits(torch.cat([hidden for _, _, hidden in batch]))
            if logits is None:
                continue
            places = [(i, slice(start, start + len(hidden))) for i, start, hidden in batch]
            targets = torch.tensor([token for i, part in places for token in rows[i][part]])
            scored = logits.gather(1, targets[:, None]).squeeze(1).float() - log_sums_of(logits, logits.size(1))
            for (i, part), logprobs in zip(places, scored.split([len(hidden) for *_, hidden in batch]), strict=True):
                found[i][part] = logprobs
        return from_last_stage(found)

    def _scored(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
        """A row, its token `start` and the hidden states `[≤ SCORED_TOGETHER, H]` before those from there on."""
        for i, hidden in self._hidden(rows, [max(1, start) - 1 for start in starts]):
            start = len(rows[i]) - len(hidden) + 1
            for part in hidden[:-1].split(SCORED_TOGETHER):
                yield i, start, part
                start += len(part)

    def _hidden(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each row's index and its hidden states from token `firsts[i]` to its last, in any order."""
        if not self._forward.streams:
            for batch in _batches(range(len(rows)), TOKENS_TOGETHER, lambda i: len(rows[i])):
                states, _ = self._forward.extend([rows[i] for i in batch])
                yield from ((i, found[firsts[i] :]) for i, found in zip(batch, states, strict=True))
            return
        for parts in _batches(_parts(rows), TOKENS_TOGETHER, lambda part: stream_places(rows, [part])):
            batch = [i for part in parts for i in part.rows]
            layout = lay_out([rows[i] for i in batch])
            hidden = self._forward.stream(layout)
            yield from (
                (i, hidden[places[firsts[i] : len(rows[i])]]) for i, places in zip(batch, layout.places, strict=True)
            )


def _parts(rows: Sequence[Sequence[int]]) -> Iterator[Group]:
    """The groups of `rows`, in parts where they are large, in which the prefix is a quarter at most."""
    for group in prefix_groups(rows):
        most = max(TOKENS_TOGETHER, 4 * group.prefix) - group.prefix
        suffixes = [(i, len(rows[i]) - group.prefix) for i in group.rows]
        for part in _batches(suffixes, most, lambda suffix: suffix[1]):
            yield Group(tuple(i for i, _ in part), group.prefix)


def _batches(items: Iterable[T], most: int, tokens: Callable[[T], int]) -> Iterator[list[T]]:
    """`items` in their order, as many together as have `most` tokens, one at least."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and total + tokens(item) > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += tokens(item)
    if batch:
        yield batch
