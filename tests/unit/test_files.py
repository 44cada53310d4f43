"""A file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aligner.errors import OutputError
from nemo_aligner.files import write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    write_atomically(path, ["whole"])

    def broken():  # type: ignore[no-untyped-def]
        yield "half"
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, broken())
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]
