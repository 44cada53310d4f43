"""Every index ends up in the merge exactly once, whenever the writer was killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_aligner.data.journal import Journal
from nemo_aligner.errors import OutputError
from tests.fakes import OneProcess

WRITER = """
import sys
from nemo_aligner.data.journal import Journal
from tests.fakes import OneProcess
rank, size = int(sys.argv[2]), int(sys.argv[3])
journal = Journal(sys.argv[1], {"seed": 1}, OneProcess(rank, size))
for i in range(3000):
    if i % size == rank and i not in journal.done:
        journal.add(i, {"value": "x" * (i % 50), "i": i})
        journal.flush()
print("complete", flush=True)
"""


@pytest.mark.processes
def test_kill_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    output, rng = tmp_path / "out.jsonl", random.Random(0)
    for attempt in range(60):
        # the number of ranks changes between runs; every rank of a size must get its turn in the end
        size = (1, 2)[attempt % 2]
        command = [sys.executable, "-c", WRITER, str(output), str(attempt // 2 % size), str(size)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        time.sleep(0.1 + rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        complete = "complete" in process.communicate()[0]
        if complete and size == 1:
            break
        _leave_a_torn_line(tmp_path / "out.jsonl_temp" / "rank_0.json", rng)
    journal = Journal(output, {"seed": 1}, OneProcess())
    merged = list(journal.merged())
    assert merged == [(i, {"value": "x" * (i % 50), "i": i}) for i in range(len(merged))] or not complete
    assert len({index for index, _ in merged}) == len(merged)
    lines = sum(len(p.read_text().splitlines()) for p in journal.folder.glob("rank_*.json"))
    assert lines == len(merged), "no index was written twice"
    assert len(merged) > 100


def _leave_a_torn_line(path: Path, rng: random.Random) -> None:
    """What a kill inside write() leaves, which the sleep above hits too rarely to rely on."""
    if path.exists():
        with path.open("ab") as stream:
            stream.write(b'{"index": 7777, "row": {"va'[: rng.randint(1, 26)])


def test_rows_are_merged_in_order_of_their_index_over_all_ranks(tmp_path: Path) -> None:
    for rank in (1, 0):
        journal = Journal(tmp_path / "o", {}, OneProcess(rank, 2))
        for index in range(9, -1, -1):
            if index % 2 == rank:
                journal.add(index, {"i": index})
        journal.flush()
    assert [index for index, _ in Journal(tmp_path / "o", {}, OneProcess()).merged()] == list(range(10))


def test_rows_not_flushed_are_not_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "o", {}, OneProcess())
    journal.add(0, {})
    journal.flush()
    journal.add(1, {})
    assert Journal(tmp_path / "o", {}, OneProcess()).done == {0}


def test_another_runs_progress_is_refused_with_the_key_that_changed(tmp_path: Path) -> None:
    Journal(tmp_path / "o", {"seed": 1, "data.n": 4}, OneProcess())
    with pytest.raises(OutputError, match=r"data\.n was 4, now 5; remove that folder"):
        Journal(tmp_path / "o", {"seed": 1, "data.n": 5}, OneProcess())


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "o", {}, OneProcess())
    (journal.folder / "rank_0.json").write_text('{"index": 0, "row": {}}\nrubbish\n')
    with pytest.raises(OutputError, match=r"rank_0\.json:2: damaged"):
        Journal(tmp_path / "o", {}, OneProcess())
