"""Stand-ins behind protocols, shared by the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.engine.interfaces import GenerationRequest, Response

T = TypeVar("T")

EOS, END_OF_TURN = 256, 257


class ByteTokenizer:
    """One token per byte; EOS and one more special token."""

    vocab_size, bos_id, eos_id, pad_id, chat_template = 258, None, EOS, EOS, None
    stop_ids = frozenset({EOS})

    def encode(self, text: str) -> list[int]:
        return [END_OF_TURN] if text == "<turn>" else list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def piece(self, token: int) -> str:
        return {EOS: "<eos>", END_OF_TURN: "<turn>"}.get(token) or chr(token)


class OneProcess:
    """A cluster of one; `dp_rank` and `dp_size` may pretend to be one of several."""

    def __init__(self, dp_rank: int = 0, dp_size: int = 1) -> None:
        self.rank = self.dp_rank = dp_rank
        self.world_size = self.dp_size = dp_size

    is_main = True
    speaks_for_replica = True

    def barrier(self) -> None:
        pass

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    gather_ranks = gather

    def any(self, flag: bool) -> bool:
        return flag

    def any_in_replica(self, flag: bool) -> bool:
        return flag


class RankOfSeveral:
    """One of several data-parallel ranks, each a thread; see `on_ranks`."""

    speaks_for_replica = True

    def __init__(self, rank: int, world: int, board: list[Any], meet: threading.Barrier) -> None:
        self.rank = self.dp_rank = rank
        self.world_size = self.dp_size = world
        self._board, self._meet = board, meet

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        self._meet.wait()

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._meet.wait()
        found = list(self._board)
        self._meet.wait()
        return found

    gather_ranks = gather

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def any_in_replica(self, flag: bool) -> bool:
        return flag


def on_ranks(world: int, work: Callable[[RankOfSeveral], T]) -> list[T]:
    """What `work` returns on each of `world` data-parallel ranks. Raises what the first of them raised."""
    board, meet = [None] * world, threading.Barrier(world, timeout=20)

    def one(rank: int) -> T:
        try:
            return work(RankOfSeveral(rank, world, board, meet))
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(one, rank) for rank in range(world)]
        faults = [fault for fault in (future.exception() for future in futures) if fault is not None]
        for fault in sorted(faults, key=lambda fault: isinstance(fault, threading.BrokenBarrierError)):
            raise fault
        return [future.result() for future in futures]


class EchoPolicy:
    """Answers prompt p, sample s with `<p.s>` as bytes, the last request first, and remembers how it was asked."""

    tokenizer, max_sequence_length = ByteTokenizer(), 64

    def __init__(self, archive: str = "a" * 64) -> None:
        self.archive, self.asked = archive, list[GenerationRequest]()
        self.sampling: SamplingParams | None = None
        self.slots = 0

    def archive_hash(self) -> str:
        return self.archive

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: SamplingParams, max_slots: int
    ) -> Iterator[Response]:
        asked = list(requests)
        self.asked += asked
        self.sampling, self.slots = sampling, max_slots
        for request in reversed(asked):
            text = f"<{request.prompt_index}.{request.sample_index}>"
            tokens, finished = list(text.encode()), request.sample_index % 2 == 0
            logprobs = [-0.5 * (1 + i) for i in range(len(tokens))]
            reason = "stop" if finished else "length"
            yield Response(request.prompt_index, request.sample_index, tokens, text, logprobs, logprobs, reason)


class RecordingLogger:
    """A logger of Lightning's protocol that remembers what it is told."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.archive, self.status = "", ""

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.config = params

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))

    def save(self) -> None:
        pass

    def after_save_checkpoint(self, checkpoint: Any) -> None:
        self.archive = checkpoint.best_model_path

    def finalize(self, status: str) -> None:
        self.status = status


class FakeTriton:
    """PyTriton's server without Triton: keeps what it is told, and asks its handler where a client would."""

    made: list[FakeTriton]
    fault: Exception | None = None  # what starting ends with

    def __init__(self, config: Any, workspace: Path, security_config: Any) -> None:
        self.config, self.workspace, self.security = config, workspace, security_config
        self.model: dict[str, Any] = {}
        self.runs, self.stopped = False, 0
        self.made.append(self)

    @classmethod
    def put_in_place(cls, monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> list[FakeTriton]:
        """Let it be started instead of PyTriton's own; those that are made from now on."""
        import pytriton.triton

        fake = type(cls.__name__, (cls,), {"made": [], "fault": fault})
        monkeypatch.setattr(pytriton.triton, "Triton", fake)
        return fake.made

    def bind(self, **model: Any) -> None:
        self.model = model

    def run(self) -> None:
        if self.fault is not None:
            raise self.fault
        self.runs = True

    def stop(self) -> None:
        self.runs = False
        self.stopped += 1

    def ask(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to requests that came together."""
        return self.model["infer_func"]([SimpleNamespace(data=data) for data in requests])
