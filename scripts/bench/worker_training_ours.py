"""Our engine as a worker of scripts/bench/training.py: scores rows, or trains on them."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import products
import torch
import training_workloads
import workload

from nemo_aligner.algorithms.reinforce import baselines, sequence_kl
from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import GenerationRequest, Microbatch, Objective, Response
from nemo_aligner.engine.loading import start_for_archive
from nemo_aligner.engine.policy import MegatronPolicy, load_policy_for_training
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.engine.reward_model import load_reward_model_for_training
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.stages.batches import microbatches
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from nemo_aligner.stages.supervised.loop import ranking_objective, sft_objective

OPTIM = OptimConfig(name="adamw", lr=1e-6)
BUDGET = 2048
"""Tokens of a micro-batch."""
BETA = 0.05
"""Of the KL penalty."""

Clock = Callable[[], float]


class Run:
    """One workload; `__call__` does it once."""

    def __init__(self, model: MegatronTrainable, clock: Clock) -> None:
        self.model, self.clock = model, clock

    def __call__(self) -> dict[str, Any]:
        raise NotImplementedError

    def aside(self) -> dict[str, Any]:
        return {}

    def batches(self, examples: Sequence[Example]) -> list[Microbatch]:
        """One optimizer step's."""
        sizes = {"size": training_workloads.STEP_ROWS, "budget": BUDGET, "dp_rank": 0, "dp_size": 1}
        return microbatches(examples, range(len(examples)), **sizes, pad_id=self.model.tokenizer.pad_id)

    def products_fraction(self, examples: Sequence[Example], objective: Objective) -> dict[str, float]:
        """Seconds of one optimizer step, and of its matrix products alone."""
        with products.Products() as seen:
            self.model.train_step(self.batches(examples), objective)
        begin = self.clock()
        self.model.train_step(self.batches(examples), objective)
        return {"step_s": self.clock() - begin, "products_s": products.seconds(seen.calls, self.clock)}


class Labels(Run):
    """Rewards of rows."""

    def __init__(self, model: Any, work: dict[str, Any], clock: Clock) -> None:
        super().__init__(model, clock)
        self.rows, self.model = work["rows"], model
        head = model.module.rm_head
        with torch.no_grad():  # a head that the peer can have too
            head.weight.copy_(torch.linspace(-1, 1, head.weight.numel()).expand_as(head.weight))
            head.bias.zero_()
        model.module.eval()

    def __call__(self) -> dict[str, Any]:
        rewards = self.model.score(self.rows, 16)
        return {"value": sum(reward for [reward] in rewards) / len(rewards)}


class Supervised(Run):
    """Optimizer steps over all examples, STEP_ROWS of them at a time."""

    def __init__(self, model: MegatronTrainable, examples: list[Example], objective: Objective, clock: Clock) -> None:
        super().__init__(model, clock)
        self.examples, self.objective = examples, objective
        model.add_optimizer(OPTIM, clip_grad=1.0, max_steps=10**6)

    def __call__(self) -> dict[str, Any]:
        size = training_workloads.STEP_ROWS
        parts = [self.examples[start : start + size] for start in range(0, len(self.examples), size)]
        losses = [self.model.train_step(self.batches(part), self.objective).loss for part in parts]
        return {"value": sum(losses) / len(losses)}

    def aside(self) -> dict[str, Any]:
        return self.products_fraction(self.examples[: training_workloads.STEP_ROWS], self.objective)


class Reinforce(Run):
    """A whole step of RLOO: responses, the initial policy's log-probabilities, the update."""

    def __init__(self, model: MegatronPolicy, work: dict[str, Any], clock: Clock) -> None:
        super().__init__(model, clock)
        self.policy, self.prompts, samples = model, work["prompts"], work["samples"]
        self.sampling = SamplingParams(min_tokens=work["new_tokens"], max_tokens=work["new_tokens"])
        self.requests = [
            GenerationRequest(p, s, tuple(prompt)) for p, prompt in enumerate(self.prompts) for s in range(samples)
        ]
        self.examples: list[Example] = []
        model.keep_initial_weights()
        model.add_optimizer(OPTIM, clip_grad=1.0, max_steps=10**6)

    def __call__(self) -> dict[str, Any]:
        times = [self.clock()]
        responses = list(self.policy.generate(self.requests, self.sampling, max_slots=64))
        times.append(self.clock())
        rows = [self.prompts[r.prompt_index] + r.tokens for r in responses]
        starts = [len(self.prompts[r.prompt_index]) for r in responses]
        initial = self.policy.initial_logprobs(rows, 16, starts)
        times.append(self.clock())
        self.examples = self.weighted(responses, rows, starts, initial)
        metrics = self.model.train_step(self.batches(self.examples), reinforce_objective)
        times.append(self.clock())
        parts = [after - before for before, after in itertools.pairwise(times)]
        return {"value": metrics.loss, "generation_s": parts[0], "initial_logprobs_s": parts[1], "training_s": parts[2]}

    def weighted(
        self, responses: list[Response], rows: list[list[int]], starts: list[int], initial: list[torch.Tensor]
    ) -> list[Example]:
        """Rows with their advantages."""
        rewards = torch.tensor(
            [
                training_workloads.reward(r.tokens)
                - BETA * sequence_kl(torch.tensor(r.logprobs), before[start:], "k1", "sum")
                for r, before, start in zip(responses, initial, starts, strict=True)
            ]
        )
        groups = torch.tensor([r.prompt_index for r in responses])
        everyone = torch.ones(len(responses), dtype=torch.bool)
        advantages = rewards - baselines("RLOO", rewards, groups, None, everyone)
        return [
            Example((row,), ([0] * start + [1] * (len(row) - start),), float(advantage))
            for row, start, advantage in zip(rows, starts, advantages, strict=True)
        ]

    def aside(self) -> dict[str, Any]:
        return self.products_fraction(self.examples, reinforce_objective)


def make_run(key: str, work: dict[str, Any], args: argparse.Namespace, cluster: MegatronCluster) -> Run:
    overrides = ModelOverrides(restore_from_path=args.model, precision=args.dtype)
    trainer, clock = TrainerConfig(precision=args.dtype, accelerator="cpu"), workload.CLOCKS[args.clock]
    policy = functools.partial(load_policy_for_training, overrides, trainer, cluster)
    reward_model = functools.partial(
        load_reward_model_for_training, overrides, trainer, cluster, reward_model_type="binary_ranking"
    )
    if key.startswith("label"):
        return Labels(reward_model(), work, clock)
    if key == "sft":
        pairs = zip(work["rows"], work["prompts"], strict=True)
        examples = [Example((row,), ([0] * start + [1] * (len(row) - start),)) for row, start in pairs]
        return Supervised(policy(), examples, sft_objective, clock)
    if key == "rm":
        pairs = zip(work["rows"][0::2], work["rows"][1::2], strict=True)
        examples = [Example(pair, tuple([1] * len(row) for row in pair)) for pair in pairs]
        return Supervised(reward_model(), examples, ranking_objective, clock)
    return Reinforce(policy(), work, clock)


def main() -> None:
    args = training_workloads.parser().parse_args()

    torch.set_num_threads(args.threads)
    begin, work = time.perf_counter(), workload.load(args.workload)
    trainer = TrainerConfig(precision=args.dtype, accelerator="cpu")
    with start_for_archive(trainer, args.model, key="--model", seed=1) as cluster:
        run = make_run(args.key, work, args, cluster)
        workload.forget_loading()
        workload.serve(f"ours {args.dtype}", time.perf_counter() - begin, run, run.aside, args.clock)


if __name__ == "__main__":
    main()
