"""Continuous batching: responses share the decode step, and a finished one frees its row for the next request.

    requests ─▶ prefill (once per prompt) ─▶ rows 0..B-1 of the cache ─▶ decode step ─▶ draw ─▶ finished? ─▶ Response
                                               ▲                             │ no
                                               └─────────────────────────────┘
Rows in use are always the first B: the last row moves into a freed one. Every rank of a replica runs the same
bookkeeping; the last pipeline stage draws and hands the tokens to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_aligner.algorithms.sampling import Drawn, SamplingParams, draw, uniform_noise
from nemo_aligner.engine.decode import CachedForward, CachedPrompt
from nemo_aligner.engine.interfaces import GenerationRequest, Response, Tokenizer
from nemo_aligner.engine.stopping import StopCondition

PREFILL_TOKENS = 4096
"""Padded tokens of one prefill batch; bounds its activation memory."""


class Rows:
    """Bookkeeping of the responses being drawn: row i belongs to `requests[i]`, the first `len` rows are in use."""

    def __init__(self, capacity: int, max_tokens: int) -> None:
        self.requests: list[GenerationRequest] = []
        self.tokens = np.zeros((capacity, max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((capacity, max_tokens), dtype=np.float32)
        self.sampling_logprobs = np.zeros((capacity, max_tokens), dtype=np.float32)
        self.prompt_length = np.zeros(capacity, dtype=np.int64)
        self.count = np.zeros(capacity, dtype=np.int64)  # response tokens drawn so far
        self.limit = np.zeros(capacity, dtype=np.int64)  # response tokens at most
        self._arrays = (
            self.tokens, self.logprobs, self.sampling_logprobs, self.prompt_length, self.count, self.limit
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: GenerationRequest, limit: int) -> None:
        row = len(self.requests)
        self.requests.append(request)
        self.prompt_length[row], self.count[row], self.limit[row] = len(request.prompt_tokens), 0, limit

    def record(self, start: int, drawn: Drawn) -> None:
        """Append one drawn token to each of the rows from `start` on."""
        rows = np.arange(start, len(self))
        at = self.count[rows]
        self.tokens[rows, at] = drawn.tokens.cpu().numpy()
        self.logprobs[rows, at] = drawn.logprobs.float().cpu().numpy()
        self.sampling_logprobs[rows, at] = drawn.sampling_logprobs.float().cpu().numpy()
        self.count[rows] += 1

    def response(self, row: int) -> list[int]:
        return self.tokens[row, : self.count[row]].tolist()

    def drop(self, row: int) -> None:
        """Free `row` by moving the last row into it."""
        last = len(self.requests) - 1
        for array in self._arrays:
            array[row] = array[last]
        self.requests[row] = self.requests[last]
        self.requests.pop()


class Generator:
    """One generation run of one replica."""

    def __init__(
        self, forward: CachedForward, tokenizer: Tokenizer, sampling: SamplingParams, max_slots: int, max_length: int
    ) -> None:
        self._forward, self._tokenizer, self._sampling = forward, tokenizer, sampling
        self._slots, self._max_length = max_slots, max_length
        self._stop = StopCondition(tokenizer, sampling.end_strings)
        self._stop_tokens = np.array(sorted(self._stop.stop_ids))
        self._stop_ids = torch.from_numpy(self._stop_tokens).to(forward.device)
        self._cache = forward.new_cache()
        self._rows = Rows(max_slots, max(1, sampling.max_tokens))
        self._seen: Tensor | None = None  # [slots, V] bool, only with a repetition penalty

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[Response]:
        """Draw every request; responses come as they finish. Requests of one prompt should be adjacent."""
        with self._forward.ready():
            yield from self._run(iter(requests))

    def _run(self, pending: Iterator[GenerationRequest]) -> Iterator[Response]:
        prompt: tuple[int, CachedPrompt] | None = None  # the newest prompt: its next samples may come first
        while True:
            free = self._slots - len(self._rows)
            # admitting in groups keeps the prefill batches from becoming one prompt each
            if free >= max(1, self._slots // 8) or not len(self._rows):
                batch = list(itertools.islice(pending, free))
                start = len(self._rows)
                prompt = self._admit(batch, prompt)
                yield from self._finished(start)
            if not len(self._rows):
                if not batch:
                    return
                continue
            self._decode()
            yield from self._finished(0)

    def _admit(
        self, batch: Sequence[GenerationRequest], newest: tuple[int, CachedPrompt] | None
    ) -> tuple[int, CachedPrompt] | None:
        """Give each request a row: its prompt's keys and values, and its first token."""
        if not batch:
            return newest
        prompts = {} if newest is None else {newest[0]: newest[1]}
        missing = {r.prompt_index: r.prompt_tokens for r in batch if r.prompt_index not in prompts}
        prompts.update(self._prefill(missing))
        start = len(self._rows)
        longest = max(self._longest(), max(len(request.prompt_tokens) for request in batch) + 1)
        self._cache.fit(start + len(batch), longest, start)
        for row, request in enumerate(batch, start):
            room = self._max_length - len(request.prompt_tokens)
            asked = self._sampling.max_tokens if request.max_tokens is None else request.max_tokens
            self._rows.add(request, min(asked, self._sampling.max_tokens, room))
            self._cache.put_prompt(row, prompts[request.prompt_index])
            self._mark_prompt_seen(row, request.prompt_tokens)
        logits = [prompts[r.prompt_index].logits for r in batch]
        self._draw(start, torch.stack([x for x in logits if x is not None]) if logits[0] is not None else None)
        last = batch[-1].prompt_index
        return last, prompts[last]

    def _longest(self) -> int:
        """Positions of the longest row, its newest token among them."""
        active = len(self._rows)
        return int((self._rows.prompt_length[:active] + self._rows.count[:active]).max(initial=0))

    def _prefill(self, prompts: dict[int, tuple[int, ...]]) -> dict[int, CachedPrompt]:
        """Prefill prompts, those of like length together."""
        ordered = sorted(prompts, key=lambda index: len(prompts[index]))
        done: dict[int, CachedPrompt] = {}
        while ordered:
            group = [ordered.pop()]  # the longest left: it sets the width
            width = len(prompts[group[0]])
            while ordered and (len(group) + 1) * width <= PREFILL_TOKENS:
                group.append(ordered.pop())
            lengths = torch.tensor([len(prompts[index]) for index in group], device=self._forward.device)
            tokens = torch.full((len(group), width), self._tokenizer.pad_id, device=self._forward.device)
            for row, index in enumerate(group):
                tokens[row, : lengths[row]] = torch.tensor(prompts[index], device=self._forward.device)
            done.update(zip(group, self._forward.prefill(tokens, lengths), strict=True))
        return done

    def _decode(self) -> None:
        """Feed every row's newest token and draw the next."""
        rows, active = self._rows, len(self._rows)
        newest = rows.tokens[np.arange(active), rows.count[:active] - 1]
        positions = rows.prompt_length[:active] + rows.count[:active] - 1
        self._cache.fit(active, self._longest(), active)
        device = self._forward.device
        tokens, where = torch.from_numpy(newest).to(device), torch.from_numpy(positions).to(device)
        self._draw(0, self._forward.step(tokens, where, self._cache))

    def _draw(self, start: int, logits: Tensor | None) -> None:
        """Draw one token for each row from `start` on; `logits` `[rows, V]` is None off the last stage."""
        rows, params = self._rows, self._sampling
        part = slice(start, len(rows))
        drawn: Drawn | None = None
        if logits is not None:
            too_early = rows.count[part] < params.min_tokens
            forbidden = (torch.from_numpy(too_early).to(logits.device), self._stop_ids) if too_early.any() else None
            noise = None
            if not params.greedy:
                prompts = np.array([r.prompt_index for r in rows.requests[part]])
                samples = np.array([r.sample_index for r in rows.requests[part]])
                noise = torch.from_numpy(uniform_noise(params.seed, prompts, samples, rows.count[part]))
                noise = noise.to(logits.device)
            drawn = draw(logits, params, noise, None if self._seen is None else self._seen[part], forbidden)
        drawn = _from_last_stage(drawn, len(rows) - start, self._forward.device)
        if self._seen is not None:
            self._seen[part].scatter_(1, drawn.tokens[:, None], True)
        rows.record(start, drawn)

    def _mark_prompt_seen(self, row: int, prompt_tokens: Sequence[int]) -> None:
        if self._sampling.greedy or self._sampling.repetition_penalty == 1.0:
            return
        if self._seen is None:
            shape = (self._slots, self._forward.arch.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._forward.device)
        self._seen[row] = False
        self._seen[row, torch.tensor(prompt_tokens, device=self._seen.device)] = True

    def _finished(self, start: int) -> Iterator[Response]:
        """Take out the rows from `start` on that are done, last first so that moves only touch checked rows."""
        rows = self._rows
        part = np.arange(start, len(rows))
        count = rows.count[part]
        newest = rows.tokens[part, count - 1]
        suspects = (count >= rows.limit[part]) | np.isin(newest, self._stop_tokens)
        suspects |= np.fromiter(map(self._stop.may_end_in, newest.tolist()), dtype=bool, count=len(newest))
        for row in reversed(part[suspects].tolist()):
            tokens = rows.response(row)
            stopped = len(tokens) >= self._sampling.min_tokens and self._stop.is_stop(tokens)
            if stopped or len(tokens) >= rows.limit[row]:
                yield self._response(row, tokens, "stop" if stopped else "length")
                self._free(row)

    def _response(self, row: int, tokens: list[int], reason: str) -> Response:
        request, count = self._rows.requests[row], len(tokens)
        return Response(
            request.prompt_index,
            request.sample_index,
            tokens,
            self._stop.text_of(tokens),
            self._rows.logprobs[row, :count].tolist(),
            self._rows.sampling_logprobs[row, :count].tolist(),
            reason,
        )

    def _free(self, row: int) -> None:
        last = len(self._rows) - 1
        if row != last:
            self._cache.move(last, row, int(self._rows.prompt_length[last] + self._rows.count[last]))
            if self._seen is not None:
                self._seen[row] = self._seen[last]
        self._rows.drop(row)


def _from_last_stage(drawn: Drawn | None, rows: int, device: torch.device) -> Drawn:
    """What the last pipeline stage drew, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert drawn is not None
        return drawn
    packed = torch.empty(3, rows, dtype=torch.float64, device=device)  # token ids are exact in float64
    if drawn is not None:
        packed = torch.stack([part.double() for part in drawn])
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(packed, source, group=parallel_state.get_pipeline_model_parallel_group())
    return Drawn(packed[0].long(), packed[1].float(), packed[2].float())
