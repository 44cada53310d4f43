"""RLOO beside TRL's RLOOTrainer: same start, reward function, prompts, batch, learning rate, KL coefficient and seeds.

    bash scripts/bench/setup_peers.sh                                # once: TRL into .venv-peers
    bash scripts/evidence.sh --quick                                 # models and data, if they are not there
    .venv/bin/python -m scripts.evidence.beside_trl --folder results/evidence_quick

Both train on VADER's sentiment, one after the other, with all cores. Results are in <folder>/beside_trl: summary.md,
figure.png, ours_seed<n>.jsonl and trl_seed<n>.jsonl, {step, reward, seconds}. A run that is there is not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_aligner.children import dying_with_parent
from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.data.jsonl import load_rows, write_jsonl
from nemo_aligner.errors import ConfigError
from nemo_aligner.files import write_atomically
from scripts.evidence.cells import VADER
from scripts.evidence.commands import CommandError, run
from scripts.evidence.estimates import Interval, over
from scripts.evidence.page import banded
from scripts.evidence.words import shown
from scripts.quickstart.report import save

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
PRODUCTS = {"ours": "NeMo-Aligner", "trl": "TRL"}
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """What both are given."""

    steps: int
    prompts_a_step: int
    samples: int
    tokens: int
    lr: float
    kl_penalty: float

    @property
    def rows(self) -> int:
        """Prompts: each is seen once."""
        return self.steps * self.prompts_a_step


def ours(settings: Settings, seed: int, folder: Path, target: Path) -> None:
    """Our actor; Adam and its schedule as the peer's."""
    logs = target.with_suffix("")
    prompts = logs.parent / "prompts.jsonl"
    if not (logs / "done").exists():
        run(
            logs, "train", "reinforce", f"reward_function={VADER}",
            f"model.data.data_prefix={{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
            f"pretrained_checkpoint.restore_from_path={folder / 'sft_model.nemo'}", f"model.seed={seed}",
            f"exp_manager.explicit_log_dir={logs}", "trainer.precision=bf16-mixed", "trainer.ppo.baseline=RLOO",
            f"trainer.ppo.initial_policy_kl_penalty={settings.kl_penalty}", f"trainer.ppo.max_steps={settings.steps}",
            "trainer.ppo.val_check_interval=100000", "trainer.ppo.save_interval=0", "model.ppo.num_val_samples=1",
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=False",
            f"model.ppo.num_rollout_samples={settings.prompts_a_step}",
            f"model.ppo.num_rollout_per_prompt={settings.samples}", "model.micro_batch_size=32",
            f"model.global_batch_size={settings.prompts_a_step * settings.samples}",
            "model.ppo.rollout_micro_batch_size=64", "model.ppo.forward_micro_batch_size=64",
            f"model.ppo.length_params.max_length={settings.tokens}", "model.ppo.length_params.min_length=0",
            "~model.optim.sched", f"model.optim.lr={settings.lr}", "model.optim.weight_decay=0",
            "model.optim.betas=[0.9,0.999]",
        )  # fmt: skip
        (logs / "done").touch()
    rows: Curve = []
    seconds = 0.0
    for row in map(json.loads, (logs / "metrics.jsonl").read_text().splitlines()):
        if "train_rollouts/rewards" in row:
            rows.append({"step": row["step"], "reward": row["train_rollouts/rewards"]})
        if "timers/train_time" in row:
            seconds += row["timers/rollout_time"] + row["timers/train_time"]
            rows[-1]["seconds"] = seconds
    write_jsonl(target, rows)


def trl(settings: Settings, seed: int, folder: Path, target: Path) -> None:
    """TRL's trainer, on the exported start model."""
    model = folder / "beside_trl" / "hf"
    if not model.exists():
        run(target.parent, "export", "export", "--input", folder / "sft_model.nemo", "--output", model)
    function, _, _ = VADER.rpartition(":")
    given = {
        **asdict(settings), "rows": settings.rows, "seed": seed, "model": str(model), "output": str(target),
        "function": function, "prompts": str(target.parent / "prompts.jsonl"),
    }  # fmt: skip
    packages = target.parent / "packages"  # what the reward function imports, for an environment that lacks it
    packages.mkdir(exist_ok=True)
    spec = importlib.util.find_spec("vaderSentiment")
    assert spec is not None, "evidence.sh has installed it"
    if not (packages / spec.name).exists():
        (packages / spec.name).symlink_to(Path(str(spec.origin)).parent)
    worker, log = Path(__file__).with_name("trl_worker.py"), target.with_suffix(".log")
    with log.open("wb") as stream:
        done = subprocess.run(
            [PEERS, worker, "--settings", json.dumps(given)], stdout=stream, stderr=stream,
            env={**os.environ, "PYTHONPATH": str(packages)}, preexec_fn=dying_with_parent(),
        )  # fmt: skip
    if done.returncode:
        raise CommandError(f"TRL ended with {done.returncode}; see {log}")


