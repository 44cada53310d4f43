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

from nemo_aligner.algorithms.shared_prefix import MIN_SHARED, Group, prefix_groups
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
        minimum = MIN_SHARED if self._forward.goes_on else 1 + max(map(len, rows), default=0)
        groups = prefix_groups(rows, minimum=minimum)
        alone = [Group((i,), 0) for group in groups if not group.prefix for i in group.rows]
        for batch in _batches(alone, TOKENS_TOGETHER, lambda group: len(rows[group.rows[0]])):
            hidden, _ = self._forward.extend([rows[group.rows[0]] for group in batch])
            yield from ((g.rows[0], found[firsts[g.rows[0]] :]) for g, found in zip(batch, hidden, strict=True))
        for batch in _batches([group for group in groups if group.prefix], TOKENS_TOGETHER, lambda group: group.prefix):
            yield from self._going_on(rows, firsts, batch)

    def _going_on(
        self, rows: Sequence[Sequence[int]], firsts: Sequence[int], groups: Sequence[Group]
    ) -> Iterator[tuple[int, Tensor]]:
        """Of groups with prefixes: those first, then every row from there."""
        prefixes, cached = self._forward.extend([rows[group.rows[0]][: group.prefix] for group in groups])
        members = [(i, g) for g, group in enumerate(groups) for i in group.rows]
        for i, g in members:
            if len(rows[i]) == groups[g].prefix:
                yield i, prefixes[g][firsts[i] :]
        longer = [(i, g) for i, g in members if len(rows[i]) > groups[g].prefix]
        for batch in _batches(longer, TOKENS_TOGETHER, lambda member: len(rows[member[0]]) - groups[member[1]].prefix):
            suffixes = [rows[i][groups[g].prefix :] for i, g in batch]
            hidden, _ = self._forward.extend(suffixes, [cached[g] for _, g in batch])
            for (i, g), found in zip(batch, hidden, strict=True):
                p = groups[g].prefix
                yield i, torch.cat([prefixes[g][firsts[i] :], found]) if firsts[i] < p else found[firsts[i] - p :]


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
