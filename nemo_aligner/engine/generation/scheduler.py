"""Continuous batching: responses share the decode step, and a finished one frees its row for the next request.

    requests ─▶ prefill (once per prompt) ─▶ slot, row of the cache ─▶ decode step ─▶ draw ─▶ finished? ─▶ Response
                                                                        ▲                     │ no
                                                                        └─────────────────────┘
Every rank of a replica runs the same bookkeeping; the last pipeline stage draws and hands the tokens to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_aligner.algorithms.sampling import Drawn, SamplingParams, draw, likeliest, uniform_noise
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import CachedPrompt
from nemo_aligner.engine.generation.slots import Kind, Kinds, Rows, Slots
from nemo_aligner.engine.generation.transfers import upload
from nemo_aligner.engine.interfaces import GenerationRequest, Response, Tokenizer, TopLogprobs
from nemo_aligner.engine.model.forward import from_last_stage

PREFILL_TOKENS = 4096
"""Prompt tokens of one prefill, at most, unless a prompt alone has more; bounds its activation memory."""

Prefilled = dict[tuple[tuple[int, ...], int | None], CachedPrompt]
"""Prompts by their tokens, and by how many likeliest tokens their scores name; None: they have no scores."""


class Generator:
    """One generation run of one replica. `sampling` is for requests that do not bring their own."""

    def __init__(
        self, forward: CachedForward, tokenizer: Tokenizer, sampling: SamplingParams, max_slots: int, max_length: int
    ) -> None:
        self._forward, self._sampling = forward, sampling
        self._capacity, self._max_length = max_slots, max_length
        self._kinds = Kinds(tokenizer, forward.device)
        self._default = self._kinds.of(sampling)  # held, so that it is not made anew for every batch
        self._clear()

    def _clear(self) -> None:
        """Nothing is drawn, nothing is kept."""
        self._cache = self._forward.new_cache(self._capacity)
        self._slots = Slots(self._capacity, max(1, self._sampling.max_tokens))
        self._fed = torch.zeros(self._capacity, dtype=torch.int64, device=self._forward.device)  # newest token by slot
        self._seen: Tensor | None = None  # [slots, V] bool, only with a repetition penalty
        self._newest: Prefilled = {}  # the newest prompt: its next samples may come first

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[Response]:
        """Draw every request; responses come as they finish. Requests of one prompt should be adjacent."""
        pending = iter(requests)
        with self._forward.ready():
            while True:
                # admitting in groups keeps the prefill batches from becoming one prompt each
                if self._slots.free >= max(1, self._capacity // 16) or not self._slots.requests:
                    batch = list(itertools.islice(pending, self._slots.free))
                    if batch:
                        yield from self._finished(self._admit(batch))
                        continue
                    if not self._slots.requests:
                        return
                yield from self._finished(self._decode())

    def _admit(self, batch: Sequence[GenerationRequest]) -> np.ndarray:
        """Give each request a slot: its prompt's keys and values, and its first token. Returns the slots."""
        return self._begin(batch, self._prefill(batch))

    def _begin(self, batch: Sequence[GenerationRequest], prompts: Prefilled) -> np.ndarray:
        """`_admit` with prompts that are prefilled."""
        mine = [prompts[self._prompt_key(request)] for request in batch]
        slots = np.array([self._take_slot(request, prompt) for request, prompt in zip(batch, mine, strict=True)])
        logits = [prompt.logits for prompt in mine if prompt.logits is not None]
        self._draw(slots, self._rows(slots), torch.stack(logits) if logits else None)
        last = self._prompt_key(batch[-1])
        self._newest = {last: prompts[last]}
        return slots

    def _prompt_key(self, request: GenerationRequest) -> tuple[tuple[int, ...], int | None]:
        scored = (request.sampling or self._sampling).top_logprobs if request.scores_prompt else None
        return request.prompt_tokens, scored

    def _take_slot(self, request: GenerationRequest, prompt: CachedPrompt) -> int:
        params, kind = request.sampling or self._sampling, self._kind(request)
        room = self._max_length - len(request.prompt_tokens)
        asked = params.max_tokens if request.max_tokens is None else request.max_tokens
        limit = min(asked, params.max_tokens, self._sampling.max_tokens, room)
        slot = self._slots.add(request, kind, prompt, seed=params.seed, limit=limit)
        self._cache.add(slot, prompt)
        if kind.penalises:
            self._mark_prompt_seen(slot, request.prompt_tokens)
        return slot

    def _kind(self, request: GenerationRequest) -> Kind:
        return self._default if request.sampling is None else self._kinds.of(request.sampling)

    def _prefill(self, batch: Sequence[GenerationRequest]) -> Prefilled:
        """The prompts of a batch, the newest one before it included; PREFILL_TOKENS or one prompt at a time."""
        done = dict(self._newest)
        missing = [key for key in dict.fromkeys(map(self._prompt_key, batch)) if key not in done]
        for scored, keys in itertools.groupby(sorted(missing, key=_scored), key=_scored):
            groups: list[list[tuple[int, ...]]] = [[]]
            tokens = 0
            for prompt, _ in keys:
                if groups[-1] and tokens + len(prompt) > PREFILL_TOKENS:
                    groups.append([])
                    tokens = 0
                groups[-1].append(prompt)
                tokens += len(prompt)
            top = None if scored < 0 else scored
            for group in groups:
                found = self._forward.prefill(group, top)
                done.update(zip([(prompt, top) for prompt in group], found, strict=True))
        return done

    def _decode(self) -> np.ndarray:
        """Feed every slot's newest token and draw the next; returns the slots."""
        state = self._slots
        held = np.array(list(state.requests))
        self._cache.ensure(held, state.prompt_length[held] + state.count[held])
        slots = np.array(self._cache.slots)  # in the order of the cache's rows
        rows = self._rows(slots)
        self._draw(slots, rows, self._forward.step(self._fed[rows.slots], rows.positions, self._cache))
        return slots

    def _rows(self, slots: np.ndarray) -> Rows:
        """What a step has to know of `slots`."""
        state, kinds = self._slots, list(self._slots.by_kind(slots))
        noise, too_early = np.zeros(len(slots)), np.zeros(len(slots), dtype=bool)
        if not all(kind.params.greedy for kind, _ in kinds):
            tables = state.seed, state.prompt_index, state.sample_index, state.count
            noise = uniform_noise(*(table[slots] for table in tables))
        for kind, where in kinds:
            too_early[where] = state.count[slots[where]] < kind.params.min_tokens
        order = [] if len(kinds) == 1 else [np.concatenate([np.arange(len(slots))[where] for _, where in kinds])]
        positions = state.prompt_length[slots] + state.count[slots] - 1
        own, at, uniform, early, *by_kind = upload([slots, positions, noise, too_early, *order], self._forward.device)
        return Rows(kinds, own, at, uniform, early, by_kind[0] if order else None)

    def _draw(self, slots: np.ndarray, rows: Rows, logits: Tensor | None) -> None:
        """Draw one token for each of `slots`; `logits` `[slots, V]` is None off the last stage."""
        drawn: Drawn | None = None
        top: list[TopLogprobs] | None = None
        asks_for_top = any(kind.params.top_logprobs for kind, _ in rows.kinds)
        if logits is not None:
            parts = [self._draw_alike(kind, slots[where], *part) for (kind, where), part in rows.by_kind(logits)]
            drawn = _in_order(parts, rows.order)
            if asks_for_top:
                drawn, top = _likeliest(logits, drawn, rows.kinds)
        drawn = _from_last_stage(drawn, len(slots), self._forward.device)
        if asks_for_top:
            top = from_last_stage(top)
        self._fed[rows.slots] = drawn.tokens
        if self._seen is not None:
            self._seen[rows.slots, drawn.tokens] = True
        self._slots.record(slots, drawn, top)

    def _draw_alike(self, kind: Kind, slots: np.ndarray, rows: Rows, logits: Tensor) -> Drawn:
        """Draw for slots of one kind."""
        params = kind.params
        some_too_early = (self._slots.count[slots] < params.min_tokens).any()
        forbidden = (rows.too_early, kind.stop_ids) if some_too_early else None
        noise = None if params.greedy else rows.noise
        kernels = self._forward.kernels
        if kernels is not None and noise is not None and not params.filters:
            return kernels.draw(logits, params.temperature, noise, forbidden)
        seen = None
        if kind.penalises:
            assert self._seen is not None
            seen = self._seen[rows.slots]
        return draw(logits, params, noise, seen, forbidden)

    def _mark_prompt_seen(self, slot: int, prompt_tokens: Sequence[int]) -> None:
        if self._seen is None:
            shape = (self._capacity, self._forward.arch.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._forward.device)
        self._seen[slot] = False
        self._seen[slot, torch.tensor(prompt_tokens, device=self._seen.device)] = True

    def _finished(self, slots: np.ndarray) -> Iterator[Response]:
        """Take out those of `slots` that are done."""
        for slot in self._suspects(slots):
            response = self._response(slot)
            if response is not None:
                yield response
                self._drop(slot)

    def _suspects(self, slots: np.ndarray) -> list[int]:
        """Those of `slots` that may be done."""
        state = self._slots
        newest = state.tokens[slots, state.count[slots] - 1]
        suspects = state.count[slots] >= state.limit[slots]
        for kind, where in state.by_kind(slots):
            suspects[where] |= kind.may_end(newest[where])
        return slots[suspects].tolist()

    def _response(self, slot: int) -> Response | None:
        """That of a slot which is done; None of one that is not."""
        state = self._slots
        stopped = state.is_over(slot)
        if not stopped and state.count[slot] < state.limit[slot]:
            return None
        return state.response(slot, "stop" if stopped else "length")

    def _drop(self, slot: int) -> None:
        self._cache.drop(slot)
        self._slots.drop(slot)


