"""scripts/evidence.sh: the whole of it on a tiny model, killed on its way."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.functional.conftest import ENV, ROOT, Workshop, run, wait_for

METHODS = ("rs_n2_i1", "rloo_k2")
COMMAND = ("bash", "scripts/evidence.sh", "--tiny", "--methods", ",".join(METHODS))


def test_a_comparison_that_was_killed_goes_on_and_ends_with_table_figure_and_page(
    workshop: Workshop, tmp_path: Path
) -> None:
    there = {
        "sft_model": "sft_model",
        "backbone": "sft_model",
        "reward_model": "reward_model",
        "gold_model": "reward_model",
    }
    for name, made in there.items():  # what is there is not made again
        os.link(workshop.path(f"{made}.nemo"), tmp_path / f"{name}.nemo")
    environment = {**ENV, "EVIDENCE_DIR": str(tmp_path)}
    runs = tmp_path / "runs"
    first = subprocess.Popen(COMMAND, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: first.poll() is not None or any(runs.glob("*/samples.jsonl")), 200)
    assert first.poll() is None, "it has ended by itself"
    first.kill()
    first.wait()
    ended = {path: path.stat().st_mtime_ns for path in runs.glob("*/samples.jsonl")}
    assert 1 <= len(ended) <= len(METHODS), "the kill came between the first run and the last"

    done = run(*COMMAND, EVIDENCE_DIR=str(tmp_path))
    assert f"{3 - len(ended)} of 3 runs are to be made" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in results} == {"start", *METHODS}
    last = {row["method"]: row for row in results}
    assert [last[name]["responses"] for name in METHODS] == [16, 16]
    assert all(last[name]["kl"] > 0 and 0 < last[name]["generated_tokens"] <= 16 * 6 for name in METHODS)
    head, _, *rows = (tmp_path / "summary.md").read_text().splitlines()
    assert head.startswith(
        "| method | responses | generated tokens | KL | reward | gold | vader | best-of-n at this KL |"
    )
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| RS, n = 2, 1 iteration", "| RLOO, k = 2"]
    assert (tmp_path / "report.html").read_text().endswith("</html>\n")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert not list(runs.glob("*/*/checkpoints")), "what is heavy is removed"


def test_a_comparison_of_other_settings_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("scale=full seed=1\n")
    found = run("bash", "scripts/evidence.sh", "--quick", EVIDENCE_DIR=str(tmp_path), check=False)
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: {tmp_path} was made with scale=full seed=1, this run has scale=quick ")
    assert [path.name for path in tmp_path.iterdir()] == ["settings"]
