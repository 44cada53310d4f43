"""Whatever a reward function does to its process costs one response its reward, and nobody waits for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_aligner.config.rewards import RewardFunction
from nemo_aligner.errors import ConfigError, DataError, RewardError
from nemo_aligner.rewards import functions as module
from nemo_aligner.rewards.functions import Functions
from nemo_aligner.rewards.interfaces import Candidate, Outcome

pytestmark = pytest.mark.processes

RUDE = r"""
import os, signal, subprocess, sys, time

def does(responses, folder, **fields):
    return [one(response, folder) for response in responses]

def one(response, folder):
    print("what functions print is in nobody's way")
    if response == "hang":
        while True:
            time.sleep(60)
    if response == "hang with a child":
        note(folder, subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
        time.sleep(600)
    if response == "exit":
        os._exit(3)
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "sys.exit":
        sys.exit(4)
    if response == "raise":
        raise KeyError("of the\nfunction")
    if response == "fork and return":
        if os.fork() == 0:
            time.sleep(0.3)
            return -100.0
    if response == "fork and stay":
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(600)
        note(folder, pid)
    if response == "slow":
        time.sleep(0.8)
    if response == "nan":
        return float("nan")
    if response == "text":
        return "1.0"
    if response == "cannot tell":
        return None
    return float(len(response))

def two(responses):
    return [1.0, 2.0]

def note(folder, pid):
    with open(os.path.join(folder, "pids"), "a") as stream:
        stream.write(f"{pid}\n")
"""


@pytest.fixture
def rude(tmp_path: Path) -> Path:
    path = tmp_path / "rude.py"
    path.write_text(RUDE)
    return path


@pytest.fixture
def opened() -> Iterator[list[Functions]]:
    made: list[Functions] = []
    yield made
    for functions in made:
        functions.close()


def started(opened: list[Functions], path: Path, workers: int = 1, **settings: Any) -> Functions:
    settings = {"time_limit_s": 1.0, "arguments": {"folder": str(path.parent)}, **settings}
    opened.append(Functions([RewardFunction("mine", f"{path}:does", **settings)], workers))
    return opened[-1]


def judged(functions: Functions, *responses: str) -> list[Outcome]:
    candidates = [Candidate("p", text, where=f"rows:{i}") for i, text in enumerate(responses, 1)]
    return functions.source("mine").submit(candidates).result(timeout=50)


def noted(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


FAILURES = {
    "hang": "took longer than 1 s, and was killed",
    "exit": "ended its process (status 3)",
    "segfault": "ended its process (SIGSEGV)",
    "sys.exit": "SystemExit: 4",
    "raise": "KeyError: 'of the\\nfunction'",
    "nan": "ValueError: it returned nan for a reward; None says that it cannot tell",
    "text": "TypeError: it returned str '1.0' for a reward, not a number or None",
}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_response_that_breaks_the_function_loses_its_own_reward_alone_and_is_named(
    rude: Path, opened: list[Functions], caplog: pytest.LogCaptureFixture, batch_size: int
) -> None:
    responses = [text for bad in FAILURES for text in ("good", bad, "cannot tell")]
    found = judged(started(opened, rude, batch_size=batch_size), *responses)
    for place, (response, outcome) in enumerate(zip(responses, found, strict=True), 1):
        if response in FAILURES:
            assert outcome == Outcome(None, FAILURES[response])
            assert f"rows:{place}: reward function mine {FAILURES[response]}" in caplog.text
        else:
            assert outcome == Outcome(None if response == "cannot tell" else 4.0)


def test_what_a_function_leaves_behind_is_killed_whatever_session_it_went_to(
    rude: Path, opened: list[Functions], caplog: pytest.LogCaptureFixture
) -> None:
    functions = started(opened, rude)
    found = judged(functions, "fork and stay", "a", "hang with a child", "bb")
    assert [outcome.reward for outcome in found] == [13.0, 1.0, None, 2.0]
    assert "rows:1: reward function mine left processes behind, which are killed" in caplog.text
    pids = noted(rude.parent)
    assert len(pids) == 2
    assert all(map(is_gone, pids))


def test_a_copy_that_a_function_makes_of_its_process_does_not_answer(rude: Path, opened: list[Functions]) -> None:
    functions = started(opened, rude)
    found = judged(functions, *["fork and return", "a", "bb", "ccc"] * 3)
    assert [outcome.reward for outcome in found] == [15.0, 1.0, 2.0, 3.0] * 3
    time.sleep(0.5)
    assert judged(functions, "dddd") == [Outcome(4.0)]


def test_who_is_slow_is_named(rude: Path, opened: list[Functions], caplog: pytest.LogCaptureFixture) -> None:
    assert judged(started(opened, rude), "good", "slow") == [Outcome(4.0), Outcome(4.0)]
    assert "rows:2: reward function mine took 0." in caplog.text
    assert "rows:1" not in caplog.text


def test_other_ranks_say_so_where_it_is_seen(
    rude: Path, opened: list[Functions], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    judged(started(opened, rude), "raise")
    assert "[rank 3] rows:1: reward function mine KeyError" in capfd.readouterr().err


def test_a_function_that_returns_another_number_of_rewards_has_failed(rude: Path, opened: list[Functions]) -> None:
    opened.append(Functions([RewardFunction("mine", f"{rude}:two")], 1))
    assert judged(opened[0], "a") == [Outcome(None, "ValueError: it returned 2 rewards for 1 response")]


def test_workers_judge_side_by_side_and_answers_keep_their_order(rude: Path, opened: list[Functions]) -> None:
    functions = started(opened, rude, workers=3, time_limit_s=5.0)
    judged(functions, "a", "b", "c")
    begin = time.monotonic()
    found = judged(functions, "slow", "slow", "slow", "a", "bb")
    assert [outcome.reward for outcome in found] == [4.0, 4.0, 4.0, 1.0, 2.0]
    assert time.monotonic() - begin < 2.4


def test_a_function_that_fails_on_everything_ends_the_run_with_its_row_and_reason(
    rude: Path, opened: list[Functions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 3)
    functions = started(opened, rude)
    assert len(judged(functions, "raise", "raise", "good", "raise", "raise")) == 5, "a success begins the count anew"
    with pytest.raises(RewardError, match=r"^reward function mine \(.*rude.py:does\) failed on 3 .*rows:1: KeyError"):
        judged(functions, "raise")


def test_nobody_waits_for_a_function_once_told_to_stop(rude: Path, opened: list[Functions]) -> None:
    functions = started(opened, rude, time_limit_s=600.0)
    answer = functions.source("mine").submit([Candidate("p", "hang"), Candidate("p", "never begun")])
    time.sleep(0.3)
    begin = time.monotonic()
    functions.hurry()
    with pytest.raises(RewardError, match="told to stop"):
        answer.result(timeout=20)
    quick = started(opened, rude)
    quick.hurry()
    assert judged(quick, "good", "a") == [Outcome(4.0), Outcome(1.0)], "those that come at once are waited for"
    functions.close()
    assert time.monotonic() - begin < 15
    quick.close()
    assert not [child for child in psutil.Process(os.getpid()).children() if "rewards.worker" in str(child.cmdline())]


def test_fields_reach_the_parameters_that_want_them(tmp_path: Path, opened: list[Functions]) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "def pick(prompts, responses, wanted, low=5, **rest):\n"
        "    assert isinstance(low, int) or low == [None, 9]\n"
        "    assert prompts == ['p', 'q'] and rest.keys() == {'id'}, rest\n"
        "    return [float(w == r) + i for w, r, i in zip(wanted, responses, rest['id'])]\n"
    )
    function = RewardFunction("mine", f"{path}:pick", fields={"wanted": "answer"}, batch_size=2)
    opened.append(Functions([function], 1))
    rows = [Candidate("p", "x", {"answer": "x", "id": 10}), Candidate("q", "x", {"answer": "y", "id": 20})]
    assert opened[0].source("mine").submit(rows).result() == [Outcome(11.0), Outcome(20.0)]
    opened[0].check_fields(rows[0].fields, "rows.jsonl", 1)
    with pytest.raises(DataError, match=r"rows.jsonl:2: no field 'answer', which reward function mine needs; .*'id'"):
        opened[0].check_fields({"id": 1}, "rows.jsonl", 2)
    with pytest.raises(DataError, match=r"rows.jsonl:3: the field 'prompts' has a name that"):
        opened[0].check_fields({"answer": "a", "prompts": 1}, "rows.jsonl", 3)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("{folder}/absent.py:f", r"absent.py:f cannot be used: FileNotFoundError: .*no such file"),
        ("{folder}/rude.py:f", r"cannot be used: AttributeError: .* has no function 'f'; it has does, note, one, two"),
        ("{folder}/broken.py:f", r"cannot be used: SyntaxError"),
        ("{folder}/exits.py:f", r"cannot be used: SystemExit: 1"),
        ("no_such.module:f", r"cannot be used: ModuleNotFoundError: No module named 'no_such'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_clear_line(rude: Path, target: str, says: str) -> None:
    (rude.parent / "broken.py").write_text("def f(:\n")
    (rude.parent / "exits.py").write_text("import sys; sys.exit(1)\n")
    with pytest.raises(ConfigError, match=says):
        Functions([RewardFunction("mine", target.format(folder=rude.parent))], 1)


def test_another_file_or_constant_is_another_fingerprint(rude: Path, opened: list[Functions]) -> None:
    first = started(opened, rude).fingerprint()
    assert started(opened, rude, time_limit_s=9.0, weight=3.0, batch_size=7).fingerprint() == first
    assert started(opened, rude, arguments={"folder": "/"}).fingerprint() != first
    rude.write_text(f"{RUDE}\n# changed\n")
    assert started(opened, rude).fingerprint() != first
