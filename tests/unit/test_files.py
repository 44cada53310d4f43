"""A file appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.errors import OutputError
from nemo_aligner.files import refuse_overwriting, write_atomically


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


@pytest.mark.parametrize(
    "spelled", ["in.jsonl", "./in.jsonl", "d/../in.jsonl", "link", "hard", "ABSOLUTE", "d/up/in.jsonl"]
)
def test_an_input_is_not_written_over_however_its_path_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("{}")
    Path("link").symlink_to("in.jsonl")
    Path("hard").hardlink_to("in.jsonl")
    Path("d").mkdir()
    Path("d/up").symlink_to("..")
    path = spelled.replace("ABSOLUTE", str(tmp_path / "in.jsonl"))
    for output, given in ((path, "in.jsonl"), ("in.jsonl", path)):
        with pytest.raises(
            OutputError, match=rf"^o={output} is also an input, {given} \(data\.file_names\); give it another"
        ):
            refuse_overwriting(output, f"o={output}", {"model": [None, "m"], "data.file_names": ["other", given]})
    refuse_overwriting("other", "o=other", {"data.file_names": [path]})


def test_a_file_that_is_not_there_yet_is_one_file_under_two_spellings() -> None:
    refuse_overwriting("a.jsonl", "o=a.jsonl", {"k": ["b.jsonl", None]})
    with pytest.raises(OutputError):
        refuse_overwriting("a.jsonl", "o=a.jsonl", {"k": ["./a.jsonl"]})
