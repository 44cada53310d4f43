"""Rewards that read the text alone: exact match, regular expression, length, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def exact_match(responses: Sequence[str], answer: Sequence[Any], ignore_case: bool = False) -> list[float | None]:
    """1 where the response is the row's `answer`, spaces around both left out; else 0.

    An answer is a text or a number, or a list of them of which any will do; None: cannot tell.
    """

    def plain(text: Any) -> str:
        text = str(text).strip()
        return text.casefold() if ignore_case else text

    def one(response: str, wanted: Any) -> float | None:
        if wanted is None:
            return None
        right = wanted if isinstance(wanted, list) else [wanted]
        return float(plain(response) in map(plain, right))

    return [one(response, wanted) for response, wanted in zip(responses, answer, strict=True)]


def regular_expression(responses: Sequence[str], pattern: str, whole: bool = False) -> list[float]:
    """1 where `pattern` (Python's `re`; flags as in `(?s)`) is found in the response, or with `whole` is all of it."""
    compiled = re.compile(pattern)
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(response) is not None) for response in responses]


def length_window(
    responses: Sequence[str], low: int = 0, high: int | None = None, margin: int = 0, unit: str = "words"
) -> list[float]:
    """1 for a length from `low` to `high`, falling in a straight line to 0 over `margin` beyond either.

    With d how far the length is outside the window: max(0, 1 − d/margin), and 0 where margin is 0. `unit`: words
    (parted by white space) or characters.
    """
    if unit not in ("words", "characters"):
        raise ValueError(f"unit={unit!r} is neither words nor characters")

    def one(response: str) -> float:
        length = len(response.split()) if unit == "words" else len(response)
        outside = max(low - length, 0 if high is None else length - high, 0)
        return 1.0 if outside == 0 else max(0.0, 1 - outside / margin) if margin else 0.0

    return [one(response) for response in responses]


def repetition_penalty(responses: Sequence[str], n: int = 3, penalty: float = -1.0) -> list[float]:
    """`penalty` × the part of the response's n-grams that it said before: penalty · (1 − distinct/all).

    Of words in lower case, parted by white space; 0 for a response of fewer than n words. After the n-gram repetition
    penalty of Yeo et al. 2025 (arXiv 2502.03373), counted over the whole response.
    """

    def one(response: str) -> float:
        words = response.lower().split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        return penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0

    return [one(response) for response in responses]
