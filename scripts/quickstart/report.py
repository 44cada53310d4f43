"""The quickstart's result as a table, summary.json, a plot and samples before and after."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.data.jsonl import load_rows, write_atomically
from nemo_aligner.errors import DataError

STAGES = ("sample", "label", "train")


def read_evaluation(folder: Path, iteration: int) -> dict[str, Any]:
    path = folder / f"evaluation_{iteration}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise DataError(f"cannot be read ({fault})", path) from None


def stage_seconds(folder: Path) -> dict[tuple[int, str], int]:
    """Seconds of each (iteration, stage); a stage run twice after a kill counts twice."""
    log = folder / "online_rs" / "seconds.log"
    seconds: dict[tuple[int, str], int] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        iteration, stage, spent = line.split()
        key = (int(iteration) + 1, stage)
        seconds[key] = seconds.get(key, 0) + int(spent)
    return seconds


def table(rows: list[dict[str, Any]]) -> str:
    """Fixed-width text, one line an iteration."""
    head = ("iteration", "reward", "std", "KL (nats)", "length", *(f"{stage} (s)" for stage in STAGES))
    lines = ["  ".join(f"{name:>10}" for name in head)]
    for row in rows:
        figures = (row["reward_mean"], row["reward_std"], row["kl"], row["response_length"])
        spent = ["-" if row["seconds"].get(stage) is None else str(row["seconds"][stage]) for stage in STAGES]
        cells = [str(row["iteration"]), *(f"{figure:.3f}" for figure in figures), *spent]
        lines.append("  ".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def samples_text(folder: Path, last: int, count: int = 5) -> str:
    """The same prompts before and after, in Markdown."""
    parts = ["# Samples on held-out prompts\n"]
    before, after = (
        load_rows(folder / f"evaluation_{i}.json.samples.jsonl", required={"input": "input", "output": "output"})
        for i in (0, last)
    )
    step = max(1, len(before) // count)
    for old, new in list(zip(before, after, strict=True))[::step][:count]:
        opening = old["input"].split("<|im_end|>")[0].removeprefix("<|im_start|>user\n")
        parts.append(f"\n**{opening}**")
        parts += [
            f"- {name} ({row['reward']:+.2f}): {' '.join(row['output'].split())}"
            for name, row in (("before", old), ("after", new))
        ]
    return "\n".join(parts) + "\n"


def plot(folder: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    iterations = [row["iteration"] for row in rows]
    spread = [row["reward_std"] / row["samples"] ** 0.5 for row in rows]
    axes.errorbar(iterations, [row["reward_mean"] for row in rows], yerr=spread, marker="o", capsize=4)
    axes.set(xlabel="iteration of rejection sampling", ylabel="mean reward, held-out prompts (± standard error)")
    axes.set_xticks(iterations)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(iterations, [row["kl"] for row in rows], color="gray", linestyle=":", marker=".")
    right.set_ylabel("KL to the start model (nats per response, dotted)")
    figure.tight_layout()
    partial = folder / ".reward.partial.png"
    figure.savefig(partial, dpi=120)
    partial.replace(folder / "reward.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True, help="since the end of installation")
    args = parser.parse_args()

    spent = stage_seconds(args.folder)
    rows = []
    for iteration in range(args.iterations + 1):
        seconds = {stage: spent[iteration, stage] for stage in STAGES if (iteration, stage) in spent}
        rows.append({"iteration": iteration, **read_evaluation(args.folder, iteration), "seconds": seconds})
    first, last = rows[0], rows[-1]
    summary = {
        "reward_before": first["reward_mean"],
        "reward_after": last["reward_mean"],
        "reward_std_before": first["reward_std"],
        "kl_after": last["kl"],
        "seconds": args.seconds,
        "gain_in_std": (last["reward_mean"] - first["reward_mean"]) / first["reward_std"],
        "iterations": rows,
    }
    write_atomically(args.folder / "summary.json", [json.dumps(summary, indent=1), "\n"])
    text = samples_text(args.folder, args.iterations)
    write_atomically(args.folder / "samples.md", [text])
    plot(args.folder, rows)
    print(text)
    print(table(rows))
    print(f"\nreward +{summary['gain_in_std']:.2f} standard deviations in {args.seconds} s; see {args.folder}")


if __name__ == "__main__":
    with one_line_errors():
        main()