def smooth(curve: Curve, window: int) -> list[float]:
    """The mean of each step's reward and those up to `window` − 1 before it."""
    rewards = [row["reward"] for row in curve]
    return [statistics.fmean(rewards[max(0, i - window + 1) : i + 1]) for i in range(len(rewards))]


def bands(curves: Sequence[Curve], window: int) -> list[Interval]:
    """Of each step, over the seeds."""
    smoothed = [smooth(curve, window) for curve in curves]
    return [over([{"": value} for value in values]) for values in zip(*smoothed, strict=True)]


def seconds_to(target: float, means: Sequence[float], curves: Sequence[Curve]) -> float | None:
    """When the mean curve reaches `target`, in the seconds of the mean run; None where it does not."""
    for step, value in enumerate(means):
        if value >= target:
            return statistics.fmean(curve[step]["seconds"] for curve in curves)
    return None


def sentences(found: dict[str, list[Curve]], window: int) -> list[str]:
    """What the curves support."""
    curves = {name: bands(own, window) for name, own in found.items()}
    pairs = zip(curves["ours"], curves["trl"], strict=True)
    below = [step for step, (own, peer) in enumerate(pairs, start=1) if own.mean < peer.low]
    steps = len(curves["ours"])
    said = [
        f"Reward of training, running mean of {window} steps, at the end: "
        + ", ".join(f"{PRODUCTS[name]} {shown(band[-1])}" for name, band in curves.items())
        + ".",
        f"Our mean curve is within TRL's band or above it at {steps - len(below)} of {steps} steps"
        + (f"; below it at {', '.join(map(str, below))}." if below else "."),
    ]
    goal = min(band[-1].mean for band in curves.values())
    times = {name: seconds_to(goal, [v.mean for v in band], found[name]) for name, band in curves.items()}
    if all(times.values()):
        told = ", ".join(f"{PRODUCTS[name]} {value:.0f} s" for name, value in times.items())
        said.append(f"Time to a mean reward of {goal:+.2f}, which both reach: {told}.")
    return said


def figure(found: dict[str, list[Curve]], window: int, path: Path) -> None:
    """Running mean of the reward by step and by seconds, with bands over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, curves in found.items():
        band = bands(curves, window)
        steps = [row["step"] for row in curves[0]]
        seconds = [statistics.fmean(curve[i]["seconds"] for curve in curves) for i in range(len(steps))]
        for panel, x in zip(axes, (steps, seconds), strict=True):
            banded(panel, x, band, alpha=0.15, label=PRODUCTS[name])
    axes[0].set(xlabel="step", ylabel=f"reward of training (VADER), running mean of {window}")
    axes[1].set_xlabel("seconds of steps")
    axes[0].legend()
    drawn.tight_layout()
    save(drawn, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="one that evidence.sh has filled")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=8, help="of a step; each is seen once")
    parser.add_argument("--samples", type=int, default=8, help="responses to each")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--kl-penalty", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--window", type=int, default=5, help="steps of the running mean")
    args = parser.parse_args()

    if not PEERS.exists():
        raise ConfigError(f"{PEERS} is not there; bash scripts/bench/setup_peers.sh makes it")
    if args.seeds < 2:
        raise ConfigError(f"{args.seeds} makes no band; 2 or more do", "--seeds")
    settings = Settings(args.steps, args.prompts, args.samples, args.tokens, args.lr, args.kl_penalty)
    source = args.folder / "data" / "prompts.jsonl"
    prompts = load_rows(source, required={"input": "input"})[: settings.rows]
    if len(prompts) < settings.rows:
        raise ConfigError(f"{source} has {len(prompts)} prompts, {settings.rows} are needed", "--steps")
    folder = args.folder.resolve() / "beside_trl"
    made_with = json.dumps(asdict(settings)) + "\n"
    if (folder / "settings.json").exists() and (folder / "settings.json").read_text() != made_with:
        raise ConfigError(f"{folder} was made with other settings, {folder / 'settings.json'}; remove it")
    write_atomically(folder / "settings.json", [made_with])
    write_jsonl(folder / "prompts.jsonl", prompts)
    found: dict[str, list[Curve]] = {"ours": [], "trl": []}
    for seed in range(1, args.seeds + 1):
        for name, train in (("ours", ours), ("trl", trl)):
            target = folder / f"{name}_seed{seed}.jsonl"
            if not target.exists():
                train(settings, seed, args.folder.resolve(), target)
            found[name].append(list(load_rows(target, required={})))
            print(f"seed {seed}: {PRODUCTS[name]}, {found[name][-1][-1]}", flush=True)
    said = sentences(found, args.window)
    figure(found, args.window, folder / "figure.png")
    write_atomically(folder / "summary.md", [f"- {sentence}\n" for sentence in said])
    print("\n".join(said))


if __name__ == "__main__":
    with one_line_errors():
        main()
