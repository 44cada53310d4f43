"""When a response ends: EOS, an end string, or its length."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_aligner.algorithms.sampling import EOS_ALIAS
from nemo_aligner.data.token_texts import added_text
from nemo_aligner.engine.interfaces import Tokenizer


class StopCondition:
    """End strings of a sampling run, split into those that are one token and those that must be looked for in text.

    A text end string may span tokens and may begin inside one, so the decoded tail of the response is searched,
    a window long enough that no occurrence ending in the newest token can be missed.
    """

    def __init__(self, tokenizer: Tokenizer, end_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.stop_ids: set[int] = set(tokenizer.stop_ids)
        self._texts: list[str] = []
        for end in end_strings:
            ids = tokenizer.encode(end)
            if len(ids) == 1 and tokenizer.decode(ids) == "":
                self.stop_ids.add(ids[0])  # a special token: it never shows up in decoded text
            elif end and end != EOS_ALIAS:
                self._texts.append(end)
        self._may_complete: dict[int, bool] = {}  # of the tokens seen so far
        # a token decodes to at least one byte, so this many tokens hold the longest end string and one character more
        self._window = max((len(text.encode()) for text in self._texts), default=0) + 4

    def is_stop(self, response: Sequence[int]) -> bool:
        """True when the newest token of `response` ends it."""
        if response[-1] in self.stop_ids:
            return True
        if not self.may_end_in(response[-1]):
            return False
        tail = self._tokenizer.decode(response[-self._window :])
        return any(text in tail for text in self._texts)

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
            unclear = not text.strip() or "\N{REPLACEMENT CHARACTER}" in text
            known = unclear or any(end[-1] in text or end[-1].isspace() for end in self._texts)
            self._may_complete[token] = known
        return known

    def held_back(self, text: str) -> int:
        """How many characters at the end of `text` may yet turn out to be the beginning of an end string."""
        return max((_begun(text, end) for end in self._texts), default=0)

    def before_end(self, text: str) -> str:
        """`text` up to the first end string in it."""
        cuts = [at for at in (text.find(end) for end in self._texts) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def text_of(self, response: Sequence[int], prompt: Sequence[int] = ()) -> str:
        """What the response adds to the text of its prompt, without its stop token and up to the first end string."""
        kept = response[:-1] if response and response[-1] in self.stop_ids else response
        return self.before_end(added_text(self._tokenizer, prompt, kept))


def _begun(text: str, end: str) -> int:
    """How many characters at the end of `text` are the beginning of `end`, and not all of it."""
    at = text.find(end[0], max(0, len(text) - len(end) + 1))
    while at >= 0 and not end.startswith(text[at:]):
        at = text.find(end[0], at + 1)
    return 0 if at < 0 else len(text) - at
