"""Stand-ins behind protocols, shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

    def any(self, flag: bool) -> bool:
        return flag

    def any_in_replica(self, flag: bool) -> bool:
        return flag


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
