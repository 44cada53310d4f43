r"""Rewards for mathematics: the answer in `\boxed{}`, compared as mathematics and not as text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from nemo_aligner.extras import install

try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError as fault:
    raise ImportError(f"{fault}; {install('math')}") from None

# it warns of having no limits of its own: those of the process are for the whole of a response
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOXES = ("\\boxed{", "\\fbox{")


def boxed_answer(responses: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    r"""1 where what stands in the response's last `\boxed{}` equals the row's `answer`; 0 where not, or without one.

    Both are read as LaTeX or plain expressions and compared by math-verify (the extra [math]), so 1/2, 0.5 and
    `\frac{1}{2}` are one answer. `answer` is a text or a number; of a text with `\boxed{}` the last one counts. None
    where there is no answer, or none that can be read.
    """
    return [_judged(response, wanted) for response, wanted in zip(responses, answer, strict=True)]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` (or `\fbox`) whose braces close; None without one."""
    ends = sorted((text.rfind(box), box) for box in _BOXES)
    while ends:
        at, box = ends.pop()
        if at < 0:
            return None
        start, depth = at + len(box), 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0) if text[i - 1] != "\\" else 0
            if depth == 0:
                return text[start:i]
        ends = sorted([*ends, (text.rfind(box, 0, at), box)])
    return None


def _judged(response: str, answer: Any) -> float | None:
    if answer is None:
        return None
    text = str(answer)
    wanted = _read(last_boxed(text) or text)
    if not wanted:
        return None
    given = last_boxed(response)
    return 0.0 if given is None else float(_equal(wanted, _read(given)))


def _read(text: str) -> list[Any]:
    """What math-verify makes of an expression; empty where it makes nothing of it."""
    return list(
        parse(
            f"${text}$",
            [LatexExtractionConfig(), ExprExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
    )


def _equal(wanted: list[Any], given: list[Any]) -> bool:
    return bool(given) and bool(verify(wanted, given, timeout_seconds=None))
