"""When a response ends: EOS, an end string, or its length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nemo_aligner.algorithms.sampling import EOS_ALIAS
from nemo_aligner.data.token_texts import added_text, spoiling_bytes
from nemo_aligner.engine.interfaces import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of a part of a character, and some decoders of all the bytes before it."""
_BYTES = 4
"""Of a character, at most."""


def _shared(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with alike."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class StopCondition:
    """End strings of a sampling run, split into those that are one token and those that must be looked for in text.

    A text end string may span tokens and may begin inside one, so the decoded tail of the response is searched,
    a window long enough that no occurrence ending in the newest token can be missed. None counts that ends within the
    first `min_tokens` - 1 tokens: it is part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, end_strings: Sequence[str], min_tokens: int = 0) -> None:
        self._tokenizer, self.min_tokens = tokenizer, min_tokens
        self.stop_ids: set[int] = set(tokenizer.stop_ids)
        self._texts: list[str] = []
        self._spoiling = spoiling_bytes(tokenizer)
        for end in end_strings:
            ids = tokenizer.encode(end)
            if len(ids) == 1 and tokenizer.decode(ids) == "":
                self.stop_ids.add(ids[0])  # a special token: it never shows up in decoded text
            elif end and end != EOS_ALIAS:
                self._texts.append(end)
        self._may_complete: dict[int, bool] = {}  # of the tokens seen so far
        self._says: dict[int, bool] = {}  # whether a token has a text, which special ones have not
        # it has at least one byte, so this many that have one hold the longest end string and one character more
        self._window = max((len(text.encode()) for text in self._texts), default=0) + _BYTES

    def is_stop(self, response: Sequence[int], prompt: Sequence[int] = ()) -> bool:
        """True when the newest token of `response` ends it."""
        if len(response) < self.min_tokens:
            return False
        if response[-1] in self.stop_ids:
            return True
        if not self.may_end_in(response[-1]):
            return False
        start, text = self._tail(response, prompt)
        early = self._early(() if start else prompt, response[start:], self.min_tokens - 1 - start)
        return self.before_end(text, early) != text

    def _tail(self, response: Sequence[int], prompt: Sequence[int]) -> tuple[int, str]:
        """Where the window of `response` begins, and the text from there on."""
        first = start = self._window_start(response)
        if start == 0:  # a decoder may drop the blank before a text, but this one goes on from another
            return 0, added_text(self._tokenizer, prompt, response)
        text = self._tokenizer.decode(response[start:])
        # it begins inside a character
        while text.startswith(_BROKEN) and start < first + _BYTES - 1 and response[start] not in self._spoiling:
            start += 1
            text = self._tokenizer.decode(response[start:])
        return start, text

    def _window_start(self, response: Sequence[int]) -> int:
        """Where the last `_window` tokens that have a text begin, or the run of bytes that the first of them is in."""
        left = self._window
        for start in range(len(response) - 1, 0, -1):
            token = response[start]
            if token not in self._says:
                self._says[token] = self._tokenizer.decode([token]) != ""
            left -= self._says[token]
            if left <= 0 and self._says[token] and token not in self._spoiling:
                return start
        return 0

    def may_end_in(self, token: int) -> bool:
        """False for tokens that cannot complete a text end string, having nothing of its last character.

        Most cannot, and need no further look. Pieces of a character and blanks, which a decoder may treat otherwise
        by themselves, always may.
        """
        if not self._texts:
            return False
        known = self._may_complete.get(token)
        if known is None:
            text = self._tokenizer.decode([token])
            unclear = not text.strip() or _BROKEN in text
            known = unclear or any(end[-1] in text or end[-1].isspace() for end in self._texts)
            self._may_complete[token] = known
        return known

    def held_back(self, text: str) -> int:
        """How many characters at the end of `text` may yet turn out to be the beginning of an end string."""
        return max((_begun(text, end) for end in self._texts), default=0)

    def early_texts(self, response: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
        """The text of the first `min_tokens` - 1 tokens of `response`, behind which an end string has to end.

        Where they end inside a character, that of fewer tokens too: a decoder may have no other of all its letters.
        """
        return self._early(prompt, response, self.min_tokens - 1)

    def _early(self, before: Sequence[int], tokens: Sequence[int], count: int) -> list[str]:
        """As `early_texts`, of the first `count` of `tokens`."""
        texts: list[str] = []
        for n in range(count, max(0, count - _BYTES), -1) if self._texts else ():
            texts.append(added_text(self._tokenizer, before, tokens[:n]))
            if not texts[-1].endswith(_BROKEN):
                break
        return texts

    def before_end(self, text: str, early: Iterable[str] = ()) -> str:
        """`text` up to the first end string in it that ends behind the `early_texts`, with which it begins."""
        least = max((_shared(one, text) for one in early), default=0)
        found = (text.find(end, max(0, least + 1 - len(end))) for end in self._texts)
        cuts = [at for at in found if at >= 0]
        return text[: min(cuts)] if cuts else text

    def text_of(self, response: Sequence[int], prompt: Sequence[int] = ()) -> str:
        """What the response adds to the text of its prompt, without its stop token and up to the first end string."""
        kept = response[:-1] if response and response[-1] in self.stop_ids else response
        return self.before_end(added_text(self._tokenizer, prompt, kept), self.early_texts(kept, prompt))


def _begun(text: str, end: str) -> int:
    """How many characters at the end of `text` are the beginning of `end`, and not all of it."""
    at = text.find(end[0], max(0, len(text) - len(end) + 1))
    while at >= 0 and not end.startswith(text[at:]):
        at = text.find(end[0], at + 1)
    return 0 if at < 0 else len(text) - at
