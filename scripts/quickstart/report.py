"""A quickstart's result as a table, summary.json, a plot, and samples before and after."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.config.evaluation import policy_name
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.errors import DataError
from nemo_aligner.files import write_atomically

STAGES = ("sample", "label", "train")
PHASES = ("generate", "init_logprobs", "critic_wait", "train_time")


@dataclass(frozen=True)
class Result:
    """What a run has to show: one row for each policy that was evaluated, the first and last with their samples."""

    unit: str  # what the rows count
    rows: list[dict[str, Any]]  # {unit, reward_mean, reward_std, kl, response_length, samples, seconds: {...}, ...}
    samples_before: Path
    samples_after: Path

    @property
    def summary(self) -> dict[str, Any]:
        first, last = self.rows[0], self.rows[-1]
        return {
            "reward_before": first["reward_mean"],
            "reward_after": last["reward_mean"],
            "reward_std_before": first["reward_std"],
            "kl_after": last["kl"],
            "gain_in_std": spreads(last["reward_mean"] - first["reward_mean"], first["reward_std"]),
            "iterations": self.rows,
        }


def spreads(gain: float, spread: float) -> float | None:
    """A gain in standard deviations; None where there is no spread."""
    return gain / spread if spread else None


def offline_result(folder: Path) -> Result:
    """Online rejection sampling: evaluation.json holds one evaluation a policy."""
    path = folder / "evaluation.json"
    try:
        evaluations = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise DataError(f"cannot be read ({fault})", path) from None
    spent = stage_seconds(folder / "online_rs" / "seconds.log")
    rows = [
        {"iteration": i, **{k: v for k, v in found.items() if k != "policy"}, "seconds": spent.get(i, {})}
        for i, found in enumerate(evaluations)
    ]
    first, last = (
        folder / f"evaluation.json.{policy_name(e['policy'])}.jsonl" for e in (evaluations[0], evaluations[-1])
    )
    return Result("iteration", rows, first, last)


def stage_seconds(log: Path) -> dict[int, dict[str, int]]:
    """Seconds of each stage of each iteration, from 1; a stage run twice after a kill counts twice."""
    seconds: dict[int, dict[str, int]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        iteration, stage, spent = line.split()
        stages = seconds.setdefault(int(iteration) + 1, {})
        stages[stage] = stages.get(stage, 0) + int(spent)
    return seconds


def math_result(folder: Path) -> Result:
    """Sums: the policies before and after REINFORCE on held-out problems, where a reward is 1 for a right answer."""
    made = offline_result(folder)
    figures = [json.loads(line) for line in (folder / "actor" / "metrics.jsonl").read_text().splitlines()]
    spent = {phase: round(sum(row.get(f"timers/{phase}", 0.0) for row in figures)) for phase in PHASES}
    steps = max(int(row["step"]) for row in figures if "train_rollouts/rewards" in row)
    rows = [
        {**row, "step": step, "seconds": seconds}
        for row, step, seconds in zip(made.rows, (0, steps), ({}, spent), strict=True)
    ]
    return Result("step", rows, made.samples_before, made.samples_after)


def reinforce_result(folder: Path) -> Result:
    """REINFORCE: the actor's own validations."""
    logs = folder / "actor"
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for line in (logs / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        for phase in PHASES:
            seconds[phase] = seconds.get(phase, 0.0) + found.get(f"timers/{phase}", 0.0)
        if "val_rollouts/rewards" in found:
            value = {name.removeprefix("val_rollouts/"): number for name, number in found.items()}
            row = {
                "step": found["step"],
                "reward_mean": value["rewards"],
                "reward_std": value["rewards_std"],
                "kl": value["init_policy_kl"],
                "response_length": value["generation_length"],
                "entropy": value["entropy"],
                "samples": int(value["rollout_size"]),
                "seconds": {},
            }
            rows.append(row)
        elif rows and any(name.startswith("timers/") for name in found):
            rows[-1]["seconds"] = {phase: round(spent) for phase, spent in seconds.items()}
    first, last = (logs / "validation" / f"step_{row['step']}.jsonl" for row in (rows[0], rows[-1]))
    return Result("step", rows, first, last)


def table(result: Result) -> str:
    """Fixed-width text, one line a policy."""
    phases = list(dict.fromkeys(phase for row in result.rows for phase in row["seconds"]))
    figures = {"reward": "reward_mean", "std": "reward_std", "KL (nats)": "kl", "length": "response_length"}
    if "entropy" in result.rows[0]:
        figures["entropy"] = "entropy"
    head = (result.unit, *figures, *(f"{phase} (s)" for phase in phases))
    lines = ["  ".join(f"{name:>10}" for name in head)]
    for row in result.rows:
        spent = [str(row["seconds"].get(phase, "-")) for phase in phases]
        cells = [str(row[result.unit]), *(f"{row[key]:.3f}" for key in figures.values()), *spent]
        lines.append("  ".join(f"{cell:>{max(10, len(name))}}" for cell, name in zip(cells, head, strict=True)))
    return "\n".join(lines)


def samples_text(result: Result, count: int = 5) -> str:
    """The same prompts before and after, in Markdown."""
    parts = ["# Samples on held-out prompts\n"]
    before, after = (
        load_rows(path, required={"input": "input", "output": "output"})
        for path in (result.samples_before, result.samples_after)
    )
    step = max(1, len(before) // count)
    for old, new in list(zip(before, after, strict=True))[::step][:count]:
        prompt = old["input"].split("<|im_end|>")[0].removeprefix("<|im_start|>user\n")
        parts.append(f"\n**{prompt}**")
        parts += [
            f"- {name} ({row['reward']:+.2f}): {' '.join(row['output'].split())}"
            for name, row in (("before", old), ("after", new))
        ]
    return "\n".join(parts) + "\n"


def save(figure: Any, path: Path) -> None:
    """A figure of matplotlib as PNG, whole or not at all; it is closed."""
    from matplotlib import pyplot

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    write_atomically(path, [image.getvalue()])


def plot(result: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    at = [row[result.unit] for row in result.rows]
    spread = [row["reward_std"] / row["samples"] ** 0.5 for row in result.rows]
    means = [row["reward_mean"] for row in result.rows]
    reward = axes.errorbar(at, means, yerr=spread, marker="o", capsize=4, label="reward (± standard error)")
    axes.set(xlabel=result.unit, ylabel="mean reward on held-out prompts")
    axes.set_xticks(at)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    [kl] = right.plot(at, [row["kl"] for row in result.rows], color="gray", linestyle=":", marker=".", label="KL")
    right.set_ylabel("KL to the start model (nats a response)")
    axes.legend(handles=[reward, kl], loc="upper left")
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True, help="since the end of installation")
    parser.add_argument("--reinforce", action="store_true", help="of quickstart.sh --reinforce")
    parser.add_argument("--math", action="store_true", help="of quickstart.sh --math")
    args = parser.parse_args()

    read = math_result if args.math else reinforce_result if args.reinforce else offline_result
    result = read(args.folder)
    summary = {**result.summary, "seconds": args.seconds}
    write_atomically(args.folder / "summary.json", [json.dumps(summary, indent=1), "\n"])
    text = samples_text(result)
    write_atomically(args.folder / "samples.md", [text])
    plot(result, args.folder / "reward.png")
    print(text)
    print(table(result))
    if args.math:
        before, after = (f"{100 * row['reward_mean']:.1f} %" for row in (result.rows[0], result.rows[-1]))
        gain = f"{before} of held-out sums right before, {after} after"
    elif summary["gain_in_std"] is None:
        gain = f"reward {summary['reward_before']:.3g} before, without a spread, {summary['reward_after']:.3g} after"
    else:
        gain = f"reward {summary['gain_in_std']:+.2f} standard deviations"
    print(f"\n{gain}, in {args.seconds} s; look at {args.folder / 'report.html'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
