"""Who is being drawn: the state of each response by slot, and what responses that are drawn alike share."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_aligner.algorithms.sampling import Drawn, SamplingParams
from nemo_aligner.engine.generation.kv_cache import CachedPrompt
from nemo_aligner.engine.generation.stopping import StopCondition
from nemo_aligner.engine.generation.transfers import download
from nemo_aligner.engine.interfaces import GenerationRequest, Progress, PromptScores, Response, Tokenizer, TopLogprobs


class Kind:
    """One way of drawing: the parameters but seed and length, and where a response ends."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer, device: torch.device) -> None:
        self.params = params
        self.stop = StopCondition(tokenizer, params.end_strings, params.min_tokens)
        self.stop_tokens = np.array(sorted(self.stop.stop_ids))
        self.stop_ids = torch.from_numpy(self.stop_tokens).to(device)

    @property
    def penalises(self) -> bool:
        """Whether the tokens already in the row matter."""
        return not self.params.greedy and self.params.repetition_penalty != 1.0

    def may_end(self, newest: np.ndarray) -> np.ndarray:
        """Whether responses with these newest tokens `[n]` need a closer look, `[n]` bool."""
        completes = np.fromiter(map(self.stop.may_end_in, newest.tolist()), dtype=bool, count=len(newest))
        return np.isin(newest, self.stop_tokens) | completes


class Kinds:
    """One Kind for equal parameters, as long as somebody is drawn by it."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        self._alive: weakref.WeakValueDictionary[SamplingParams, Kind] = weakref.WeakValueDictionary()

    def of(self, params: SamplingParams) -> Kind:
        key = dataclasses.replace(params, seed=0, max_tokens=0)
        kind = self._alive.get(key)
        if kind is None:
            kind = self._alive[key] = Kind(key, self._tokenizer, self._device)
        return kind


KindsRows = tuple[Kind, slice | np.ndarray]
"""A kind, and which rows are drawn so."""


class Rows(NamedTuple):
    """Rows of a step, in its order: who is drawn alike, and `[B]` on the device what is known of each."""

    kinds: list[KindsRows]
    slots: Tensor  # int64
    positions: Tensor  # int64, of the newest token
    noise: Tensor  # float64 in (0, 1); anything where all are greedy
    too_early: Tensor  # bool: to end is forbidden
    order: Tensor | None  # int64, the rows kind by kind; None where there is one kind

    def by_kind(self, logits: Tensor) -> Iterator[tuple[KindsRows, tuple[Rows, Tensor]]]:
        """Kind by kind, its rows and their `logits` `[B, V]`."""
        start = 0
        for kind, where in self.kinds:
            if self.order is None or isinstance(where, slice):
                yield (kind, where), (self, logits)
                continue
            mine = self.order[start : start + len(where)]
            slots, positions, noise, too_early = (
                t[mine] for t in (self.slots, self.positions, self.noise, self.too_early)
            )
            start += len(where)
            yield (kind, where), (Rows([(kind, slice(None))], slots, positions, noise, too_early, None), logits[mine])


class Slots:
    """Bookkeeping of the responses being drawn, by slot; `max_tokens` is the most that any of them may have."""

    def __init__(self, capacity: int, max_tokens: int) -> None:
        self.requests: dict[int, GenerationRequest] = {}
        self.kinds: dict[int, Kind] = {}
        self._scores: dict[int, PromptScores | None] = {}
        self._top: dict[int, list[TopLogprobs]] = {}
        self._free = list(range(capacity))[::-1]
        self.tokens = np.zeros((capacity, max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((capacity, max_tokens), dtype=np.float32)
        self.sampling_logprobs = np.zeros((capacity, max_tokens), dtype=np.float32)
        self.seed = np.zeros(capacity, dtype=np.int64)
        self.prompt_index = np.zeros(capacity, dtype=np.int64)
        self.sample_index = np.zeros(capacity, dtype=np.int64)
        self.prompt_length = np.zeros(capacity, dtype=np.int64)
        self.count = np.zeros(capacity, dtype=np.int64)  # response tokens drawn so far
        self.limit = np.zeros(capacity, dtype=np.int64)  # response tokens at most

    @property
    def free(self) -> int:
        return len(self._free)

    def add(self, request: GenerationRequest, kind: Kind, prompt: CachedPrompt, *, seed: int, limit: int) -> int:
        slot = self._free.pop()
        self.requests[slot], self.kinds[slot] = request, kind
        self._scores[slot], self._top[slot] = prompt.scores, []
        self.seed[slot], self.prompt_index[slot], self.sample_index[slot] = (
            seed,
            request.prompt_index,
            request.sample_index,
        )
        self.prompt_length[slot], self.count[slot], self.limit[slot] = len(request.prompt_tokens), 0, limit
        return slot

    def by_kind(self, slots: np.ndarray) -> Iterator[KindsRows]:
        """The kinds among `slots`, and where in `slots` each is."""
        kinds = [self.kinds[slot] for slot in slots.tolist()]
        if all(kind is kinds[0] for kind in kinds):
            yield kinds[0], slice(None)
            return
        places: dict[Kind, list[int]] = {}
        for place, kind in enumerate(kinds):
            places.setdefault(kind, []).append(place)
        for kind, found in places.items():
            yield kind, np.array(found)

    def record(self, slots: np.ndarray, drawn: Drawn, top: Sequence[TopLogprobs] | None) -> None:
        """Append one drawn token to each of `slots`."""
        at = self.count[slots]
        self.tokens[slots, at], self.logprobs[slots, at], self.sampling_logprobs[slots, at] = download(drawn)
        self.count[slots] += 1
        for slot, likeliest in zip(slots.tolist(), top or (), strict=False):
            if likeliest:
                self._top[slot].append(likeliest)

    def tokens_of(self, slot: int) -> list[int]:
        """The response so far."""
        return self.tokens[slot, : self.count[slot]].tolist()

    def is_over(self, slot: int) -> bool:
        """Whether the newest token of the response ends it."""
        return self.kinds[slot].stop.is_stop(self.tokens_of(slot), self.requests[slot].prompt_tokens)

    def progress(self, slot: int) -> Progress:
        tokens = self.tokens_of(slot)
        return Progress(
            self.requests[slot].uid, tokens, self.logprobs[slot, : len(tokens)].tolist(), list(self._top[slot])
        )

    def response(self, slot: int, reason: str) -> Response:
        request, tokens = self.requests[slot], self.tokens_of(slot)
        return Response(
            request.prompt_index,
            request.sample_index,
            tokens,
            self.kinds[slot].stop.text_of(tokens, request.prompt_tokens),
            self.logprobs[slot, : len(tokens)].tolist(),
            self.sampling_logprobs[slot, : len(tokens)].tolist(),
            reason,
            self._top[slot],
            self._scores[slot],
            request.uid,
        )

    def drop(self, slot: int) -> None:
        for table in (self.requests, self.kinds, self._scores, self._top):
            del table[slot]  # type: ignore[attr-defined]
        self._free.append(slot)
