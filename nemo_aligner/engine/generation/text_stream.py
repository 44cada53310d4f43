"""The text of a response while it is drawn, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_aligner.data.token_texts import CONTEXT, added_text, own_text, spoiling_bytes
from nemo_aligner.engine.generation.stopping import StopCondition
from nemo_aligner.engine.interfaces import Tokenizer


class TextStream:
    """What is given out is never taken back: all pieces together are the text that StopCondition.text_of gives.

    A token may be part of a character, and a decoder may treat the first token of a text otherwise. So new tokens are
    decoded together with some that came before, and what they add is taken once it ends in a whole character that no
    byte after it may spoil.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_strings: Sequence[str], prompt: Sequence[int] = (), min_tokens: int = 0
    ) -> None:
        self._tokenizer, self._stop = tokenizer, StopCondition(tokenizer, end_strings, min_tokens)
        self._prompt = list(prompt[-CONTEXT:])
        self._spoiling = spoiling_bytes(tokenizer)
        self._context = self._decoded = 0  # of the response: decoded from here, and up to here
        self._text = ""  # decoded so far
        self._early: list[str] | None = None  # StopCondition.early_texts, once they are known
        self._given = 0  # characters given out

    def more(self, response: Sequence[int]) -> str:
        """What the tokens of the response, all so far, add to the text."""
        if not self._text:  # where it goes on from the prompt is for nobody else to say
            added = added_text(self._tokenizer, self._prompt, response)
        else:
            before = self._tokenizer.decode(response[self._context : self._decoded])
            added = self._tokenizer.decode(response[self._context :])[len(before) :]
        if added and not added.endswith("\N{REPLACEMENT CHARACTER}") and not self._may_be_spoilt(response):
            self._text += added
            self._context, self._decoded = self._decoded, len(response)
        safe = self._before_end(response)
        return self._give(len(safe) - self._stop.held_back(safe))

    @property
    def length(self) -> int:
        """Characters that the tokens so far add, those included that are not given out yet."""
        return len(self._text)

    def rest(self, text: str) -> str:
        """What is left of `text`, that of the finished response."""
        self._text = text
        return self._give(len(text))

    def _before_end(self, response: Sequence[int]) -> str:
        if len(response) < self._stop.min_tokens:
            return self._text
        if self._early is None:
            self._early = self._stop.early_texts(response, self._prompt)
        return self._stop.before_end(self._text, self._early)

    def _may_be_spoilt(self, response: Sequence[int]) -> bool:
        """Whether the last token with a text is a byte that the next may make unreadable."""
        if not self._spoiling:
            return False
        last = next((token for token in reversed(response) if own_text(self._tokenizer, token)), None)
        return last in self._spoiling

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece
