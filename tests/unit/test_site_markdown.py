"""What is put into a table's cell comes out of it as it was."""

from __future__ import annotations

import html
import re

import pytest

from scripts.site_pages.markdown import cell, code

markdown = pytest.importorskip("markdown")


@pytest.mark.parametrize("made", [cell, code])
@pytest.mark.parametrize("text", ["a | b", "<|endoftext|>", "*x* and _y_", "say `x`", "<b>", "a_b_c", "x"])
def test_a_cell_shows_its_text(text: str, made: object) -> None:
    assert callable(made)
    shown = markdown.markdown(f"| a | b |\n|---|---|\n| {made(text)} | end |", extensions=["tables"])
    cells = re.findall(r"<td>(.*?)</td>", shown)
    assert [html.unescape(re.sub(r"</?(code|td)>", "", one)) for one in cells] == [text, "end"]


def test_what_cannot_be_printed_is_written_as_python_does() -> None:
    assert code("\x11\n") == r"`\x11\n`"
