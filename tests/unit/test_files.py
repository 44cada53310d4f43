"""A file appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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


def test_the_text_is_on_the_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("folder" if path.is_dir() else f"text {path.read_text()}")

    def renamed(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", renamed)
    write_atomically(tmp_path / "out.txt", ["wh", "ole"])
    assert events == ["text whole", "rename", "folder"]
