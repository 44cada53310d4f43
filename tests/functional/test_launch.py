"""Whoever starts the ranks: when one of them dies the job ends, and its last lines say which one, and of what."""

from __future__ import annotations

import re
import time

import pytest

from tests.functional.conftest import run

SCRIPT = "tests/functional/a_rank_fails.py"
LAST_LINES = 30  # torchrun has a table of its own


def fails(how: str, *launcher: str, **env: str) -> list[str]:
    """The last lines of a job of which rank 1 ends that way, while rank 0 waits for it in a collective."""
    done = run(*launcher, SCRIPT, how, check=False, **env)
    end = time.time()
    assert done.returncode not in (0, 75)
    marked = re.search(r"ends at (\S+)", done.stderr)
    assert marked is not None, done.stderr
    assert end - float(marked[1]) < 60
    return done.stderr.splitlines()[-LAST_LINES:]


@pytest.mark.parametrize(
    ("how", "said"),
    [("kill", "rank 1 was ended by SIGKILL"), ("raise", "rank 1 failed: ValueError: a layer too many")],
)
def test_plain_python_ends_with_the_rank_that_failed_and_why(how: str, said: str) -> None:
    lines = fails(how, "python")
    assert lines[-1] == f"error: {said}"
    assert not [line for line in lines if "gloo" in line], "rank 0 says nothing of what it waited for in vain"


def test_plain_python_stops_early_with_a_rank_that_was_told_to_before_they_met() -> None:
    done = run("python", SCRIPT, "stop", check=False)
    assert done.returncode == 75
    assert done.stderr.splitlines()[-2:] == [
        "[rank 1] stopped early: SIGTERM; run the same command again to go on",
        "stopped early with rank 1; run the same command again to go on",
    ]


@pytest.mark.parametrize(
    ("how", "said"),
    [("kill", "Signal 9 (SIGKILL)"), ("raise", "rank 1 failed: ValueError: a layer too many")],
)
def test_torchrun_names_it_as_the_root_cause(how: str, said: str) -> None:
    text = "\n".join(fails(how, "torchrun", "--standalone", "--nproc-per-node=2"))
    _, _, cause = text.partition("Root Cause (first observed failure):")
    assert re.search(r"rank +: 1 \(local_rank: 1\)", cause), text
    assert said in cause


def test_ranks_that_are_told_to_meet_nowhere_are_refused() -> None:
    for port, said in (("0", "MASTER_PORT=0: no rank can be met there"), ("", "MASTER_PORT not; set them")):
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run("python", SCRIPT, "kill", check=False, **place)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
