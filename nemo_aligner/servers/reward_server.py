"""The reward model behind PyTriton: any KServe-v2 client may ask it for rewards.

    clients ─▶ door, gate ─▶ Triton's dynamic batcher ─▶ handler: check, tokenize ─▶ main thread: score ─▶ answers

Requests of several clients are scored together; a request that is refused takes no other with it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from nemo_aligner.config.serving import ServingConfig
from nemo_aligner.errors import AlignerError, ServerError
from nemo_aligner.rewards.interfaces import Candidate, Judgement
from nemo_aligner.servers.triton import Spec, running_triton
from nemo_aligner.servers.wire import (
    ADD_EOS,
    ARCHIVE,
    CONVERSATIONS,
    ERROR,
    EXCEEDED,
    FIELDS,
    LENGTHS,
    PARTS,
    PROMPTS,
    RESPONSES,
    REWARDS,
    SENTENCES,
    SERVER_FAILED,
    TOKENS,
    RequestError,
    RequestReader,
    Texts,
    answer,
    refusal,
)
from nemo_aligner.servers.wire import told as told_of

log = logging.getLogger(__name__)

Score = Callable[[list[list[int]]], list[float]]
Judge = Callable[[list[Candidate], list[list[int]]], list[Judgement]]
"""What several sources say of candidates, whose tokens are the rows."""


class MainThread:
    """Runs `score` for the handler on the thread that calls `run`: collectives, signals and the GPU belong to it.

    A fault of `score` is for who asked, where this process is `alone`; others may be amidst what failed.
    """

    def __init__(self, score: Score, *, alone: bool = True) -> None:
        self._score, self._alone, self._over = score, alone, False
        self._queue: queue.SimpleQueue[tuple[list[list[int]], Future[list[float]]]] = queue.SimpleQueue()

    def score(self, rows: list[list[int]]) -> list[float]:
        """Called by the handler; waits for the answer. Raises what scoring raised, ServerError after `run`."""
        answer: Future[list[float]] = Future()
        self._queue.put((rows, answer))
        if self._over:
            self._turn_away()
        return answer.result()

    def run(self, stopped: Callable[[], bool], idle: Callable[[], None] = lambda: None) -> None:
        """Score what is asked until `stopped()`, and call `idle` in between. Raises ServerError if it cannot go on."""
        try:
            while not stopped():
                try:
                    rows, answer = self._queue.get(timeout=0.2)
                except queue.Empty:
                    idle()
                    continue
                self._answer(rows, answer)
        finally:
            self._over = True
            self._turn_away()

    def _answer(self, rows: list[list[int]], answer: Future[list[float]]) -> None:
        try:
            answer.set_result(self._score(rows))
            return
        except BaseException as fault:
            answer.set_exception(fault)
            if not isinstance(fault, Exception):
                raise
            if not self._alone:
                raise _no_more(fault) from fault
        # behind the block, where nothing holds the memory of what failed any more
        try:
            self._score([[0]])
        except Exception as fault:
            raise _no_more(fault) from fault

    def _turn_away(self) -> None:
        """Nobody waits for a thread that is gone."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()[1].set_exception(ServerError("the server has ended"))


def _no_more(fault: Exception) -> ServerError:
    return ServerError(f"the model can score no more: {type(fault).__name__}: {' '.join(str(fault).split())}")


