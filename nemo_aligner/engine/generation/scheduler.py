"""Continuous batching: responses share the decode step, and a finished one frees its row for the next request.

    requests ─▶ prefill (once per prompt) ─▶ slot, row of the cache ─▶ decode step ─▶ draw ─▶ finished? ─▶ Response
                                                                        ▲                     │ no
                                                                        └─────────────────────┘
Every rank of a replica runs the same bookkeeping; the last pipeline stage draws and hands the tokens to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_aligner.algorithms.sampling import Drawn, SamplingParams, draw, uniform_noise
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import CachedPrompt
from nemo_aligner.engine.generation.stopping import StopCondition
from nemo_aligner.engine.interfaces import GenerationRequest, Response, Tokenizer

PREFILL_TOKENS = 4096
"""Prompt tokens of one prefill, at most, unless a prompt alone has more; bounds its activation memory."""


class Slots:
    """Bookkeeping of the responses being drawn, by slot."""

    def __init__(self, capacity: int, max_tokens: int) -> None:
        self.requests: dict[int, GenerationRequest] = {}
        self._free = list(range(capacity))[::-1]
        self.tokens = np.zeros((capacity, max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((capacity, max_tokens), dtype=np.float32)
        self.sampling_logprobs = np.zeros((capacity, max_tokens), dtype=np.float32)
        self.prompt_index = np.zeros(capacity, dtype=np.int64)
        self.sample_index = np.zeros(capacity, dtype=np.int64)
        self.prompt_length = np.zeros(capacity, dtype=np.int64)
        self.count = np.zeros(capacity, dtype=np.int64)  # response tokens drawn so far
        self.limit = np.zeros(capacity, dtype=np.int64)  # response tokens at most

    @property
    def free(self) -> int:
        return len(self._free)

    def add(self, request: GenerationRequest, limit: int) -> int:
        slot = self._free.pop()
        self.requests[slot] = request
        self.prompt_index[slot], self.sample_index[slot] = request.prompt_index, request.sample_index
        self.prompt_length[slot], self.count[slot], self.limit[slot] = len(request.prompt_tokens), 0, limit
        return slot

    def record(self, slots: np.ndarray, drawn: Drawn) -> None:
        """Append one drawn token to each of `slots`."""
        at = self.count[slots]
        self.tokens[slots, at] = drawn.tokens.cpu().numpy()
        self.logprobs[slots, at] = drawn.logprobs.float().cpu().numpy()
        self.sampling_logprobs[slots, at] = drawn.sampling_logprobs.float().cpu().numpy()
        self.count[slots] += 1

    def drop(self, slot: int) -> None:
        del self.requests[slot]
        self._free.append(slot)


class Generator:
    """One generation run of one replica."""

    def __init__(
        self, forward: CachedForward, tokenizer: Tokenizer, sampling: SamplingParams, max_slots: int, max_length: int
    ) -> None:
        self._forward, self._tokenizer, self._sampling = forward, tokenizer, sampling
        self._capacity, self._max_length = max_slots, max_length
        self._stop = StopCondition(tokenizer, sampling.end_strings)
        self._stop_tokens = np.array(sorted(self._stop.stop_ids))
        self._stop_ids = torch.from_numpy(self._stop_tokens).to(forward.device)
        self._cache = forward.new_cache(max_slots)
        self._slots = Slots(max_slots, max(1, sampling.max_tokens))
        self._seen: Tensor | None = None  # [slots, V] bool, only with a repetition penalty

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[Response]:
        """Draw every request; responses come as they finish. Requests of one prompt should be adjacent."""
        with self._forward.ready():
            yield from self._run(iter(requests))

    def _run(self, pending: Iterator[GenerationRequest]) -> Iterator[Response]:
        prompt: tuple[int, CachedPrompt] | None = None  # the newest prompt: its next samples may come first
        while True:
            # admitting in groups keeps the prefill batches from becoming one prompt each
            if self._slots.free >= max(1, self._capacity // 16) or not self._slots.requests:
                batch = list(itertools.islice(pending, self._slots.free))
                if batch:
                    slots, prompt = self._admit(batch, prompt)
                    yield from self._finished(slots)
                    continue
                if not self._slots.requests:
                    return
            yield from self._finished(self._decode())

    def _admit(
        self, batch: Sequence[GenerationRequest], newest: tuple[int, CachedPrompt] | None
    ) -> tuple[np.ndarray, tuple[int, CachedPrompt]]:
        """Give each request a slot: its prompt's keys and values, and its first token."""
        prompts = {} if newest is None else {newest[0]: newest[1]}
        missing = {r.prompt_index: r.prompt_tokens for r in batch if r.prompt_index not in prompts}
        prompts.update(self._prefill(missing))
        slots = np.array([self._take_slot(request, prompts[request.prompt_index]) for request in batch])
        logits = [prompts[r.prompt_index].logits for r in batch]
        self._draw(slots, torch.stack([x for x in logits if x is not None]) if logits[0] is not None else None)
        last = batch[-1].prompt_index
        return slots, (last, prompts[last])

    def _take_slot(self, request: GenerationRequest, prompt: CachedPrompt) -> int:
        room = self._max_length - len(request.prompt_tokens)
        asked = self._sampling.max_tokens if request.max_tokens is None else request.max_tokens
        slot = self._slots.add(request, min(asked, self._sampling.max_tokens, room))
        self._cache.add(slot, prompt)
        self._mark_prompt_seen(slot, request.prompt_tokens)
        return slot

    def _prefill(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, CachedPrompt]:
        """Prefill prompts by index, PREFILL_TOKENS or one prompt at a time."""
        groups: list[list[int]] = [[]]
        tokens = 0
        for index, prompt in prompts.items():
            if groups[-1] and tokens + len(prompt) > PREFILL_TOKENS:
                groups.append([])
                tokens = 0
            groups[-1].append(index)
            tokens += len(prompt)
        done: dict[int, CachedPrompt] = {}
        for group in filter(None, groups):
            done.update(zip(group, self._forward.prefill([prompts[index] for index in group]), strict=True))
        return done

    def _decode(self) -> np.ndarray:
        """Feed every slot's newest token and draw the next; returns the slots."""
        state, device = self._slots, self._forward.device
        held = np.array(list(state.requests))
        self._cache.ensure(held, state.prompt_length[held] + state.count[held])
        slots = np.array(self._cache.slots)  # in the order of the cache's rows
        newest = state.tokens[slots, state.count[slots] - 1]
        positions = state.prompt_length[slots] + state.count[slots] - 1
        tokens, where = torch.from_numpy(newest).to(device), torch.from_numpy(positions).to(device)
        self._draw(slots, self._forward.step(tokens, where, self._cache))
        return slots

    def _draw(self, slots: np.ndarray, logits: Tensor | None) -> None:
        """Draw one token for each of `slots`; `logits` `[slots, V]` is None off the last stage."""
        state, params, device = self._slots, self._sampling, self._forward.device
        index = torch.from_numpy(slots).to(device)
        drawn: Drawn | None = None
        if logits is not None:
            too_early = state.count[slots] < params.min_tokens
            forbidden = (torch.from_numpy(too_early).to(device), self._stop_ids) if too_early.any() else None
            noise = None
            if not params.greedy:
                prompts, samples = state.prompt_index[slots], state.sample_index[slots]
                noise = torch.from_numpy(uniform_noise(params.seed, prompts, samples, state.count[slots])).to(device)
            kernels = self._forward.kernels
            if kernels is not None and noise is not None and not params.filters:
                drawn = kernels.draw(logits, params.temperature, noise, forbidden)
            else:
                drawn = draw(logits, params, noise, None if self._seen is None else self._seen[index], forbidden)
        drawn = _from_last_stage(drawn, len(slots), device)
        if self._seen is not None:
            self._seen[index, drawn.tokens] = True
        state.record(slots, drawn)

    def _mark_prompt_seen(self, slot: int, prompt_tokens: Sequence[int]) -> None:
        if self._sampling.greedy or self._sampling.repetition_penalty == 1.0:
            return
        if self._seen is None:
            shape = (self._capacity, self._forward.arch.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._forward.device)
        self._seen[slot] = False
        self._seen[slot, torch.tensor(prompt_tokens, device=self._seen.device)] = True

    def _finished(self, slots: np.ndarray) -> Iterator[Response]:
        """Take out those of `slots` that are done."""
        state = self._slots
        count = state.count[slots]
        newest = state.tokens[slots, count - 1]
        suspects = (count >= state.limit[slots]) | np.isin(newest, self._stop_tokens)
        suspects |= np.fromiter(map(self._stop.may_end_in, newest.tolist()), dtype=bool, count=len(newest))
        for slot in slots[suspects].tolist():
            tokens = state.tokens[slot, : state.count[slot]].tolist()
            stopped = len(tokens) >= self._sampling.min_tokens and self._stop.is_stop(tokens)
            if stopped or len(tokens) >= state.limit[slot]:
                yield self._response(slot, tokens, "stop" if stopped else "length")
                self._cache.drop(slot)
                state.drop(slot)

    def _response(self, slot: int, tokens: list[int], reason: str) -> Response:
        state, count = self._slots, len(tokens)
        return Response(
            state.requests[slot].prompt_index,
            state.requests[slot].sample_index,
            tokens,
            self._stop.text_of(tokens),
            state.logprobs[slot, :count].tolist(),
            state.sampling_logprobs[slot, :count].tolist(),
            reason,
        )


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
