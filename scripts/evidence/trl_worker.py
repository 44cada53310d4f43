"""TRL's RLOOTrainer as beside_trl.py asks for it, in .venv-peers: a JSON line a step, {step, reward, seconds}."""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer

REWARD = "rewards/reward/mean"
"""What TRL logs of the function `reward` below; its own `reward` is that less the KL penalty."""


class Lines(TrainerCallback):
    """Writes what each step has logged, and the seconds since training began."""

    def __init__(self, path: Path) -> None:
        self.path, self.begin = path, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if REWARD in logs:
            row = {"step": state.global_step, "reward": logs[REWARD], "seconds": time.perf_counter() - self.begin}
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=json.loads, required=True)
    given = parser.parse_args().settings

    function = runpy.run_path(given["function"])["sentiment"]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return function(completions)

    rows = [json.loads(line)["input"] for line in Path(given["prompts"]).read_text().splitlines()][: given["rows"]]
    responses = given["prompts_a_step"] * given["samples"]
    output = Path(given["output"])
    output.unlink(missing_ok=True)
    config = RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=True,
        model_init_kwargs={"dtype": torch.float32},
        gradient_checkpointing=False,
        per_device_train_batch_size=min(32, responses),
        gradient_accumulation_steps=max(1, responses // 32),
        num_generations=given["samples"],
        max_completion_length=given["tokens"],
        max_steps=given["steps"],
        num_train_epochs=1,
        beta=given["kl_penalty"],
        learning_rate=given["lr"],
        lr_scheduler_type="constant",
        temperature=1.0,
        seed=given["seed"],
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RLOOTrainer(
        given["model"], reward_funcs=reward, args=config, train_dataset=Dataset.from_dict({"prompt": rows})
    )
    trainer.add_callback(Lines(output.with_suffix(".partial")))
    trainer.train()
    output.with_suffix(".partial").rename(output)


if __name__ == "__main__":
    main()
