"""What is compared, and how large: every method draws the same number of responses from the same prompts.

`python -m scripts.evidence.methods SCALE` prints the options with which evidence.sh makes its data.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

IMPROVE = (0.0, 0.5, 1.0)
"""ReST's thresholds, in standard deviations of the reward model's own rewards."""

TARGET = 2.0
"""The reward that a decision transformer is asked for, in the same unit."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a comparison."""

    name: str
    seeds: int  # runs of each method
    responses: int  # that a method draws while it trains
    tokens: int  # of a response at most
    iterations: int  # of the offline methods that iterate
    few: int  # responses a prompt of rejection sampling, and
    many: int  # the same, more
    groups: tuple[int, ...]  # responses a prompt of RLOO
    held_out: int  # prompts
    held_out_n: int  # responses to each
    reference_n: int  # responses of the start model to each, for best-of-n
    sft_batch: int
    sft_lr: float
    step: int  # responses of a rollout step, and of an optimizer step
    actor_lr: float
    kl_penalty: float
    pairs: int  # that a reward model is trained on
    validations: int  # of a REINFORCE run, after step 0
    save_interval: int  # rollout steps between its checkpoints; 0: a run that was killed begins anew
    precision: str = "bf16-mixed"

    @property
    def prompts(self) -> int:
        """Prompts to train on: as many as the methods that draw the fewest responses a prompt at once can use."""
        return self.responses // self.few

    @property
    def data_options(self) -> list[str]:
        """Those of scripts/quickstart/make_data.py."""
        sizes = {
            "prompts": self.prompts,
            "held-out-prompts": self.held_out,
            "repeat-held-out": self.held_out_n,
            "pairs": self.pairs,
            "held-out-pairs": max(16, 3 * self.pairs // 16),
            "gold-pairs": self.pairs,
        }
        return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]

    @property
    def steps(self) -> int:
        """Rollout steps of a REINFORCE run."""
        return self.responses // self.step


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "full", seeds=3, responses=2560, tokens=12, iterations=5, few=4, many=16, groups=(2, 4, 8),
            held_out=64, held_out_n=4, reference_n=32, sft_batch=16, sft_lr=1e-4, step=128, actor_lr=5e-5,
            kl_penalty=0.1, pairs=1600, validations=4, save_interval=10,
        ),
        Scale(
            "quick", seeds=1, responses=480, tokens=12, iterations=2, few=4, many=16, groups=(2, 4, 8),
            held_out=48, held_out_n=2, reference_n=16, sft_batch=16, sft_lr=1e-4, step=80, actor_lr=5e-5,
            kl_penalty=0.1, pairs=1600, validations=2, save_interval=0,
        ),
        Scale(
            "tiny", seeds=1, responses=16, tokens=6, iterations=2, few=2, many=4, groups=(2, 4),
            held_out=8, held_out_n=2, reference_n=4, sft_batch=4, sft_lr=3e-3, step=8, actor_lr=1e-2,
            kl_penalty=0.1, pairs=64, validations=2, save_interval=1, precision="32",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One way to train, with the knobs that tell it from the others."""

    name: str
    title: str
    family: str  # rs, rest, dt or reinforce
    n: int  # responses a prompt
    iterations: int = 1  # of an offline method
    baseline: str = ""  # of REINFORCE

    @property
    def drawn(self) -> int:
        """Responses a prompt, with the greedy one that ReMax compares with."""
        return self.n + (self.baseline == "ReMax")


def methods(scale: Scale) -> list[Method]:
    """All that a comparison of this scale trains."""
    found = []
    for n in (scale.few, scale.many):
        for count in (1, scale.iterations):
            title = f"RS, n = {n}, {count} iteration{'s' if count > 1 else ''}"
            found.append(Method(f"rs_n{n}_i{count}", title, "rs", n, count))
    found.append(Method("rest", f"ReST, n = {scale.few}, 2 × {len(IMPROVE)}", "rest", scale.few, 2))
    found.append(Method("dt", f"DT, n = {scale.few}, asked for {TARGET:g}", "dt", scale.few))
    for k in scale.groups:
        found.append(Method(f"rloo_k{k}", f"RLOO, k = {k}", "reinforce", k, baseline="RLOO"))
    # of ReMax the greedy response is one of them
    found.append(Method("remax", f"ReMax, k = {scale.few - 1} + greedy", "reinforce", scale.few - 1, baseline="ReMax"))
    found.append(Method("none", f"no baseline, k = {scale.few}", "reinforce", scale.few, baseline="none"))
    return found


def contrasts(scale: Scale) -> list[tuple[str, str, str]]:
    """Questions that were there before the figures: (what differs, a method, the method it is compared with)."""
    few, many, i = scale.few, scale.many, scale.iterations
    small, k, large = scale.groups[0], scale.groups[1], scale.groups[-1]
    return [
        (f"{i} iterations instead of 1, n = {few}", f"rs_n{few}_i{i}", f"rs_n{few}_i1"),
        (f"{i} iterations instead of 1, n = {many}", f"rs_n{many}_i{i}", f"rs_n{many}_i1"),
        (f"n = {many} instead of {few}, 1 iteration", f"rs_n{many}_i1", f"rs_n{few}_i1"),
        (f"ReST instead of RS, n = {few}, 1 iteration", "rest", f"rs_n{few}_i1"),
        (f"DT instead of RS, n = {few}, 1 iteration", "dt", f"rs_n{few}_i1"),
        (f"RLOO with k = {large} instead of {small}", f"rloo_k{large}", f"rloo_k{small}"),
        (f"RLOO, k = {k}, instead of no baseline", f"rloo_k{k}", "none"),
        ("ReMax instead of no baseline", "remax", "none"),
        (f"RLOO, k = {k}, instead of RS, n = {few}, {i} iterations", f"rloo_k{k}", f"rs_n{few}_i{i}"),
    ]


if __name__ == "__main__":
    print(*SCALES[sys.argv[1]].data_options)
