"""transformers and TRL as a worker of scripts/bench/training.py: scores rows, or trains on them, as tuned."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import training_workloads
import workload
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

# The fastest of those tried on one thread, with the 24M Llama in bf16: budgets of 1024 and 2048, packs of 256 and 512
# tokens (`wrapped`, and `bfd` up to 1024), 4 to 16 rows a pass, `generate` and continuous batching.
BUDGET = 1024
"""Padded tokens of a batch to label."""
PACK = 256
"""Tokens of a packed row."""
PACKS, PAIRS, ROLLOUTS = 8, 4, 8
"""Rows of a forward and backward pass."""


class Labels:
    """Rewards of rows, sorted by length, in batches under a budget of padded tokens."""

    def __init__(self, path: str, work: dict[str, Any], dtype: torch.dtype) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype).eval()
        with torch.no_grad():  # a head that ours can have too
            model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.numel())[None])
        self.model, self.rows, self.pad = model, work["rows"], model.config.pad_token_id

    def __call__(self) -> dict[str, Any]:
        rows, found = self.rows, [0.0] * len(self.rows)
        for batch in self.batches():
            width = max(len(rows[i]) for i in batch)
            ids = torch.full((len(batch), width), self.pad)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : len(rows[i])] = torch.tensor(rows[i])
                mask[row, : len(rows[i])] = 1
            with torch.no_grad():
                rewards = self.model(ids, attention_mask=mask, use_cache=False).logits
            for row, i in enumerate(batch):
                found[i] = float(rewards[row, 0])
        return {"value": sum(found) / len(found)}

    def batches(self) -> list[list[int]]:
        made: list[list[int]] = [[]]
        for i in sorted(range(len(self.rows)), key=lambda i: -len(self.rows[i])):
            widest = len(self.rows[(made[-1] or [i])[0]])
            if made[-1] and widest * (len(made[-1]) + 1) > BUDGET:
                made.append([])
            made[-1].append(i)
        return made


class Steps(TrainerCallback):
    """The time of the training steps alone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.begin, self.seconds = clock, 0.0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = self.clock()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = self.clock() - self.begin


class Training:
    """A trainer of TRL; `__call__` trains once over its data."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]) -> None:
        self.trainer, self.steps = trainer, Steps(clock)
        trainer.add_callback(self.steps)

    def __call__(self) -> dict[str, Any]:
        found = self.trainer.train()
        return {"seconds": self.steps.seconds, "value": found.training_loss, "steps": found.global_step}


class OnTokens(RLOOTrainer):
    """Prompts are tokens: the dataset has their numbers."""

    prompts: list[list[int]]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompts[int(number)] for number in prompts], None, {}


def settings(dtype: torch.dtype, weights: torch.dtype) -> dict[str, Any]:
    """Of every trainer: nothing but training, activations kept; bf16 over float32 weights is by autocast."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": dtype != weights,
        "model_init_kwargs": {"dtype": weights},
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }


def sft(path: str, work: dict[str, Any], options: dict[str, Any]) -> Trainer:
    """Packed, as many optimizer steps as ours."""
    rows, prompts = work["rows"], work["prompts"]
    masks = [[0] * start + [1] * (len(row) - start) for row, start in zip(rows, prompts, strict=True)]
    steps = -(-len(rows) // training_workloads.STEP_ROWS)
    packs = -(-sum(map(len, rows)) // PACK)
    config = SFTConfig(
        **options,
        packing=True,
        packing_strategy="wrapped",
        max_length=PACK,
        completion_only_loss=True,
        per_device_train_batch_size=PACKS,
        gradient_accumulation_steps=max(1, round(packs / PACKS / steps)),
    )
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": masks})
    return SFTTrainer(path, config, train_dataset=data)


def rm(path: str, work: dict[str, Any], options: dict[str, Any]) -> Trainer:
    config = RewardConfig(
        **options,
        max_length=None,
        per_device_train_batch_size=PAIRS,
        gradient_accumulation_steps=training_workloads.STEP_ROWS // PAIRS,
    )
    data = Dataset.from_dict({"chosen_ids": work["rows"][0::2], "rejected_ids": work["rows"][1::2]})
    return RewardTrainer(path, config, train_dataset=data)


def rloo(path: str, work: dict[str, Any], options: dict[str, Any]) -> Trainer:
    """One step over all prompts."""
    prompts, samples, length = work["prompts"], work["samples"], work["new_tokens"]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert all(len(tokens) == length for tokens in completion_ids), "a response has another length than asked for"
        return [training_workloads.reward(tokens) for tokens in completion_ids]

    config = RLOOConfig(
        **options,
        beta=0.05,
        num_generations=samples,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        per_device_train_batch_size=ROLLOUTS,
        gradient_accumulation_steps=len(prompts) * samples // ROLLOUTS,
        pad_to_multiple_of=None,
    )
    data = Dataset.from_dict({"prompt": [str(number) for number in range(len(prompts))]})
    trainer = OnTokens(path, reward_funcs=reward, args=config, train_dataset=data)
    trainer.prompts = prompts
    return trainer


def main() -> None:
    parser = training_workloads.parser()
    parser.add_argument("--weights", choices=["same", "fp32"], required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    begin, work = time.perf_counter(), workload.load(args.workload)
    dtype = torch.float32 if args.dtype == "32" else torch.bfloat16
    run: Callable[[], dict[str, Any]]
    if args.key.startswith("label"):
        run = Labels(args.model, work, dtype)
    else:
        trainers = {"sft": sft, "rm": rm, "rloo_short": rloo, "rloo_long": rloo}
        options = settings(dtype, dtype if args.weights == "same" else torch.float32)
        run = Training(trainers[args.key](args.model, work, options), workload.CLOCKS[args.clock])
    workload.forget_loading()
    workload.serve(f"peer {args.dtype}", time.perf_counter() - begin, run, clock=args.clock)


if __name__ == "__main__":
    main()
