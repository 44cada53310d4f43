"""The reward model behind PyTriton: any KServe-v2 client may ask it for rewards.

    HTTP ─▶ Triton ─▶ one handler per request in flight: check, tokenize ─▶ queue ─▶ Batcher ─▶ score ─▶ answer

Requests of several clients are scored together, whatever their shapes. Each has a handler of its own, so a request that
is refused takes no other with it.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemo_aligner.config.serving import ServingConfig
from nemo_aligner.errors import ServerError
from nemo_aligner.servers.wire import (
    ADD_EOS,
    EXCEEDED,
    LENGTHS,
    REWARDS,
    SENTENCES,
    TOKENS,
    RequestError,
    RequestReader,
    Texts,
    answer,
)

log = logging.getLogger(__name__)

Score = Callable[[list[list[int]]], list[float]]


@dataclass
class _Waiting:
    texts: Texts
    rewards: Future[list[float]] = field(default_factory=Future)


class Batcher:
    """Texts of concurrent requests, scored together on the thread that calls `run`."""

    def __init__(self, score: Score, *, max_rows: int, delay_s: float) -> None:
        self._score, self._max_rows, self._delay_s = score, max_rows, delay_s
        self._queue: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._held: _Waiting | None = None  # did not fit into the last batch

    def rewards(self, texts: Texts) -> list[float]:
        """Rewards of one request's texts; waits for them. Raises what scoring raised."""
        waiting = _Waiting(texts)
        self._queue.put(waiting)
        return waiting.rewards.result()

    def run(self, stopped: Callable[[], bool], idle: Callable[[], None] = lambda: None) -> None:
        """Score what comes in until `stopped()`, then what is still waiting; `idle` is called between batches."""
        while True:
            batch = self._collect(0.2)
            if batch:
                self._answer(batch)
            elif stopped():
                return
            idle()

    def _collect(self, timeout: float) -> list[_Waiting]:
        """The requests of the next batch: the first that comes, and those that come within the delay after it."""
        first = self._held or self._next(timeout)
        self._held = None
        if first is None:
            return []
        batch, rows = [first], len(first.texts.rows)
        deadline = time.monotonic() + self._delay_s
        while rows < self._max_rows:
            following = self._next(max(0.0, deadline - time.monotonic()))
            if following is None:
                break
            if rows + len(following.texts.rows) > self._max_rows:
                self._held = following
                break
            batch.append(following)
            rows += len(following.texts.rows)
        return batch

    def _next(self, timeout: float) -> _Waiting | None:
        try:
            return self._queue.get(timeout=timeout) if timeout > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            rewards = self._score([row for waiting in batch for row in waiting.texts.rows])
        except Exception as fault:
            for waiting in batch:
                waiting.rewards.set_exception(fault)
            raise
        start = 0
        for waiting in batch:
            count = len(waiting.texts.rows)
            waiting.rewards.set_result(rewards[start : start + count])
            start += count


def serve(config: ServingConfig, reader: RequestReader, batcher: Batcher, run: Callable[[], None]) -> None:
    """Serve until `run` returns. Raises ServerError where Triton cannot start."""
    find_shared_python()
    check_port_is_free(config.ip, config.port)
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.proxy.types import Request
    from pytriton.triton import Triton, TritonConfig

    def handle(requests: Sequence[Request]) -> list[dict[str, np.ndarray]]:
        answers = []
        for request in requests:
            texts = reader.read(request.data)
            if len(texts.rows) > config.max_batch_size:
                raise RequestError(f"{len(texts.rows)} texts, inference.max_batch_size is {config.max_batch_size}")
            answers.append(answer(batcher.rewards(texts), texts.exceeded))
        return answers

    for name in ("pytriton", "sh"):  # they say much at the level of INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="nemo_aligner_") as folder:
        own_log = Path(folder) / "triton.log"
        triton = Triton(
            config=TritonConfig(
                http_address=config.ip,
                http_port=config.port,
                allow_grpc=False,
                allow_metrics=False,
                exit_timeout_secs=5,
                log_file=own_log,
            )
        )
        triton.bind(
            model_name=config.model_name,
            infer_func=[handle] * config.concurrent_requests,
            inputs=[
                Tensor(name=SENTENCES, dtype=bytes, shape=(-1,), optional=True),
                Tensor(name=TOKENS, dtype=np.int64, shape=(-1,), optional=True),
                Tensor(name=LENGTHS, dtype=np.int64, shape=(-1,), optional=True),
                Tensor(name=ADD_EOS, dtype=np.bool_, shape=(-1,), optional=True),
            ],
            outputs=[
                Tensor(name=REWARDS, dtype=np.float32, shape=(1,)),
                Tensor(name=EXCEEDED, dtype=np.int32, shape=(1,)),
            ],
            # a handler has one request at a time: what is scored together is the Batcher's business
            config=ModelConfig(max_batch_size=config.max_batch_size, batcher=None),
        )
        try:
            triton.run()
        except Exception as fault:
            triton.stop()
            said = (
                [line for line in own_log.read_text().splitlines() if line.startswith("E")] if own_log.exists() else []
            )
            reason = " ".join((said or [str(fault)])[-1].split())
            raise ServerError(f"Triton did not start on {config.ip}:{config.port}: {reason}") from None
        log.info("serving %s on http://%s:%d", config.model_name, config.ip, config.port)
        try:
            run()
        finally:
            triton.stop()
            log.info("reward server stopped")


def check_port_is_free(ip: str, port: int) -> None:
    """Raises ServerError where something else listens already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as fault:
            raise ServerError(f"inference.ip={ip}, inference.port={port}: {fault.strerror}; choose another") from None


def find_shared_python() -> None:
    """Let Triton's Python backend load the libpython of this interpreter, not another one of the system.

    Raises ServerError where the interpreter has no shared libpython.
    """
    folder, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    if not folder or not name or ".so" not in name or not (Path(folder) / name).exists():
        raise ServerError(
            f"this Python has no shared library ({name or 'libpython'} in {folder}), which Triton's Python backend "
            "needs; use one built with --enable-shared, such as the distribution's or conda's"
        )
    others = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ["LD_LIBRARY_PATH"] = f"{folder}:{others}" if others else str(folder)


class Heartbeat:
    """Calls `beat` when nothing was done for `seconds`: followers wait in a collective that would time out."""

    def __init__(self, beat: Callable[[], None], seconds: float) -> None:
        self._beat, self._seconds, self._last = beat, seconds, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._beat()