def _scored(key: tuple[tuple[int, ...], int | None]) -> int:
    return -1 if key[1] is None else key[1]


def _in_order(parts: Sequence[Drawn], order: Tensor | None) -> Drawn:
    """Draws for parts of the rows as one: the i-th of the parts is row `order[i]`."""
    if order is None:
        return parts[0]
    joined = [torch.cat(values) for values in zip(*parts, strict=True)]
    return Drawn(*(torch.empty_like(values).index_copy_(0, order, values) for values in joined))


def _likeliest(
    logits: Tensor, drawn: Drawn, kinds: Sequence[tuple[Kind, slice | np.ndarray]]
) -> tuple[Drawn, list[TopLogprobs]]:
    """The likeliest tokens of each row, where its kind asks for them; a drawn token among them has the same figure."""
    found: list[TopLogprobs] = [[] for _ in range(len(logits))]
    logprobs = logits.float().log_softmax(dim=-1)
    for kind, where in kinds:
        if kind.params.top_logprobs:
            rows = range(len(logits))[where] if isinstance(where, slice) else where.tolist()
            for row, top in zip(rows, likeliest(logprobs[where], kind.params.top_logprobs), strict=True):
                found[row] = top
    return drawn._replace(logprobs=logprobs.gather(-1, drawn.tokens[:, None]).squeeze(-1)), found


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