def answer_requests(
    requests: Sequence[Mapping[str, np.ndarray]], reader: RequestReader, score: Score, judge: Judge | None = None
) -> list[dict[str, np.ndarray]]:
    """The answers to requests that Triton put into one batch, all scored together.

    What cannot be scored costs nothing else in the batch its reward: it has none, and says why. A fault in scoring is
    for the server's own log; clients hear that there was one, those alone whose requests meet it by themselves. With
    `judge`, answers tell what each source says too.
    """
    texts: list[Texts | str] = []
    for request in requests:
        try:
            texts.append(reader.read(request))
        except RequestError as fault:
            texts.append(str(fault))
    told = [error for found in texts for error in ([found] if isinstance(found, str) else found.errors) if error]
    if told:
        log.warning("%d texts or requests refused: %s", len(told), told[0])
    rows = [row for found in texts if isinstance(found, Texts) for row in found.rows if row]
    judgements: list[Judgement] = []
    try:
        if judge is None:
            rewards = iter(score(rows) if rows else [])
        else:
            read = [found for found in texts if isinstance(found, Texts)]
            judgements = judge([c for t in read for c, row in zip(t.candidates, t.rows, strict=True) if row], rows)
            rewards = iter([math.nan if j.reward is None else j.reward for j in judgements])
    except Exception as fault:
        if len(requests) > 1:
            return [found for request in requests for found in answer_requests([request], reader, score, judge)]
        log.error("scoring failed: %s", fault, exc_info=not isinstance(fault, AlignerError))
        return [refusal(SERVER_FAILED, request, reader.archive) for request in requests]

    def own(found: Texts) -> list[float]:
        return list(itertools.islice(rewards, sum(map(bool, found.rows))))

    answers = [
        refusal(found, request, reader.archive)
        if isinstance(found, str)
        else answer(own(found), found.exceeded, found.errors, reader.archive)
        for request, found in zip(requests, texts, strict=True)
    ]
    if judge is not None:
        left = iter(judgements)
        for outputs in answers:
            parts = [b"" if error else told_of(next(left)) for error in outputs[ERROR][:, 0]]
            outputs[PARTS] = np.array(parts, dtype=object).reshape(-1, 1)
    return answers


def _done(work: Callable[[], None]) -> bool:
    work()
    return True


def serve(
    config: ServingConfig,
    reader: RequestReader,
    score: Score,
    run: Callable[[], None],
    token: str | None = None,
    judge: Judge | None = None,
    start: Callable[[Callable[[], None]], bool] = _done,
) -> None:
    """Serve those who know `token`, or everybody without one, until `run` returns. Raises ServerError.

    `start` does what it is given, which takes seconds, and says whether it was done; if not, nothing is served.
    """
    from nemo_aligner.servers.doors import Door, open_doors

    def handle(requests: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        return answer_requests(requests, reader, score, judge)

    inputs, outputs = _tensors(tells_parts=judge is not None, reads_conversations=reader.texts is not None)
    door = Door(
        config.ip,
        config.port,
        "inference.port",
        token=token,
        max_bytes=config.max_request_bytes,
        max_requests=config.max_concurrent_requests,
        host_key="inference.ip",
        model=config.model_name,
    )
    with running_triton(config, handle, inputs, outputs, start) as gate:
        if gate is not None:
            with open_doors(gate, [door]):
                run()


def _tensors(tells_parts: bool, reads_conversations: bool) -> tuple[list[Spec], list[Spec]]:
    """What a request may bring, and what an answer holds."""
    inputs = [Spec(SENTENCES, bytes), Spec(TOKENS, np.int64), Spec(LENGTHS, np.int64), Spec(ADD_EOS, np.bool_)]
    outputs = [Spec(REWARDS, np.float32), Spec(EXCEEDED, np.int32), Spec(ERROR, bytes), Spec(ARCHIVE, bytes)]
    if tells_parts:
        inputs += [Spec(PROMPTS, bytes), Spec(RESPONSES, bytes), Spec(FIELDS, bytes)]
        outputs.append(Spec(PARTS, bytes))
    if reads_conversations:
        inputs.append(Spec(CONVERSATIONS, bytes))
    return inputs, outputs


class Heartbeat:
    """Calls `beat` when nothing was done for `seconds`: followers wait in a collective that would time out."""

    def __init__(self, beat: Callable[[], None], seconds: float) -> None:
        self._beat, self._seconds, self._last = beat, seconds, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._beat()
