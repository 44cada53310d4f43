"""`aligner loop` runs all stages in one process, or one for each rank, and leaves what the shell loop leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from nemo_aligner.checksums import file_sum
from scripts.bench.crash_results import compare, results
from tests.functional.conftest import ENV, ROOT, Workshop
from tests.functional.test_documented import lines


def start(workshop: Workshop, folder: Path, ranks: int, *command: str, **more: str) -> subprocess.Popen[str]:
    """A loop of two iterations, in a folder of its own, so that the paths that it notes are those of every other."""
    folder.mkdir(exist_ok=True)
    stage, data = f"trainer.precision=32 trainer.devices={ranks}", "model.data.train_ds"
    # batches of two micro-batches: one rank and two ranks add the same two gradients
    settings = {
        "TRAINING_ITERS": "2", "ROLLOUT_BATCH_SIZE": "3", "RESULT_PATH": "loop",
        "PROMPTS_PATH": str(workshop.path("prompts_dataset.jsonl")),
        "POLICY_MODEL_PATH": str(workshop.path("sft_model.nemo")),
        "REWARD_MODEL_PATH": str(workshop.path("reward_model.nemo")),
        "SAMPLER_ARGS": f"data.n=3 inference.tokens_to_generate=6 {stage}",
        "LABELER_ARGS": stage,
        "SFT_ARGS": f"{data}.global_batch_size=2 {data}.micro_batch_size=1 model.hidden_dropout=0.1 "
        f"'{data}.prompt_template=\"{{input}}{{output}}\"' {stage}",
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=folder, env={**ENV, **settings, **more}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def kill_at(process: subprocess.Popen[str], line: str) -> None:
    """Kill all of its processes once it has printed `line`."""
    assert process.stdout is not None
    said = []
    for text in process.stdout:
        said.append(text)
        if text.strip() == line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert said[-1:] == [f"{line}\n"], said


def test_one_process_killed_and_started_again_leaves_what_one_process_for_each_stage_leaves(
    workshop: Workshop, tmp_path: Path
) -> None:
    shell = start(workshop, tmp_path / "shell", 1, "bash", str(ROOT / "scripts/online_rs.sh"))
    one = (sys.executable, "-m", "nemo_aligner", "loop", "rs")
    kill_at(start(workshop, tmp_path / "one", 2, *one), "== iteration 0: train")
    last = start(workshop, tmp_path / "one", 1, *one)
    said = last.communicate()[0]
    assert last.returncode == 0, said
    policy = "loop/checkpoints/megatron_gpt_sft.nemo is in memory already"
    assert [line for line in said.splitlines() if line.endswith("in memory already")] == [policy] * 2
    expected = shell.communicate()[0]
    assert shell.returncode == 0, expected
    assert "in memory" not in expected
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    whole = results(tmp_path / "shell", nothing)
    assert {"loop/iterations/1/metrics.jsonl", "loop/checkpoints/megatron_gpt_sft.nemo"} <= whole.keys()
    assert compare(whole, results(tmp_path / "one", nothing)).found == []


def test_rest_and_decision_transformer_run_in_one_process_and_read_no_weight_twice(
    workshop: Workshop, tmp_path: Path
) -> None:
    def loop(name: str, **more: str) -> subprocess.Popen[str]:
        return start(workshop, tmp_path / name, 1, sys.executable, "-m", "nemo_aligner", "loop", name, **more)

    least = 0.18  # about half of what the untrained model draws has a higher reward
    running = {"rest": loop("rest", TRAINING_ITERS="1", THRESHOLDS=f"-9 {least}"), "dt": loop("dt", TARGET_REWARD="2")}
    said = {name: process.communicate()[0] for name, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 0], said

    given, trained, judge = "sft_model.nemo", "megatron_gpt_sft.nemo", "reward_model.nemo"
    assert in_memory(said["rest"]) == [given, judge, trained], "the second improve step begins where the first ended"
    assert in_memory(said["dt"]) == [given, trained, judge, trained]

    rows = lines(tmp_path / "rest/loop/iterations/0.jsonl")
    made = json.loads((tmp_path / "rest/loop/iterations/0/label.meta.json").read_text())
    shutil.unpack_archive(workshop.path(judge), tmp_path / "judge", "tar")
    known = yaml.safe_load((tmp_path / "judge/model_config.yaml").read_text())["reward_standardization"]
    kept = [(row["reward"] - known["mean"]) / known["std"] >= least for row in rows]
    assert [row["kept"] for row in rows] == kept
    assert 0 < sum(kept) < len(rows)
    assert (made["config"]["processor"], made["config"]["threshold"]) == ("rest", least)
    logged = (
        lines(tmp_path / "rest/loop/iterations/0" / name) for name in ("metrics.jsonl", "improve_1/metrics.jsonl")
    )
    steps = [sum("train/loss" in row for row in rows) for rows in logged]
    assert steps == [math.ceil(count / 2) for count in (len(kept), sum(kept))], "each trains on what it keeps alone"

    asked = [json.loads((tmp_path / f"dt/loop/iterations/{i}/sample.meta.json").read_text()) for i in (0, 1)]
    assert [one["config"]["data"]["prompt_template"] for one in asked] == [None, "{input} <rm_score>: 2.0 "]
    assert all(row["kept"] for i in (0, 1) for row in lines(tmp_path / f"dt/loop/iterations/{i}.jsonl"))
    left = tmp_path / "dt/loop/checkpoints" / trained
    assert asked[1]["archive_sha256"] not in (asked[0]["archive_sha256"], file_sum(left)), "each iteration its policy"


def in_memory(said: str) -> list[str]:
    """Of which archives the weights were not read."""
    found = [line for line in said.splitlines() if line.endswith(" is in memory already")]
    return [Path(line.removesuffix(" is in memory already")).name for line in found]
