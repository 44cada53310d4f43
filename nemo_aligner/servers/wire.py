"""What travels between a client and the reward server, and what of it is refused.

inputs    sentences         bytes  [B, 1]   UTF-8 texts, prompt and response together;    these,
          tokens            int64  [B, S]   token ids, padded at the right at will;       or these two
          sequence_lengths  int64  [B, 1]   how many of them count
          add_EOS           bool   [B, 1]   end the texts with EOS; left out: as the reward model was trained
outputs   rewards           float32 [B, 1]
          exceeded          int32   [B, 1]  1 where the text was longer than the model's context, and was cut
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nemo_aligner.data.judged_text import ended
from nemo_aligner.engine.interfaces import Tokenizer
from nemo_aligner.errors import AlignerError

SENTENCES, TOKENS, LENGTHS, ADD_EOS = "sentences", "tokens", "sequence_lengths", "add_EOS"
REWARDS, EXCEEDED = "rewards", "exceeded"


class RequestError(AlignerError):
    """A request that cannot be scored; the text names the input. It is all that the client sees of the fault."""

    __traceback__ = property(lambda self: None, lambda self, value: None)  # type: ignore[assignment]


@dataclass(frozen=True)
class Texts:
    """The texts of one request as the reward model reads them."""

    rows: list[list[int]]
    exceeded: list[bool]


@dataclass(frozen=True)
class RequestReader:
    """Checks requests and turns them into token rows.

    `limit` is the model's context, `vocab_size` its vocabulary, `append_eod` whether it was trained on texts with EOS.
    """

    tokenizer: Tokenizer
    limit: int
    vocab_size: int
    append_eod: bool
    max_text_bytes: int

    def read(self, inputs: Mapping[str, np.ndarray]) -> Texts:
        """Raises RequestError naming the input at fault."""
        if (SENTENCES in inputs) == (TOKENS in inputs):
            raise RequestError(f"{SENTENCES}: give either {SENTENCES}, or {TOKENS} with {LENGTHS}")
        rows = self._from_text(inputs[SENTENCES]) if SENTENCES in inputs else self._from_tokens(inputs)
        ends = self._ends(inputs.get(ADD_EOS), len(rows))
        for index, row in enumerate(rows):
            if not row:
                raise RequestError(f"{SENTENCES if SENTENCES in inputs else LENGTHS}: row {index} is empty")
        eos = self.tokenizer.eos_id
        found = [ended(row, limit=self.limit, eos=eos if end else None) for row, end in zip(rows, ends, strict=True)]
        return Texts([row for row, _ in found], [cut for _, cut in found])

    def _from_text(self, sentences: np.ndarray) -> list[list[int]]:
        rows = []
        for index, raw in enumerate(_column(sentences, SENTENCES)):
            if len(raw) > self.max_text_bytes:
                raise RequestError(
                    f"{SENTENCES}: row {index} has {len(raw)} bytes, inference.max_text_bytes is {self.max_text_bytes}"
                )
            try:
                rows.append(self.tokenizer.encode(raw.decode("utf-8")))
            except UnicodeDecodeError as fault:
                raise RequestError(f"{SENTENCES}: row {index} is not valid UTF-8 (byte {fault.start})") from None
        return rows

    def _from_tokens(self, inputs: Mapping[str, np.ndarray]) -> list[list[int]]:
        tokens = inputs[TOKENS]
        if LENGTHS not in inputs:
            raise RequestError(f"{LENGTHS}: needed with {TOKENS}")
        if tokens.ndim != 2:
            raise RequestError(f"{TOKENS}: shape {list(tokens.shape)} is not [B, S]")
        lengths = _column(inputs[LENGTHS], LENGTHS)
        if len(lengths) != len(tokens):
            raise RequestError(f"{LENGTHS}: {len(lengths)} for {len(tokens)} rows of {TOKENS}")
        rows = []
        for index, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
            if not 0 <= length <= tokens.shape[1]:
                raise RequestError(f"{LENGTHS}: row {index} says {length}, {TOKENS} has {tokens.shape[1]} columns")
            ids = row[: int(length)]
            if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
                wrong = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
                raise RequestError(
                    f"{TOKENS}: row {index} has id {wrong}, the vocabulary is 0 to {self.vocab_size - 1}"
                )
            rows.append(ids.tolist())
        return rows

    def _ends(self, add_eos: np.ndarray | None, count: int) -> list[bool]:
        if add_eos is None:
            return [self.append_eod] * count
        flags = _column(add_eos, ADD_EOS)
        if len(flags) != count:
            raise RequestError(f"{ADD_EOS}: {len(flags)} for {count} texts")
        return [bool(flag) for flag in flags]


def _column(values: np.ndarray, name: str) -> list:
    """The entries of an input that has one per row: `[B, 1]`."""
    if values.ndim != 2 or values.shape[1] != 1:
        raise RequestError(f"{name}: shape {list(values.shape)} is not [B, 1]")
    return values[:, 0].tolist()


def answer(rewards: list[float], exceeded: list[int]) -> dict[str, np.ndarray]:
    """The outputs of one request."""
    return {
        REWARDS: np.array(rewards, dtype=np.float32).reshape(-1, 1),
        EXCEEDED: np.array(exceeded, dtype=np.int32).reshape(-1, 1),
    }
