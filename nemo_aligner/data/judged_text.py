"""The text that a reward model reads, as token ids: the same for labeler, reward server, actor and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.data.chat import ChatTokenizer
from nemo_aligner.data.jsonl import Row
from nemo_aligner.data.prompts import bos_for, with_bos
from nemo_aligner.data.row_texts import texts_of
from nemo_aligner.data.token_texts import continuation, drawn_tokens, ids_key

log = logging.getLogger(__name__)


def ended(ids: Sequence[int], *, limit: int, eos: int | None) -> tuple[list[int], bool]:
    """At most `limit` tokens, with `eos` (None: without) at the end also of a text that was cut; and whether it was."""
    room = limit - (eos is not None)
    return [*ids[:room], *([] if eos is None else [eos])], len(ids) > room


class _RewardModel(Protocol):
    """The part of engine.interfaces.RewardModel that decides what it reads."""

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    @property
    def max_sequence_length(self) -> int: ...

    @property
    def append_eod(self) -> bool: ...


class TextEncoder:
    """Rows as the reward model was trained to see them: template(prompt) + response, EOS as its archive says.

    Conversations go through `data.chat_template`, or that of its archive. Of a response that comes with the tokens that
    were drawn for it, these are read.
    """

    def __init__(self, data: OfflineDataConfig, model: _RewardModel) -> None:
        self._data, self._tokenizer = data, model.tokenizer
        self._texts = texts_of(data, model.tokenizer)
        self._limit = min(data.max_seq_length, model.max_sequence_length)
        self._eos = model.append_eod if data.add_eos is None else data.add_eos
        self._bos = bos_for(model.tokenizer, data.add_bos, "data.add_bos")
        self._cut = self._unspelt = 0

    def tokens(self, row: Row, where: str = "") -> list[int]:
        """Token ids of one row with prompt and response, at most the limit; `where` is for messages."""
        data = self._data
        ids = self._as_drawn(row, where)
        if ids is None:
            ids = self._tokenizer.encode(self._texts.text(row, data.output_key, where))
        ids = with_bos(ids, self._bos)
        found, cut = ended(ids, limit=self._limit, eos=self._tokenizer.eos_id if self._eos or not ids else None)
        self._cut += cut
        return found

    def _as_drawn(self, row: Row, where: str) -> list[int] | None:
        key = self._data.output_key
        if row.get(ids_key(key)) is None or not isinstance(row.get(key), str):
            return None
        frame = self._texts.frame(row, where)
        before = self._tokenizer.encode(frame.prompt)
        drawn = drawn_tokens(row, key, row[key], before, self._tokenizer)
        self._unspelt += drawn is None
        if drawn is None:
            return None
        ids = before + drawn
        return ids + continuation(self._tokenizer, ids, frame.closing + frame.rest)

    def report(self) -> None:
        if self._cut:
            log.warning("%d texts were cut to %d tokens before scoring", self._cut, self._limit)
        if self._unspelt:
            log.warning(
                "%d responses were scored by their text: their %s do not say it in this tokenizer",
                self._unspelt, ids_key(self._data.output_key),
            )  # fmt: skip
