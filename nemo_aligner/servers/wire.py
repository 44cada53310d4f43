"""What travels between a client and the reward server, and what of it is refused.

inputs    sentences         bytes  [B, 1]   UTF-8 texts, prompt and response together;    these,
          tokens            int64  [B, S]   token ids, padded at the right at will;       or these two
          sequence_lengths  int64  [B, 1]   how many of them count
          add_EOS           bool   [B, 1]   end the texts with EOS; left out: as the reward model was trained
          prompts           bytes  [B, 1]   of a server with reward functions, instead of sentences:
          responses         bytes  [B, 1]   prompt and response apart,
          fields            bytes  [B, 1]   and a JSON object with the other fields of the row, or nothing
          conversations     bytes  [B, 1]   JSON {"messages", "response"}, perhaps "tools" and "chat_template_kwargs",
                                            for the reward model's chat template; alone, or beside sentences or
                                            responses, of which those count whose conversation is empty
outputs   rewards           float32 [B, 1]  NaN where there is an error
          exceeded          int32   [B, 1]  1 where the text was longer than the model's context, and was cut; -1: error
          error             bytes   [B, 1]  why the row could not be scored, in one line; empty where it was
          archive           bytes   [B, 1]  sha256 of the reward model's archive: whose rewards these are
          parts             bytes   [B, 1]  of a server with reward functions: JSON {"reward", "parts", "failed"}, the
                                            reward of each source by its name, null where it gave none
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_aligner.data.conversations import check_turns, plain_form
from nemo_aligner.data.jsonl import dump_row, parse_line
from nemo_aligner.data.judged_text import ended
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.engine.interfaces import Tokenizer
from nemo_aligner.errors import AlignerError, DataError
from nemo_aligner.records import Turns
from nemo_aligner.rewards.interfaces import Candidate, Judgement, Outcome

SENTENCES, TOKENS, LENGTHS, ADD_EOS = "sentences", "tokens", "sequence_lengths", "add_EOS"
PROMPTS, RESPONSES, FIELDS, PARTS = "prompts", "responses", "fields", "parts"
CONVERSATIONS = "conversations"
REWARDS, EXCEEDED, ERROR, ARCHIVE = "rewards", "exceeded", "error", "archive"

SERVER_FAILED = "the server failed; its log says why"
"""The error of every row of a request that may be asked again, of this server or one started in its place."""

_RESPONSE = "response"
_Row = Callable[[], list[int]]


class RequestError(AlignerError):
    """A row, or a request, that cannot be scored; the text names the input."""


@dataclass(frozen=True)
class Texts:
    """The texts of one request as the reward model reads them; no tokens where `errors` says what is wrong with one."""

    rows: list[list[int]]
    exceeded: list[bool]
    errors: list[str]
    candidates: list[Candidate] = field(default_factory=list, compare=False)  # as reward functions read them


@dataclass(frozen=True)
class RequestReader:
    """Checks requests and turns them into token rows.

    `limit` is the model's context, `vocab_size` its vocabulary, `append_eod` whether it was trained on texts with EOS,
    `archive` the sha256 of its archive.
    `check_fields` raises DataError for fields that reward functions cannot do without; None: no functions are served.
    `texts` renders conversations; None: none are taken, as there is no reward model.
    """

    tokenizer: Tokenizer
    limit: int
    vocab_size: int
    append_eod: bool
    max_text_bytes: int
    check_fields: Callable[[Mapping[str, Any]], None] | None = None
    archive: str = ""
    texts: RowTexts | None = None

    def read(self, inputs: Mapping[str, np.ndarray]) -> Texts:
        """Raises RequestError, naming the input, for what is wrong with the request as a whole."""
        if RESPONSES in inputs:
            candidates = self._candidates(inputs)
            rows = self._texts([_bytes(c.prompt + c.response) for c in candidates], RESPONSES)
        elif CONVERSATIONS in inputs and not {SENTENCES, TOKENS} & inputs.keys():
            rows = self._texts([b""] * len(inputs[CONVERSATIONS]), CONVERSATIONS)
            candidates = [Candidate("", "", {}, f"row {i}") for i in range(len(rows))]
        elif (SENTENCES in inputs) == (TOKENS in inputs):
            raise RequestError(f"{SENTENCES}: give either {SENTENCES}, or {TOKENS} with {LENGTHS}")
        elif SENTENCES in inputs:
            texts = _column(inputs[SENTENCES], SENTENCES)
            rows = self._texts(texts, SENTENCES)
            candidates = [Candidate("", text.decode(errors="replace"), {}, f"row {i}") for i, text in enumerate(texts)]
        elif self.check_fields is None:
            rows, candidates = self._token_rows(inputs), []
        else:
            raise RequestError(f"{TOKENS}: reward functions read texts; give {PROMPTS} and {RESPONSES}")
        if CONVERSATIONS in inputs:
            rows = self._with_conversations(rows, candidates, inputs)
        ends = self._ends(inputs.get(ADD_EOS), len(rows))
        found = Texts([], [], [], candidates)
        for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
            try:
                if self.check_fields is not None:
                    self.check_fields(candidates[index].fields)
                tokens, cut = ended(row(), limit=self.limit, eos=self.tokenizer.eos_id if end else None)
                error = ""
            except (RequestError, DataError) as fault:
                tokens, cut, error = [], False, str(fault)
            found.rows.append(tokens)
            found.exceeded.append(cut)
            found.errors.append(error)
        return found

    def _candidates(self, inputs: Mapping[str, np.ndarray]) -> list[Candidate]:
        for name in (SENTENCES, TOKENS):
            if name in inputs:
                raise RequestError(f"{name}: give either {name}, or {PROMPTS} and {RESPONSES}")
        if PROMPTS not in inputs:
            raise RequestError(f"{PROMPTS}: needed with {RESPONSES}")
        responses = _column(inputs[RESPONSES], RESPONSES)
        fields = _column(inputs[FIELDS], FIELDS) if FIELDS in inputs else [b""] * len(responses)
        columns = {PROMPTS: _column(inputs[PROMPTS], PROMPTS), RESPONSES: responses, FIELDS: fields}
        for name, column in columns.items():
            if len(column) != len(responses):
                raise RequestError(f"{name}: {len(column)} for {len(responses)} {RESPONSES}")
        return [
            Candidate(_text(prompt, PROMPTS, i), _text(response, RESPONSES, i), _object(own, FIELDS, i), f"row {i}")
            for i, (prompt, response, own) in enumerate(zip(*columns.values(), strict=True))
        ]

    def _with_conversations(
        self, rows: list[_Row], candidates: list[Candidate], inputs: Mapping[str, np.ndarray]
    ) -> list[_Row]:
        """Rows as they are, but for those of a conversation; where responses are not apart, candidates get theirs."""
        given = _column(inputs[CONVERSATIONS], CONVERSATIONS)
        if len(given) != len(rows):
            raise RequestError(f"{CONVERSATIONS}: {len(given)} for {len(rows)} texts")
        found = list(rows)
        for i, raw in enumerate(given):
            if not raw:
                continue
            row = _object(raw, CONVERSATIONS, i)
            found[i] = functools.partial(self._from_conversation, i, row)
            turns = Turns.of(row, None)
            if RESPONSES not in inputs and candidates and turns is not None:
                fields = {name: value for name, value in row.items() if name != _RESPONSE}
                candidates[i] = Candidate("", str(row.get(_RESPONSE, "")), fields, f"row {i}", turns)
        return found

    def _from_conversation(self, index: int, row: Mapping[str, Any]) -> list[int]:
        if self.texts is None:
            raise RequestError(f"{CONVERSATIONS}: no reward model is served that would read them")
        where, turns = f"{CONVERSATIONS}: row {index}", Turns.of(row, None)
        if turns is None or not isinstance(row.get(_RESPONSE), str):
            raise RequestError(f'{where} is no {{"messages": [...], "response": "..."}}')
        check_turns(dict(row), turns, output_key=None, path=where, line=None)
        return self._from_text(CONVERSATIONS, index, _bytes(self.texts.text(dict(row), _RESPONSE, where)))

    def _texts(self, texts: Sequence[bytes], name: str) -> list[_Row]:
        return [functools.partial(self._from_text, name, i, raw) for i, raw in enumerate(texts)]

    def _from_text(self, name: str, index: int, raw: bytes) -> list[int]:
        if len(raw) > self.max_text_bytes:
            raise RequestError(
                f"{name}: row {index} has {len(raw)} bytes, inference.max_text_bytes is {self.max_text_bytes}"
            )
        row = self.tokenizer.encode(_text(raw, name, index))
        if not row:
            raise RequestError(f"{name}: row {index} is empty")
        return row

    def _token_rows(self, inputs: Mapping[str, np.ndarray]) -> list[_Row]:
        tokens = inputs[TOKENS]
        if LENGTHS not in inputs:
            raise RequestError(f"{LENGTHS}: needed with {TOKENS}")
        if tokens.ndim != 2:
            raise RequestError(f"{TOKENS}: shape {list(tokens.shape)} is not [B, S]")
        lengths = _column(inputs[LENGTHS], LENGTHS)
        if len(lengths) != len(tokens):
            raise RequestError(f"{LENGTHS}: {len(lengths)} for {len(tokens)} rows of {TOKENS}")
        return [
            functools.partial(self._from_tokens, index, row, length)
            for index, (row, length) in enumerate(zip(tokens, lengths, strict=True))
        ]

    def _from_tokens(self, index: int, row: np.ndarray, length: int) -> list[int]:
        if not 0 < length <= len(row):
            said = "is empty" if length == 0 else f"says {length}, {TOKENS} has {len(row)} columns"
            raise RequestError(f"{LENGTHS}: row {index} {said}")
        ids = row[: int(length)]
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise RequestError(
                f"{TOKENS}: row {index} has id {int(wrong[0])}, the vocabulary is 0 to {self.vocab_size - 1}"
            )
        return [int(i) for i in ids]

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


def _text(raw: bytes, name: str, index: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise RequestError(f"{name}: row {index} is not valid UTF-8 (byte {fault.start})") from None


def _bytes(text: str) -> bytes:
    return text.encode()


def _object(raw: bytes, name: str, index: int) -> dict[str, Any]:
    """Raises RequestError for what is none, or could not be written again."""
    try:
        return parse_line(raw, f"{name}: row {index}", None) if raw else {}
    except DataError as fault:
        raise RequestError(str(fault)) from None


def conversation_of(candidate: Candidate) -> bytes:
    """A candidate as an entry of the input `conversations`; empty for a plain one. Raises DataError."""
    if candidate.turns is None:
        return b""
    return dump_row({**plain_form(dict(candidate.fields), candidate.where), _RESPONSE: candidate.response}).encode()


def told(judgement: Judgement) -> bytes:
    """A judgement as the output `parts`."""
    return dump_row(
        {"reward": judgement.reward, "parts": dict(judgement.parts), "failed": list(judgement.failed)}
    ).encode()


def outcome_of(parts: bytes) -> Outcome:
    """What `told` says of the whole."""
    said = json.loads(parts)
    failed = ", ".join(said["failed"])
    return Outcome(
        said["reward"], f"the server could not have the reward of {failed}" if failed else None, said["parts"]
    )


def answer(
    rewards: Sequence[float], exceeded: Sequence[bool], errors: Sequence[str], archive: str
) -> dict[str, np.ndarray]:
    """The outputs of one request; `rewards` of the rows without an error, `exceeded` and `errors` of all."""
    left = iter(rewards)
    every = [math.nan if error else next(left) for error in errors]
    flags = [-1 if error else int(cut) for cut, error in zip(exceeded, errors, strict=True)]
    return {
        REWARDS: np.array(every, dtype=np.float32).reshape(-1, 1),
        EXCEEDED: np.array(flags, dtype=np.int32).reshape(-1, 1),
        ERROR: np.array([error.encode() for error in errors], dtype=object).reshape(-1, 1),
        ARCHIVE: np.array([archive.encode()] * len(errors), dtype=object).reshape(-1, 1),
    }


def refusal(error: str, inputs: Mapping[str, np.ndarray], archive: str) -> dict[str, np.ndarray]:
    """The outputs of a request of which no row could be scored."""
    count = len(next(iter(inputs.values()), np.empty(1)))
    return answer([], [False] * count, [error] * count, archive)
