"""`aligner loop` runs all stages in one process, or one for each rank, and leaves what the shell loop leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from scripts.bench.crash_results import compare, results
from tests.functional.conftest import ENV, ROOT, Workshop


def start(workshop: Workshop, folder: Path, ranks: int, *command: str) -> subprocess.Popen[str]:
    """A loop of two iterations, in a folder of its own, so that the paths that it notes are those of every other."""
    folder.mkdir(exist_ok=True)
    stage, data = f"trainer.precision=32 trainer.devices={ranks}", "model.data.train_ds"
    # batches of two micro-batches: one rank and two ranks add the same two gradients
    settings = {
        "TRAINING_ITERS": "2", "ROLLOUT_BATCH_SIZE": "3", "RESULT_PATH": "loop", "OMP_NUM_THREADS": "1",
        "PROMPTS_PATH": str(workshop.path("prompts_dataset.jsonl")),
        "POLICY_MODEL_PATH": str(workshop.path("sft_model.nemo")),
        "REWARD_MODEL_PATH": str(workshop.path("reward_model.nemo")),
        "SAMPLER_ARGS": f"data.n=3 inference.tokens_to_generate=6 {stage}",
        "LABELER_ARGS": stage,
        "SFT_ARGS": f"{data}.global_batch_size=2 {data}.micro_batch_size=1 model.hidden_dropout=0.1 "
        f"'{data}.prompt_template=\"{{input}}{{output}}\"' {stage}",
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=folder, env={**ENV, **settings}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
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
