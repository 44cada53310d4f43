"""The text that a reward model reads, as token ids: the same for labeler, reward server, actor and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.data.jsonl import Row
from nemo_aligner.data.prompts import filled, with_bos
from nemo_aligner.data.token_texts import TextTokenizer, drawn_tokens, ids_key

log = logging.getLogger(__name__)


def ended(ids: Sequence[int], *, limit: int, eos: int | None) -> tuple[list[int], bool]:
    """At most `limit` tokens, with `eos` (None: without) at the end also of a text that was cut; and whether it was."""
    room = limit - (eos is not None)
    return [*ids[:room], *([] if eos is None else [eos])], len(ids) > room


class _RewardModel(Protocol):
    """The part of engine.interfaces.RewardModel that decides what it reads."""

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def max_sequence_length(self) -> int: ...

    @property
    def append_eod(self) -> bool: ...


class TextEncoder:
    """Rows as the reward model was trained to see them: template(prompt) + response, EOS as its archive says.

    Of a response that comes with the tokens that were drawn for it, these are read.
    """

    def __init__(self, data: OfflineDataConfig, model: _RewardModel) -> None:
        self._data, self._tokenizer = data, model.tokenizer
        self._limit = min(data.max_seq_length, model.max_sequence_length)
        self._eos = model.append_eod if data.add_eos is None else data.add_eos
        self._cut = self._unspelt = 0

    def tokens(self, row: Row) -> list[int]:
        """Token ids of one row with prompt and response, at most the limit."""
        data = self._data
        prompt, response = filled(data.prompt_template, data.input_key, row[data.input_key]), row[data.output_key]
        ids = self._as_drawn(row, prompt, response)
        if ids is None:
            ids = self._tokenizer.encode(prompt + response)
        ids = with_bos(ids, self._tokenizer.bos_id if data.add_bos else None)
        found, cut = ended(ids, limit=self._limit, eos=self._tokenizer.eos_id if self._eos or not ids else None)
        self._cut += cut
        return found

    def _as_drawn(self, row: Row, prompt: str, response: str) -> list[int] | None:
        if row.get(ids_key(self._data.output_key)) is None:
            return None
        before = self._tokenizer.encode(prompt)
        drawn = drawn_tokens(row, self._data.output_key, response, before, self._tokenizer)
        self._unspelt += drawn is None
        return None if drawn is None else before + drawn

    def report(self) -> None:
        if self._cut:
            log.warning("%d texts were cut to %d tokens before scoring", self._cut, self._limit)
        if self._unspelt:
            log.warning(
                "%d responses were scored by their text: their %s do not say it in this tokenizer",
                self._unspelt, ids_key(self._data.output_key),
            )  # fmt: skip
