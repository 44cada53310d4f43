"""The reward model behind PyTriton: any KServe-v2 client may ask it for rewards.

    clients ─▶ door, gate ─▶ Triton's dynamic batcher ─▶ handler: check, tokenize ─▶ main thread: score ─▶ answers

Requests of several clients are scored together; a request that is refused takes no other with it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import queue
import secrets
import socket
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from nemo_aligner.config.serving import ServingConfig
from nemo_aligner.errors import ServerError
from nemo_aligner.rewards.interfaces import Candidate, Judgement
from nemo_aligner.scratch import remove_leftovers, scratch_folder, scratch_root
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

_FOLDER = "nemo_aligner_server_"  # and the number of the process
_SHARED_MEMORY, _SEGMENT = Path("/dev/shm"), "pytrtion"  # so PyTriton spells what it begins names with, and the number

Score = Callable[[list[list[int]]], list[float]]
Judge = Callable[[list[Candidate], list[list[int]]], list[Judgement]]
"""What several sources say of candidates, whose tokens are the rows."""


class MainThread:
    """Runs `score` for the handler on the thread that calls `run`: collectives, signals and the GPU belong to it."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._queue: queue.SimpleQueue[tuple[list[list[int]], Future[list[float]]]] = queue.SimpleQueue()

    def score(self, rows: list[list[int]]) -> list[float]:
        """Called by the handler; waits for the answer. Raises what scoring raised."""
        answer: Future[list[float]] = Future()
        self._queue.put((rows, answer))
        return answer.result()

    def run(self, stopped: Callable[[], bool], idle: Callable[[], None] = lambda: None) -> None:
        """Score what is asked until `stopped()`; `idle` is called in between."""
        while not stopped():
            try:
                rows, answer = self._queue.get(timeout=0.2)
            except queue.Empty:
                idle()
                continue
            try:
                answer.set_result(self._score(rows))
            except BaseException as fault:
                answer.set_exception(fault)
                raise


def answer_requests(
    requests: Sequence[Mapping[str, np.ndarray]], reader: RequestReader, score: Score, judge: Judge | None = None
) -> list[dict[str, np.ndarray]]:
    """The answers to requests that Triton put into one batch, all scored together.

    What cannot be scored costs nothing else in the batch its reward: it has none, and says why. A fault in scoring is
    for the server's own log; clients hear that there was one. With `judge`, answers tell what each source says too.
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
        log.error("scoring failed: %s", fault)
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
    find_shared_python()
    check_port_is_free(config.ip, config.port)
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.proxy.types import Request
    from pytriton.triton import VALID_TRITON_ENDPOINTS, Triton, TritonConfig, TritonSecurityConfig

    from nemo_aligner.servers.doors import Door, open_doors
    from nemo_aligner.servers.gate import Gate, roomy_stacks

    def handle(requests: Sequence[Request]) -> list[dict[str, np.ndarray]]:
        return answer_requests([request.data for request in requests], reader, score, judge)

    more_inputs = [] if judge is None else [PROMPTS, RESPONSES, FIELDS]
    more_inputs += [] if reader.texts is None else [CONVERSATIONS]
    more_outputs = [] if judge is None else [PARTS]
    for name in ("pytriton", "sh"):  # they say much at the level of INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    root = scratch_root()
    _remove_leftovers(root)
    inner, access = _free_port(), secrets.token_urlsafe(32)
    folder = root / f"{_FOLDER}{os.getpid()}_{secrets.token_hex(4)}"
    with scratch_folder(folder):
        own_log = folder / "triton.log"
        triton = Triton(
            config=TritonConfig(
                http_address="127.0.0.1",
                http_port=inner,
                allow_grpc=False,
                allow_metrics=False,
                exit_timeout_secs=5,
                log_file=own_log,
            ),
            workspace=folder / "workspace",
            # its own look at whether it is ready comes without the token
            security_config=TritonSecurityConfig(access, sorted(VALID_TRITON_ENDPOINTS - {"health"})),
        )
        triton.bind(
            model_name=config.model_name,
            infer_func=handle,
            inputs=[
                Tensor(name=SENTENCES, dtype=bytes, shape=(-1,), optional=True),
                Tensor(name=TOKENS, dtype=np.int64, shape=(-1,), optional=True),
                Tensor(name=LENGTHS, dtype=np.int64, shape=(-1,), optional=True),
                Tensor(name=ADD_EOS, dtype=np.bool_, shape=(-1,), optional=True),
                *(Tensor(name=name, dtype=bytes, shape=(-1,), optional=True) for name in more_inputs),
            ],
            outputs=[
                Tensor(name=REWARDS, dtype=np.float32, shape=(1,)),
                Tensor(name=EXCEEDED, dtype=np.int32, shape=(1,)),
                Tensor(name=ERROR, dtype=bytes, shape=(1,)),
                Tensor(name=ARCHIVE, dtype=bytes, shape=(1,)),
                *(Tensor(name=name, dtype=bytes, shape=(1,)) for name in more_outputs),
            ],
            config=ModelConfig(
                max_batch_size=config.max_batch_size,
                batcher=DynamicBatcher(max_queue_delay_microseconds=config.max_queue_delay_microseconds),
            ),
        )
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
        try:
            with roomy_stacks():
                started = start(triton.run)
        except Exception as fault:
            triton.stop()
            said = (
                [line for line in own_log.read_text().splitlines() if line.startswith("E")] if own_log.exists() else []
            )
            reason = " ".join((said or [str(fault)])[-1].split())
            raise ServerError(f"Triton did not start on {config.ip}:{config.port}: {reason}") from None
        try:
            if started:
                with open_doors(Gate(f"http://127.0.0.1:{inner}", access), [door]):
                    run()
        finally:
            log.info("the reward server stops, which takes some seconds")
            triton.stop()
            log.info("reward server stopped")


def _remove_leftovers(root: Path) -> None:
    """Remove what killed servers left in `root`, and the shared memory of their Tritons."""
    for name in remove_leftovers(root, _FOLDER):
        pid = name.removeprefix(_FOLDER).partition("_")[0]
        for segment in _SHARED_MEMORY.glob(f"{_SEGMENT}{pid}-*"):
            with contextlib.suppress(OSError):  # another user's
                segment.unlink()


def check_port_is_free(ip: str, port: int) -> None:
    """Raises ServerError where something else listens already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as fault:
            raise ServerError(f"inference.ip={ip}, inference.port={port}: {fault.strerror}; choose another") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
