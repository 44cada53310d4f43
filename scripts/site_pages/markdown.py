"""Cells of a table in Markdown, as Python-Markdown reads them: a pipe within code is no border there."""

from __future__ import annotations

import re


def cell(text: str) -> str:
    """A text with nothing in it that means something else."""
    return re.sub(r"([*_`|])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """A text as code; what cannot be printed is written as Python writes it."""
    printable = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return f"`` {printable} ``" if "`" in printable else f"`{printable}`"
