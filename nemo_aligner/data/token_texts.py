"""Where one text goes on from another: its tokens there, and the text of tokens drawn there.

SentencePiece and its like set a blank before a text and drop the first one of what they decode. In the middle of a text
neither is so: after "the film" come "▁was ▁good", which say " was good".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

CONTEXT = 8
"""Tokens before a text that are decoded together with it, at most."""

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""What a vocabulary calls a token of one byte, for letters that it lacks."""

_FRONTS = ("|", "0", "~", "\n", "x")
"""Texts that may stand before another without becoming one token with its beginning."""


class TextTokenizer(Protocol):
    """The part of engine.interfaces.Tokenizer that texts need."""

    vocab_size: int
    bos_id: int | None
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def piece(self, token: int) -> str: ...


def continuation(tokenizer: TextTokenizer, before: Sequence[int], text: str) -> list[int]:
    """Token ids of `text` behind the tokens `before` it, which stay as they are; of a whole text where there are none.

    Behind a special token some tokenizers begin anew, so there the text is tokenized behind the same one.
    """
    if not (before and text and _treats_beginnings(cast(Hashable, tokenizer))):
        return tokenizer.encode(text)
    last = [before[-1]]
    special = [tokenizer.piece(last[0])] if tokenizer.decode(last) == "" else []
    for front in (*special, *_FRONTS):
        own, whole = tokenizer.encode(front), tokenizer.encode(front + text)
        if whole[: len(own)] == own and (front in _FRONTS or own == last):
            return whole[len(own) :]
    return tokenizer.encode(text)


@functools.lru_cache(maxsize=8)
def _treats_beginnings(tokenizer: Any) -> bool:
    """Whether the beginning of a text has other tokens than the same letters further on."""
    encode = tokenizer.encode
    return not any(encode(f"{front}was") == encode(front) + encode("was") for front in _FRONTS)


def added_text(tokenizer: TextTokenizer, before: Sequence[int], tokens: Sequence[int]) -> str:
    """What `tokens` add to the text of the tokens `before` them."""
    context = list(before[-CONTEXT:])
    shorter, whole = tokenizer.decode(context), tokenizer.decode([*context, *tokens])
    return whole[len(shorter) :] if whole.startswith(shorter) else tokenizer.decode(tokens)


def own_text(tokenizer: TextTokenizer, token: int) -> str:
    """What a token adds to a text that it stands in the middle of."""
    return _own_text(cast(Hashable, tokenizer), token)


@functools.lru_cache(maxsize=1 << 16)
def _own_text(tokenizer: Any, token: int) -> str:
    return added_text(tokenizer, tokenizer.encode(_FRONTS[-1])[-1:], [token])


def token_bytes(tokenizer: TextTokenizer, token: int) -> bytes:
    """The UTF-8 of a token's own text; of a part of a character as the vocabulary names it: <0xE6>, GPT-2's letters."""
    text, piece = own_text(tokenizer, token), tokenizer.piece(token)
    if "\N{REPLACEMENT CHARACTER}" in text:
        if _BYTE.fullmatch(piece):
            return bytes.fromhex(piece[3:5])
        letters = _byte_letters()
        if letters.keys() >= set(piece):
            return bytes(letters[letter] for letter in piece)
    return text.encode()


def spoiling_bytes(tokenizer: TextTokenizer) -> frozenset[int]:
    """The tokens of single bytes, <0x41>, where the decoder has no letter left of a run of them that is no UTF-8.

    So Hugging Face's byte fallback; SentencePiece's own leaves those letters that are whole.
    """
    return _spoiling_bytes(cast(Hashable, tokenizer))


@functools.lru_cache(maxsize=8)
def _spoiling_bytes(tokenizer: Any) -> frozenset[int]:
    found = {piece: token for token in range(tokenizer.vocab_size) if _BYTE.fullmatch(piece := tokenizer.piece(token))}
    some = found.get("<0x41>"), found.get("<0xFF>")
    return frozenset() if None in some or "A" in tokenizer.decode(some) else frozenset(found.values())


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The bytes by the letters of byte-level vocabularies: themselves where they can be seen, else from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + n): byte for n, byte in enumerate(unseen)}


def placed(tokenizer: TextTokenizer, before: Sequence[int], tokens: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Of each of `tokens` where it begins in the text that they add to the one `before` them, and what it adds alone.

    A part of a character begins where the character does, and adds nothing alone. Costs one look at each token's
    neighbours, however long the text is.
    """
    settled, pending, settled_end, begins = list(before[-CONTEXT:]), list[int](), 0, 0
    if not tokenizer.decode([*settled, *tokens]).startswith(tokenizer.decode(settled)):
        settled = []  # as added_text has it where the two meet inside a character
    for token in tokens:
        if own_text(tokenizer, token) == "":
            yield begins, ""
            continue
        pending.append(token)
        shorter, whole = tokenizer.decode(settled), tokenizer.decode([*settled, *pending])
        sure = whole if len(pending) == CONTEXT else whole.rstrip("\N{REPLACEMENT CHARACTER}")
        yield begins, whole[len(shorter) :] if len(pending) == 1 and sure == whole else ""
        begins = max(begins, settled_end + len(sure) - len(shorter))
        if sure == whole:
            settled, pending, settled_end = pending, [], begins


def spelling(tokenizer: TextTokenizer, before: Sequence[int], tokens: Sequence[int], text: str) -> list[int] | None:
    """As many of `tokens`, from the first on, as say `text` behind those `before` them; None where none do.

    What has no text, as the token that ends a response, is left out at the end.
    """
    for end in range(len(tokens), -1, -1):
        found = added_text(tokenizer, before, tokens[:end])
        if found == text:
            while end and tokenizer.decode([tokens[end - 1]]) == "":
                end -= 1
            return list(tokens[:end])
        if len(found) < len(text):
            break
    return None


def ids_key(text_key: str) -> str:
    """The field of a row that holds the tokens of its field `text_key`, as a policy drew them."""
    return f"{text_key}_token_ids"


def drawn_tokens(
    row: Mapping[str, Any], text_key: str, text: str, before: Sequence[int], tokenizer: TextTokenizer
) -> list[int] | None:
    """The tokens that a policy drew for the field `text_key`, where the row has them and they say `text` here.

    They do not behind another text, or in the words of another tokenizer.
    """
    ids = row.get(ids_key(text_key))
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids):
        return None
    return ids if added_text(tokenizer, before, ids) == text else None
