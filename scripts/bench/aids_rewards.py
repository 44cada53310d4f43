"""Rewards of `aids.py`: cheap to judge, quick to learn by a model of random bytes, and easy to overdo."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def letters(responses: Sequence[str]) -> list[float]:
    """The part of a response that is lower-case ASCII."""
    return [sum(map(_is_letter, response)) / max(1, len(response)) for response in responses]


def many_letters(responses: Sequence[str]) -> list[float]:
    """A tenth for each lower-case ASCII letter: the longer the better."""
    return [sum(map(_is_letter, response)) / 10 for response in responses]


def different_letters(responses: Sequence[str]) -> list[float]:
    """Different lower-case ASCII letters for each character: what `letters` was meant to bring about."""
    return [len(set(filter(_is_letter, response))) / max(1, len(response)) for response in responses]


def outliers(responses: Sequence[str], part: float, size: float) -> list[float]:
    """`size` or −`size` for a `part` of all responses that has nothing to do with what they say; 0 for the others."""
    draws = [hashlib.sha256(response.encode()).digest() for response in responses]
    return [
        (size if draw[8] % 2 else -size) if int.from_bytes(draw[:8], "big") < part * 2**64 else 0.0 for draw in draws
    ]


def _is_letter(character: str) -> bool:
    return character.isascii() and character.islower()
