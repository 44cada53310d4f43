"""Generation for clients who come and go, and what becomes of them when something fails.

a response cannot be told, or how to draw it     that request fails
a prompt cannot be prefilled, not even alone     the requests with that prompt fail
a step fails                                     all that were in it fail, and the cache is made anew
so does a step of a prompt of one token then     the server ends: neither model nor memory is what it was
several processes share the model                the server ends with any step that fails: the others may be amidst it
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.engine.generation.scheduler import Generator, Prefilled
from nemo_aligner.engine.interfaces import Desk, GenerationRequest, Orders
from nemo_aligner.errors import ServerError

log = logging.getLogger(__name__)

_NOBODY = np.empty(0, dtype=np.int64)
_PROBE = GenerationRequest(0, 0, (0,), sampling=SamplingParams(greedy=True, max_tokens=3, min_tokens=3))


class Server(Generator):
    """A Generator whose requests come from a desk."""

    def serve(self, desk: Desk | None, share: Callable[[Orders | None], Orders | None], *, alone: bool = True) -> None:
        """Draw what `desk` orders, who has it; `share` gives every rank the orders of the one that has the desk.

        `alone`: there is no other rank. Raises ServerError when it cannot go on.
        """
        self._desk, self._alone = desk, alone
        waiting: deque[GenerationRequest] = deque()
        with self._forward.ready():
            while True:
                idle = not waiting and not self._slots.requests
                orders = share(None if desk is None else desk.orders(idle=idle))
                if orders is None:
                    return
                waiting.extend(orders.new)
                if orders.dropped:
                    gone = set(orders.dropped)
                    waiting = deque(request for request in waiting if request.uid not in gone)
                    for slot in [slot for slot, request in self._slots.requests.items() if request.uid in gone]:
                        self._drop(slot)
                if waiting and self._slots.free:
                    batch = [waiting.popleft() for _ in range(min(len(waiting), self._slots.free))]
                    self._report(self._admitted(batch))
                if self._slots.requests:
                    self._report(self._together(self._decode))

    def _admitted(self, batch: Sequence[GenerationRequest]) -> np.ndarray:
        """As `_admit`, without those that cannot be."""
        kinds, known = [], []  # kinds are held: they live no longer than who is drawn so
        for request in batch:
            try:
                kinds.append(self._kind(request))
                known.append(request)
            except Exception:
                self._fail([request])
        prompts = self._prefilled(known)
        ready = [request for request in known if self._prompt_key(request) in prompts]
        return self._together(lambda: self._begin(ready, prompts), ready) if ready else _NOBODY

    def _prefilled(self, batch: Sequence[GenerationRequest]) -> Prefilled:
        """The prompts of a batch; where that fails, those that do not fail alone."""
        if not batch:
            return {}
        try:
            return self._prefill(batch)
        except Exception as fault:
            self._check_alone(fault)
            keys = dict.fromkeys(map(self._prompt_key, batch))
            if len(keys) == 1:
                self._fail(batch)
                return {}
        found: Prefilled = {}
        for key in keys:
            found |= self._prefilled([request for request in batch if self._prompt_key(request) == key])
        return found

    def _together(self, step: Callable[[], np.ndarray], joining: Sequence[GenerationRequest] = ()) -> np.ndarray:
        """The slots of a step; none where it fails, which costs everybody who is drawn or `joining` theirs."""
        try:
            return step()
        except Exception as fault:
            self._check_alone(fault)
            in_it = {request.uid: request for request in (*self._slots.requests.values(), *joining)}
            self._fail(list(in_it.values()))
        # behind the block, where nothing holds the memory of the step any more
        try:
            self._clear()
            [slot] = self._admit([_PROBE])
            self._decode()
            self._drop(slot)
        except Exception as fault:
            log.exception("what was tried after a failed step fails too")
            raise ServerError(f"the model can draw no more: {_told(fault)}") from None
        return _NOBODY

    def _check_alone(self, fault: Exception) -> None:
        """Raises ServerError where other ranks take part in what failed."""
        if not self._alone:
            log.exception("a step failed that several processes share")
            raise ServerError(f"the model can draw no more: {_told(fault)}") from fault

    def _report(self, slots: np.ndarray) -> None:
        """Tell the desk which of `slots` are done, and what there is of the others."""
        try:
            suspects = self._suspects(slots) if slots.size else []
        except Exception:  # of one of them, which a look at each will show
            suspects = slots.tolist()
        for slot in suspects:
            try:
                response = self._response(slot)
            except Exception:
                self._fail([self._slots.requests[slot]])
                self._drop(slot)
                continue
            if response is not None:
                if self._desk is not None:
                    self._desk.finished(response)
                self._drop(slot)
        if self._desk is not None:
            held = self._slots.requests
            streams = [slot for slot in slots.tolist() if slot in held and held[slot].streams]
            self._desk.drawn([self._slots.progress(slot) for slot in streams])

    def _fail(self, requests: Sequence[GenerationRequest]) -> None:
        """Tell the log of the fault that is being handled, and the desk whom it concerns."""
        if self._desk is not None:
            log.exception("%d responses fail, the others go on", len(requests))
            self._desk.failed([request.uid for request in requests])


def _told(fault: Exception) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}"
