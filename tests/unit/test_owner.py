"""An output has one owner at a time, however owners come and go."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner import owner
from nemo_aligner.errors import OutputError
from nemo_aligner.owner import lock_of, sole_owner

HOLDER = """
import sys, time
from pathlib import Path
from nemo_aligner.owner import sole_owner
with sole_owner(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_owner_is_refused_with_host_pid_and_start_of_the_first(tmp_path: Path) -> None:
    lock = lock_of(tmp_path / "new" / "out.jsonl")
    assert lock == tmp_path / "new" / "out.jsonl.lock"
    with sole_owner(lock):
        started = json.loads(lock.read_text())["started"]
        said = f"process {os.getpid()} on {socket.gethostname()}, started {started}, holds {lock}; wait for it to end"
        with pytest.raises(OutputError, match=f"^another run writes here: {re.escape(said)}"), sole_owner(lock):
            pass
        assert lock.exists(), "who was refused leaves the lock"
    assert not lock.exists()
    with sole_owner(lock):
        pass
    assert list(lock.parent.iterdir()) == []


def test_what_a_killed_owner_left_is_taken_over_and_removed(tmp_path: Path) -> None:
    lock = tmp_path / "out.lock"
    lock.write_text('{"host": "another", "pid": 1, "started": "2020-01-01"}\n' * 9)
    with sole_owner(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid(), "nothing is left of what it said before"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_its_owner_removes_meanwhile_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flock, times = tmp_path / "out.lock", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        times.append(descriptor)
        if len(times) == 1:
            lock.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_owner(lock):
        assert len(times) == 2
        with pytest.raises(OutputError), sole_owner(lock):
            pass


def test_the_children_of_a_killed_owner_may_end_their_last_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, gone = tmp_path / "out.lock", subprocess.Popen(["true"])
    gone.wait()
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "started": "now"}))
    child = os.open(lock, os.O_RDWR)
    fcntl.flock(child, fcntl.LOCK_EX)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "_LAST_WRITES_S", 0.1)
        with pytest.raises(OutputError, match=f"process {gone.pid} "), sole_owner(lock):
            pass
    monkeypatch.setattr("time.sleep", lambda _: os.close(child))
    with sole_owner(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_is_told_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), sole_owner(tmp_path / "out.lock"):
        pass
    assert len(caplog.messages) == 1
    assert "this file system has no locks" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/file/out\.lock: "),
        sole_owner(tmp_path / "file" / "out.lock"),
    ):
        pass


@pytest.mark.processes
def test_a_kill_gives_the_lock_back_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "out.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=f"process {holder.pid} "), sole_owner(lock):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with sole_owner(lock):
        pass
    assert list(tmp_path.iterdir()) == []
