"""What each aid of REINFORCE does: the same small runs with it and without, three seeds each, and one picture an aid.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench/aids.py --out results/bench/aids [max_kl kl_target ...]

A Llama of random weights over bytes is trained for rewards of `aids_rewards.py`, which takes seconds a run. A run that
is done is not done again; `--pictures FOLDER` says where pictures go (docs/images holds those of docs/methods.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REWARDS = ROOT / "scripts/bench/aids_rewards.py"
SEEDS = (1, 2, 3)
PROMPTS = ("the first prompt:", "a second one:", "and the third:", "one more:")
COMMON = (
    *("trainer.precision=32", "trainer.ppo.save_interval=0", "trainer.ppo.keep_rollouts=0", "~model.optim.sched"),
    *("model.optim.lr=3e-3", "model.optim.weight_decay=0.0", "model.ppo.num_rollout_samples=4"),
    *("model.ppo.num_rollout_per_prompt=16", "model.global_batch_size=64", "model.micro_batch_size=64"),
    *("exp_manager.create_tensorboard_logger=False", "exp_manager.checkpoint_callback_params.monitor=rewards"),
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=False",
)
LONG, SHORT = ("model.ppo.length_params.max_length=24",), ("model.ppo.length_params.max_length=16",)


@dataclass(frozen=True)
class Variant:
    """One way of training: what the legend calls it, its overrides, how its line looks."""

    label: str
    overrides: tuple[str, ...]
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Experiment:
    """Variants of one run, and what of them is drawn over its steps: (metric, title of the panel)."""

    steps: int
    overrides: tuple[str, ...]
    variants: tuple[Variant, ...]
    panels: tuple[tuple[str, str], ...]
    log_scale: tuple[str, ...] = field(default=())


def rewards(**functions: dict[str, Any]) -> str:
    """The override of `reward_function`: functions of `aids_rewards.py` by name, with their weights and arguments."""
    blocks = {name: {"function": f"{REWARDS}:{name}", **more} for name, more in functions.items()}
    return "reward_function=" + json.dumps(blocks).replace('"', "")


def beta(value: float) -> str:
    return f"trainer.ppo.initial_policy_kl_penalty={value}"


def ppo(**keys: Any) -> tuple[str, ...]:
    return tuple(f"trainer.ppo.{name}={value}" for name, value in keys.items())


KL = ("init_policy_kl", "KL to the initial policy (nats)")
LETTERS = ("reward_letters", "part of lower-case letters")
EXPERIMENTS = {
    "max_kl": Experiment(
        60,
        (rewards(letters={}, different_letters={"weight": 0}), beta(0), *SHORT),
        (
            Variant("no end (a budget never reached)", ppo(max_kl=1000), "tab:gray"),
            Variant("max_kl=20", ppo(max_kl=20), "tab:blue"),
        ),
        (
            KL,
            ("rewards", "reward trained for: letters"),
            ("reward_different_letters", "never trained for: different letters"),
        ),
    ),
    "kl_target": Experiment(
        120,
        (rewards(letters={}), *SHORT),
        (
            Variant("β = 0.005", (beta(0.005),), "tab:red", dashed=True),
            Variant("β = 0.1", (beta(0.1),), "tab:blue", dashed=True),
            Variant("from 0.005, kl_target=10", (beta(0.005), *ppo(kl_target=10, kl_horizon=128)), "tab:red"),
            Variant("from 0.1, kl_target=10", (beta(0.1), *ppo(kl_target=10, kl_horizon=128)), "tab:blue"),
        ),
        (KL, ("initial_policy_kl_penalty", "β (where it moves)"), LETTERS),
        log_scale=("initial_policy_kl_penalty",),
    ),
    "reward_clip_range": Experiment(
        100,
        (rewards(letters={}, outliers={"arguments": {"part": 0.05, "size": 10}}), beta(0.005), *SHORT),
        (
            Variant("as given", (), "tab:gray"),
            Variant("reward_clip_range=[0,1]", ppo(reward_clip_range=[0, 1]), "tab:blue"),
        ),
        (LETTERS, ("rewards", "mean reward as given"), ("rewards_clipped", "part of rewards clipped")),
    ),
    "whiten_rewards": Experiment(
        60,
        (beta(0.05), *SHORT),
        tuple(
            Variant(
                f"reward × {scale:g}, {'whitened' if white else 'as given'}",
                (rewards(letters={"weight": scale}), *(ppo(whiten_rewards=True) if white else ())),
                color,
                dashed=not white,
            )
            for white in (False, True)
            for scale, color in ((0.1, "tab:green"), (1.0, "tab:blue"), (10.0, "tab:red"))
        ),
        (LETTERS, KL),
    ),
    "overlong": Experiment(
        100,
        (
            *(rewards(many_letters={}), beta(0.005), *LONG),
            f"model.ppo.sampling_params.end_strings={json.dumps([*'0123456789']).replace(' ', '')}",
        ),
        (
            Variant("no length penalty", (), "tab:gray"),
            Variant(
                "over the last 16 of 24 tokens",
                ppo(overlong_buffer_length=16, overlong_buffer_penalty=3.0),
                "tab:blue",
            ),
        ),
        (
            ("generation_length", "tokens of a response"),
            ("rewards", "reward as given: a tenth a letter"),
            ("fraction_of_samples_properly_ended", "part that ended by itself"),
        ),
    ),
}


def aligner(command: str, *words: str) -> None:
    """`aligner <command> <words>`, in this process, so that nothing is imported twice."""
    sys.argv = [command, *words]
    import_module(f"nemo_aligner.commands.{command}").main()


def start_model(out: Path) -> Path:
    """The archive that every run begins from."""
    path = out / "start.nemo"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / "prompts.jsonl").write_text("".join(json.dumps({"input": text}) + "\n" for text in PROMPTS))
        aligner(
            *(
                "import_hf",
                "--random-init",
                "conf/model/tiny.yaml",
                "--dtype",
                "32",
                "--seed",
                "0",
                "--output",
                str(path),
            )
        )
    return path


def run(out: Path, experiment: Experiment, variant: Variant, seed: int, folder: Path) -> list[dict[str, float]]:
    """The figures of each step of a run, which is done if it has not been."""
    done = folder / "done"
    if not done.exists():
        aligner(
            *("reinforce", f"pretrained_checkpoint.restore_from_path={start_model(out)}", f"model.seed={seed}"),
            f"model.data.data_prefix={{train: [{out / 'prompts.jsonl'}]}}",
            *(f"trainer.ppo.max_epochs={experiment.steps}", f"exp_manager.explicit_log_dir={folder}"),
            *(*COMMON, *experiment.overrides, *variant.overrides),
        )
        done.touch()
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "train_rollouts/rewards" in row]


def draw(path: Path, experiment: Experiment, found: dict[str, list[list[dict[str, float]]]]) -> None:
    """A line for each seed of each variant, in as many panels as the experiment has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(experiment.panels), figsize=(4 * len(experiment.panels), 3.4))
    for axes, (name, title) in zip(panels, experiment.panels, strict=True):
        metric = f"train_rollouts/{name}"
        for variant in experiment.variants:
            for number, rows in enumerate(found[variant.label]):
                kept = [row for row in rows if metric in row]
                axes.plot(
                    [row["step"] for row in kept],
                    [row[metric] for row in kept],
                    *("--" if variant.dashed else "-",),
                    color=variant.color,
                    linewidth=1,
                    alpha=0.8,
                    label=None if number else variant.label,
                )
        axes.set(xlabel="step", title=title, yscale="log" if name in experiment.log_scale else "linear")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(3, len(labels))
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08 * -(-len(labels) // columns), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def table(experiment: Experiment, found: dict[str, list[list[dict[str, float]]]]) -> str:
    """The means of the last five steps of every seed, for the words that go with a picture."""
    lines = []
    for variant in experiment.variants:
        figures = []
        for name, _ in experiment.panels:
            metric = f"train_rollouts/{name}"
            ends = [[row[metric] for row in rows[-5:] if metric in row] for rows in found[variant.label]]
            figures.append(f"{name} " + " ".join(f"{sum(end) / len(end):.3g}" for end in ends if end))
        steps = " ".join(str(len(rows)) for rows in found[variant.label])
        lines.append(f"  {variant.label}: steps {steps}; " + "; ".join(figures))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("aids", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all where none is given")
    parser.add_argument("--out", type=Path, default=Path("results/bench/aids"))
    parser.add_argument("--pictures", type=Path, help="default: --out")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    for name in args.aids or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        found = {
            variant.label: [run(out, experiment, variant, s, out / name / str(i) / f"seed_{s}") for s in SEEDS]
            for i, variant in enumerate(experiment.variants)
        }
        draw((args.pictures or out) / f"aid_{name}.png", experiment, found)
        print(f"{name}\n{table(experiment, found)}", flush=True)


if __name__ == "__main__":
    main()
