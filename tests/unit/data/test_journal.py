"""Every index ends up in the merge exactly once, whenever the writer was killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.data.journal import Journal
from nemo_aligner.errors import OutputError
from tests.fakes import OneProcess, RankOfSeveral, on_ranks

WRITER = """
import itertools
import sys
from types import SimpleNamespace
from nemo_aligner.data.journal import Journal
rank, size = int(sys.argv[2]), int(sys.argv[3])
cluster = SimpleNamespace(dp_rank=rank, is_main=True, speaks_for_replica=True, gather_ranks=lambda value: [value])
journal = Journal(sys.argv[1], {"seed": 1}, cluster)
print("begins", flush=True)
for i in itertools.count():
    if i % size == rank and i not in journal.done:
        journal.add(i, {"value": "x" * (i % 50), "i": i})
        journal.flush()
        print(i, flush=True)
"""


@pytest.mark.processes
def test_kill_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    output, rng = tmp_path / "out.jsonl", random.Random(0)
    promised: set[int] = set()
    for attempt in range(8):
        # the number of ranks changes between runs
        size = (1, 2)[attempt % 2]
        command = [sys.executable, "-c", WRITER, str(output), str(attempt // 2 % size), str(size)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        # it has no end; when a pipe of 64 KiB is full, it waits
        for _ in range(rng.randint(0, 60)):
            promised.add(int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, "it was killed while it wrote"
        promised |= {int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")}
        _leave_a_torn_line(tmp_path / "out.jsonl_temp" / f"rank_{attempt // 2 % size}.json", rng)
    journal = Journal(output, {"seed": 1}, OneProcess())
    lines = [line for path in journal.folder.glob("rank_*.json") for line in path.read_text().splitlines()]
    found = {entry["index"]: entry["row"] for entry in map(json.loads, lines)}
    assert all(row == {"value": "x" * (i % 50), "i": i} for i, row in found.items())
    assert promised <= found.keys() == journal.done, "what was flushed is there"
    assert len(lines) == len(found), "no index was written twice"
    assert len(promised) > 50


def _leave_a_torn_line(path: Path, rng: random.Random) -> None:
    """What a kill inside write() leaves, which a signal hits too rarely to rely on."""
    if path.exists():
        with path.open("ab") as stream:
            stream.write(b'{"index": 7777, "row": {"va'[: rng.randint(1, 26)])


@pytest.mark.parametrize("length", [1, 20, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("whole", [b"", b'{"index": 0, "row": {}}\n'])
def test_a_torn_line_of_any_length_is_cut_off_and_nothing_else(tmp_path: Path, length: int, whole: bytes) -> None:
    path = Journal(tmp_path / "o", {}, OneProcess()).folder / "rank_3.json"
    path.write_bytes(whole + (b'{"index": 1, "row": {"a": "' + b"x" * length)[:length])
    journal = Journal(tmp_path / "o", {}, OneProcess())
    assert path.read_bytes() == whole
    assert journal.done == ({0} if whole else set())


def test_whole_lines_are_left_as_they_are(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "o", {}, OneProcess())
    for index in range(3000):
        journal.add(index, {"text": "y" * 40})
    journal.flush()
    path = journal.folder / "rank_0.json"
    before = path.read_bytes()
    again = Journal(tmp_path / "o", {}, OneProcess())
    assert path.read_bytes() == before
    assert again.done == set(range(3000))
    again.add(3000, {})
    again.flush()
    assert path.read_bytes() == before + b'{"index": 3000, "row": {}}\n'


def test_rows_are_synced_to_the_disk_before_a_flush_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "o_temp" / "rank_0.json"
    journal = Journal(tmp_path / "o", {}, OneProcess())
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_bytes()))
    for index in range(2):
        journal.add(index, {})
        journal.flush()
        assert synced.pop() == path.read_bytes()
    journal.flush()
    assert synced == [], "nothing new, nothing to sync"
    assert len(path.read_text().splitlines()) == 2


def test_a_cut_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Journal(tmp_path / "o", {}, OneProcess()).folder / "rank_0.json"
    path.write_text("torn")
    sizes: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: sizes.append(path.stat().st_size))
    Journal(tmp_path / "o", {}, OneProcess())
    assert sizes == [0]


def test_only_the_rank_that_speaks_for_its_replica_writes(tmp_path: Path) -> None:
    silent = OneProcess()
    silent.speaks_for_replica = False
    journal = Journal(tmp_path / "o", {}, silent)
    journal.add(0, {})
    journal.flush()
    assert list(journal.folder.glob("rank_*.json")) == []


def test_a_fault_of_the_main_rank_is_raised_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "o_temp").write_text("a file where the folder should be")

    def opened(cluster: RankOfSeveral) -> str:
        with pytest.raises(OutputError) as fault:
            Journal(tmp_path / "o", {}, cluster)
        return str(fault.value)

    said = on_ranks(2, opened)
    assert said[0] == said[1]
    assert said[0].startswith(f"cannot write {tmp_path}/o_temp: ")


def test_a_journal_that_cannot_be_written_or_read_is_one_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "o", {}, OneProcess())
    (journal.folder / "rank_0.json").symlink_to("/dev/full")
    journal.add(0, {})
    with pytest.raises(OutputError, match=r"cannot write .*rank_0\.json: No space left"):
        journal.flush()
    (journal.folder / "rank_0.json").unlink()
    journal.flush()
    assert Journal(tmp_path / "o", {}, OneProcess()).done == {0}, "a failed flush forgets nothing"
    (journal.folder / "fingerprint.json").write_text("{")
    with pytest.raises(OutputError, match=r"fingerprint\.json: damaged .*; remove .*o_temp to start over"):
        Journal(tmp_path / "o", {}, OneProcess())


def test_rows_are_merged_in_order_of_their_index_over_all_ranks(tmp_path: Path) -> None:
    for rank in (1, 0):
        journal = Journal(tmp_path / "o", {}, OneProcess(rank, 2))
        for index in range(9, -1, -1):
            if index % 2 == rank:
                journal.add(index, {"i": index})
        journal.flush()
    assert [row["i"] for row in Journal(tmp_path / "o", {}, OneProcess()).merged(10)] == list(range(10))


def test_rows_that_somebody_removed_during_the_run_are_missed_before_a_row_is_given(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "o", {}, OneProcess())
    journal.add(0, {})
    journal.flush()
    (journal.folder / "rank_0.json").unlink()
    journal.add(1, {"i": 1})
    journal.flush()
    with pytest.raises(OutputError, match=r"o_temp: 1 of 2 rows are not there any more, .*; run the same command"):
        journal.merged(2)
    again = Journal(tmp_path / "o", {}, OneProcess())
    assert again.done == {1}
    again.add(0, {"i": 0})
    again.flush()
    assert list(again.merged(2)) == [{"i": 0}, {"i": 1}]


def test_rows_not_flushed_are_not_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "o", {}, OneProcess())
    journal.add(0, {})
    journal.flush()
    journal.add(1, {})
    assert Journal(tmp_path / "o", {}, OneProcess()).done == {0}


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"seed": 1, "data.n": 5}, r"data\.n was 4, now 5; remove that folder"),
        ({"seed": 1}, r"data\.n was 4, now None"),
        ({"seed": 1, "data.n": 4, "top_k": 3}, "top_k was None, now 3"),
        ({"seed": 2, "data.n": 4}, "seed was 1, now 2"),
    ],
)
def test_another_runs_progress_is_refused_with_the_key_that_changed(
    tmp_path: Path, now: dict[str, int], says: str
) -> None:
    made_with = {"seed": 1, "data.n": 4}
    Journal(tmp_path / "o", made_with, OneProcess())
    with pytest.raises(OutputError, match=says):
        Journal(tmp_path / "o", now, OneProcess())
    Journal(tmp_path / "o", made_with, OneProcess())


def test_a_row_that_the_run_does_not_have_is_damage_and_takes_no_memory(tmp_path: Path) -> None:
    path = Journal(tmp_path / "o", {}, OneProcess()).folder / "rank_0.json"
    path.write_text('{"index": 0, "row": {}}\n{"index": 999999999999999, "row": {}}\n')
    journal = Journal(tmp_path / "o", {}, OneProcess())
    assert journal.done == {0, 999999999999999}
    with pytest.raises(OutputError, match=r"rank_0\.json: row 999999999999999 of 1 at byte 24: damaged"):
        journal.merged(1)


@pytest.mark.parametrize("damage", ["rubbish\n", '{"index": -1}\n', '{"index": "1"}\n', '{"row": {}}\n', "[]\n"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path / "o", {}, OneProcess())
    (journal.folder / "rank_0.json").write_text('{"index": 0, "row": {}}\n' + damage)
    with pytest.raises(OutputError, match=r"rank_0\.json:2: damaged; remove that line"):
        Journal(tmp_path / "o", {}, OneProcess())
