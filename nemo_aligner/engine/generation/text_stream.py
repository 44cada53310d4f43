"""The text of a response while it is drawn, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_aligner.data.token_texts import CONTEXT
from nemo_aligner.engine.generation.stopping import StopCondition
from nemo_aligner.engine.interfaces import Tokenizer


class TextStream:
    """What is given out is never taken back: all pieces together are the text that StopCondition.text_of gives.

    A token may be part of a character, and a decoder may treat the first token of a text otherwise. So new tokens are
    decoded together with some that came before, and what they add is taken once it ends in a whole character.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_strings: Sequence[str], prompt: Sequence[int] = (), min_tokens: int = 0
    ) -> None:
        self._tokenizer, self._stop = tokenizer, StopCondition(tokenizer, end_strings, min_tokens)
        self._prompt = list(prompt[-CONTEXT:])
        self._context, self._decoded = 0, len(self._prompt)  # of prompt and response: decoded from here, and up to here
        self._text = ""  # decoded so far
        self._early: list[str] | None = None  # StopCondition.early_texts, once they are known
        self._given = 0  # characters given out

    def more(self, response: Sequence[int]) -> str:
        """What the tokens of the response, all so far, add to the text."""
        tokens = [*self._prompt, *response]
        before = self._tokenizer.decode(tokens[self._context : self._decoded])
        after = self._tokenizer.decode(tokens[self._context :])
        if len(after) > len(before) and not after.endswith("\N{REPLACEMENT CHARACTER}"):
            self._text += after[len(before) :]
            self._context, self._decoded = self._decoded, len(tokens)
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

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece
