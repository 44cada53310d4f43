"""Results folders as stages and loops leave them, without the models."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NASTY = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'> &amp; \u2028 {{data}} <!--"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def samples(prompts: int, n: int, gain: float = 0.0, seed: int = 0, **fields: Any) -> list[Row]:
    """n samples of each prompt; the reward of sample j of prompt i rises with j, and by `gain`."""
    draw = random.Random(seed)
    words = ["fine", "dull", "great", "slow", "bright", "odd"]
    return [
        {
            "input": f"prompt {i}: the film was",
            "output": " ".join(draw.choices(words, k=6)) + f" {i}.{j}",
            "reward": i / 10 + j + gain,
            **fields,
        }
        for i in range(prompts)
        for j in range(n)
    ]


def make_loop(folder: Path, iterations: int = 3, prompts: int = 5, n: int = 4) -> Path:
    """A loop that has ended, and an evaluation of its policies."""
    loop = folder / "loop"
    for i in range(iterations):
        rows = samples(prompts, n, gain=i, seed=i)
        write_rows(loop / "iterations" / f"{i}.jsonl", [{**row, "kept": k % n == n - 1} for k, row in enumerate(rows)])
        made = {"archive_sha256": f"hash {i}", "config": {"seed": i, "data": {"n": n}}, "versions": {"torch": "2"}}
        write_json(loop / "iterations" / str(i) / "sample.meta.json", made)
        write_rows(loop / "iterations" / str(i) / "metrics.jsonl", [{"step": s, "train/loss": 2.0 / s} for s in (1, 2)])
    write_rows(loop / "iterations.jsonl", [{"iteration": i, "reward_mean": 1.7 + i} for i in range(iterations)])
    (loop / "seconds.log").write_text("".join(f"{i} sample 5\n{i} label 2\n{i} train 9\n" for i in range(iterations)))
    policies = [f"policy_{i}" for i in range(iterations + 1)]
    for i, policy in enumerate(policies):
        rows = samples(prompts, n, gain=i / 2, seed=100 + i, kl=0.5 * i, num_tokens=12 - i)
        write_rows(folder / f"evaluation.json.{policy}.jsonl", rows)
    write_json(folder / "evaluation.json.meta.json", {"config": {"policy_files": policies}})
    write_json(folder / "evaluation.json", [evaluated(i, f"/x/{own}.nemo") for i, own in enumerate(policies)])
    write_json(folder / "evaluation.json.meta.json", {"config": {"data": {"n": n}}})
    return folder


def evaluated(place: int, policy: str) -> Row:
    """Figures of an evaluation, of the policy at `place`."""
    rate = 0.5 + place / 10
    compared = {
        "win_rate": rate,
        "win_rate_interval": [rate - 0.2, rate + 0.1],
        "win_rate_length_controlled": rate - 0.05,
    }
    return {
        "policy": policy,
        "reward_mean": 1.7,
        "distinct_1": 0.75,
        "distinct_2": None,
        "best_of": {"1": 1.7, "2": 2.5, "4": 3.0 + place},
        "pass_at": {"1": 0.25, "2": 0.5, "4": 0.75},
        **(compared if place else {}),
    }


def make_reinforce(folder: Path, steps: int = 4) -> Path:
    """An actor's log folder, with two reward functions."""
    for step in (0, steps // 2, steps):
        rows = [
            {**row, "kl": step / 4, "reward_exact": row["reward"] / 2, "reward_short": row["reward"] / 2}
            for row in samples(6, 4, gain=step / 4, seed=step)
        ]
        write_rows(folder / "validation" / f"step_{step}.jsonl", rows)
    for step in range(1, steps + 1):
        rows = samples(3, 4, gain=step / 4, seed=step, advantage=0.5, trained=True)
        write_rows(folder / "rollouts" / f"step_{step}.jsonl", rows)
    metrics = [
        {"step": step, f"{prefix}/{name}": value / step}
        for step in range(1, steps + 1)
        for prefix, name, value in (("train_rollouts", "entropy", 3.0), ("train_rollouts", "generation_length", 9.0),
                                    ("timers", "generate", 4.0), ("timers", "rollout_time", 5.0))
    ]  # fmt: skip
    write_rows(folder / "metrics.jsonl", metrics)
    config = {"model": {"seed": 7}, "exp_manager": {"wandb_api_key": "s3cret"}}
    write_json(folder / "run.json", {"started": "2026-01-01", "config": config, "versions": {"torch": "2"}})
    return folder
