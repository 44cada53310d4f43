"""Between the clients, who live on an event loop, and the thread that draws.

handler ── submit ─▶ inbox ─▶ orders ─▶ drawing thread ─▶ drawn, finished ─▶ event loop ─▶ the handler's job
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import queue
from collections.abc import AsyncIterator, Callable, Sequence

from nemo_aligner.engine.interfaces import GenerationRequest, Orders, Progress, Response
from nemo_aligner.servers.generation.requests import TOO_MANY, RequestFault
from nemo_aligner.servers.wire import SERVER_FAILED

_IDLE_WAIT_S = 0.2

MOST_UNFINISHED = 1 << 15
"""Responses that clients wait for, all together."""


class Closing(RequestFault):
    """The server is going down."""

    def __init__(self) -> None:
        super().__init__("the server is closing", status=503)


class Failed(RequestFault):
    """A response cannot be drawn."""

    def __init__(self) -> None:
        super().__init__(SERVER_FAILED, status=500)


_ALL = -1
"""In the place of a uid: every request of a job."""

Event = Progress | Response | Closing | Failed  # with the last two nothing more will come


class Job:
    """The requests of one client's call, and what comes of them."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.requests = {request.uid: request for request in requests}
        self._events: dict[int, Event] = {}  # by uid, the newest: some clients read more slowly than is drawn
        self._came = asyncio.Event()

    def tell(self, uid: int, event: Event) -> None:
        """What comes of request `uid`, in the place of what came of it before and was not taken yet."""
        self._events[uid] = event
        self._came.set()

    @property
    def untaken(self) -> int:
        """How many requests have something new."""
        return len(self._events)

    async def __aiter__(self) -> AsyncIterator[Progress | Response]:
        """Until every response is done. Raises Closing when the server does before that, Failed when one cannot be."""
        missing = len(self.requests)
        while missing:
            while not self._events:
                self._came.clear()
                await self._came.wait()
            event = self._events.pop(next(iter(self._events)))
            if isinstance(event, Exception):
                raise event
            missing -= isinstance(event, Response)
            yield event


class FrontDesk:
    """Implements interfaces.Desk for the drawing thread; `submit` and `cancel` are for handlers on the event loop."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped
        self._inbox: queue.SimpleQueue[Job | list[int]] = queue.SimpleQueue()  # new requests, or uids to drop
        self._uids = itertools.count(1)
        self._jobs: dict[int, Job] = {}  # by uid; touched on the event loop alone
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def unfinished(self) -> int:
        """Responses that clients wait for."""
        return len(self._jobs)

    def submit(self, requests: Sequence[GenerationRequest]) -> Job:
        """Have these drawn. Raises RequestFault where the server is closing, or others have asked for enough."""
        if self._closed:
            raise Closing
        if self.unfinished + len(requests) > MOST_UNFINISHED:
            raise RequestFault(f"more than {MOST_UNFINISHED} responses at once; send it again", status=TOO_MANY)
        self._loop = asyncio.get_running_loop()
        job = Job([dataclasses.replace(request, uid=next(self._uids)) for request in requests])
        self._jobs.update(dict.fromkeys(job.requests, job))
        self._inbox.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for what is left of it."""
        left = [uid for uid in job.requests if self._jobs.pop(uid, None) is not None]
        if left:
            self._inbox.put(left)

    def close(self) -> None:
        """Called by the drawing thread when it draws no more: whoever waits is told."""
        self._call(self._close)

    def orders(self, *, idle: bool) -> Orders | None:
        if self._stopped():
            return None
        new: list[GenerationRequest] = []
        dropped: list[int] = []
        try:
            found = self._inbox.get(timeout=_IDLE_WAIT_S) if idle else self._inbox.get_nowait()
            while True:
                if isinstance(found, Job):
                    new += found.requests.values()
                else:
                    dropped += found
                found = self._inbox.get_nowait()
        except queue.Empty:
            return Orders(new, dropped)

    def drawn(self, progress: Sequence[Progress]) -> None:
        if progress:
            self._call(self._deliver, progress)

    def finished(self, response: Response) -> None:
        self._call(self._deliver, [response])

    def failed(self, uids: Sequence[int]) -> None:
        self._call(self._fail, uids)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events: Sequence[Progress | Response]) -> None:
        for event in events:
            over = isinstance(event, Response)
            job = self._jobs.pop(event.uid, None) if over else self._jobs.get(event.uid)
            if job is not None:
                job.tell(event.uid, event)

    def _fail(self, uids: Sequence[int]) -> None:
        """Whole jobs are of no use without a response, so the rest of theirs need not be drawn."""
        for job in {job for uid in uids if (job := self._jobs.get(uid)) is not None}:
            job.tell(_ALL, Failed())
            self.cancel(job)

    def _close(self) -> None:
        self._closed = True
        for job in set(self._jobs.values()):
            job.tell(_ALL, Closing())
        self._jobs.clear()
