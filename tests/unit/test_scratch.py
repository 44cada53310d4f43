"""A temporary folder goes with its process, at the latest when the next one is made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner import scratch
from nemo_aligner.errors import OutputError
from nemo_aligner.scratch import remove_leftovers, scratch_folder, scratch_root

HOLDER = """
import sys, time
from pathlib import Path
from nemo_aligner.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])):
    Path(sys.argv[1], "file").write_text("content")
    print("made", flush=True)
    time.sleep(60)
"""


@pytest.mark.processes
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "own_a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        (tmp_path / "other_b").mkdir()
        (tmp_path / "own_c").write_text("no folder")
        (tmp_path / "own_d").symlink_to(tmp_path / "other_b")
        assert remove_leftovers(tmp_path, "own_") == []
        process.send_signal(signal.SIGKILL)
    assert remove_leftovers(tmp_path, "own_") == ["own_a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other_b", "own_c", "own_d"]


def test_only_its_user_enters_a_folder_and_nothing_of_it_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "own"):
        assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
        (tmp_path / "own" / "file").write_text("content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["flock", "open"])
def test_a_folder_that_another_process_takes_away_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    library = {"flock": scratch.fcntl, "open": scratch.os}[step]
    own, removed = getattr(library, step), []

    def late(*args: Any) -> Any:
        if not removed:
            removed.append((tmp_path / "own").rmdir())
        return own(*args)

    monkeypatch.setattr(library, step, late)
    with scratch_folder(tmp_path / "own"):
        assert (tmp_path / "own").is_dir()
        assert len(removed) == 1


def test_the_folders_of_other_users_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_a").mkdir()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert remove_leftovers(tmp_path, "own_") == []
    assert (tmp_path / "own_a").is_dir()


def test_no_place_for_it_is_one_line_that_names_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/no/own: No such file .*; set TMPDIR to another"),
        scratch_folder(tmp_path / "no" / "own"),
    ):
        pass
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "no")])
    with pytest.raises(OutputError, match=r"^No usable temporary directory found in .*; set TMPDIR to one$"):
        scratch_root()
