"""One run of one method: trained by the product's commands, then sampled on held-out prompts at several points of it.

A run ends with samples.jsonl, {method, seed, at, responses, generated_tokens, input, output, kl}: `at` counts the
points, from 1; what was drawn in training until then is counted; `kl` is Σ log π − log π₀ over the response's tokens.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner.data.jsonl import load_rows, write_jsonl
from scripts.evidence.commands import run
from scripts.evidence.methods import IMPROVE, TARGET, Method, Scale

VADER = f"{Path(__file__).with_name('vader.py')}:sentiment"
Row = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What all runs share: the folder that evidence.sh has filled, sizes, and where rewards are served."""

    folder: Path
    scale: Scale
    port: int

    @property
    def start(self) -> Path:
        return self.folder / "sft_model.nemo"

    @property
    def reward_model(self) -> Path:
        return self.folder / "reward_model.nemo"

    def data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.jsonl"


@dataclass(frozen=True)
class Cell:
    """A method with a seed."""

    method: Method
    seed: int
    inputs: Inputs

    @property
    def folder(self) -> Path:
        return self.inputs.folder / "runs" / f"{self.method.name}_seed{self.seed}"

    @property
    def samples(self) -> Path:
        """Appears whole, and last."""
        return self.folder / "samples.jsonl"

    def make(self) -> None:
        """Train and sample; what is there already is not made again. Raises CommandError, StoppedEarly."""
        if not self.samples.exists():
            points = self._actor_points() if self.method.family == "reinforce" else self._loop_points()
            own = {"method": self.method.name, "seed": self.seed}
            write_jsonl(self.samples, ({**own, **row} for row in points))
        for heavy in (self.folder / "policies", *self.folder.glob("*/checkpoints")):
            shutil.rmtree(heavy, ignore_errors=True)

    def _train_loop(self, kept: list[Path]) -> None:
        """An offline method; the policy of every iteration is kept."""
        method, scale, files = self.method, self.inputs.scale, self.inputs
        loop = self.folder / "loop"
        prompts = scale.responses // method.n // method.iterations
        precision = f"trainer.precision={scale.precision}"
        thresholds = {"THRESHOLDS": " ".join(f"{value:g}" for value in IMPROVE)} if method.family == "rest" else {}
        for i, policy in enumerate(kept, start=1):
            if policy.exists():
                continue
            run(
                self.folder, "train", "loop", method.family,
                TRAINING_ITERS=i, ROLLOUT_BATCH_SIZE=prompts, SEED=self.seed, RESULT_PATH=loop,
                PROMPTS_PATH=files.data("prompts"), POLICY_MODEL_PATH=files.start, REWARD_MODEL_PATH=files.reward_model,
                KEEP_SAMPLES=scale.responses, TARGET_REWARD=TARGET, **thresholds,
                SAMPLER_ARGS=shlex.join([
                    f"data.n={method.n}", "data.micro_batch_size=32", "data.export_metadata=True", precision,
                    f"inference.tokens_to_generate={scale.tokens}",
                ]),
                LABELER_ARGS=shlex.join(["data.micro_batch_size=64", precision]),
                SFT_ARGS=shlex.join([
                    'model.data.train_ds.prompt_template="{input}{output}"', "model.data.train_ds.add_eos=False",
                    f"model.data.train_ds.global_batch_size={scale.sft_batch}",
                    f"model.data.train_ds.micro_batch_size={scale.sft_batch}",
                    "~model.optim.sched", f"model.optim.lr={scale.sft_lr}", "trainer.sft.max_epochs=1",
                    "trainer.sft.save_interval=0", precision,
                ]),
            )  # fmt: skip
            os.link(loop / "checkpoints" / "megatron_gpt_sft.nemo", policy)

    def _loop_points(self) -> Iterator[Row]:
        """Every iteration of an offline method, sampled when the last is trained."""
        method, scale, loop = self.method, self.inputs.scale, self.folder / "loop"
        policies = self.folder / "policies"
        policies.mkdir(parents=True, exist_ok=True)
        kept = [policies / f"iteration_{i}.nemo" for i in range(1, method.iterations + 1)]
        evaluation = self.folder / "evaluation.json"
        if not evaluation.exists():
            self._train_loop(kept)
            asked = [f'data.prompt_template="{{input}} <rm_score>: {TARGET:.1f} "'] if method.family == "dt" else []
            evaluate(self.inputs, self.folder, kept, scale.held_out_n, self.seed, asked)
        drawn = [load_rows(loop / "iterations" / f"{i}.jsonl", required={}) for i in range(method.iterations)]
        responses = tokens = 0
        for at, (policy, samples) in enumerate(zip(kept, drawn, strict=True), start=1):
            responses += len(samples)
            tokens += sum(sample["num_tokens"] for sample in samples)
            counted = {"at": at, "responses": responses, "generated_tokens": tokens}
            for row in load_rows(Path(f"{evaluation}.{policy.stem}.jsonl"), required={}):
                yield {**counted, "input": row["input"], "output": row["output"], "kl": row["kl"]}

    def _train_actor(self, folder: Path) -> None:
        """REINFORCE against the server of rewards."""
        method, scale, files = self.method, self.inputs.scale, self.inputs
        prompts = scale.step // method.drawn
        held_out = files.data("repeated_held_out_prompts")
        data = f"{{train: [{files.data('prompts')}], validation: [{held_out}], test: [{held_out}]}}"
        run(
            self.folder, "train", "reinforce",
            f"model.data.data_prefix={data}", f"model.seed={self.seed}",
            f"pretrained_checkpoint.restore_from_path={files.start}",
            f"exp_manager.explicit_log_dir={folder}", f"trainer.precision={scale.precision}",
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=False",
            "exp_manager.checkpoint_callback_params.save_top_k=0",
            f"trainer.ppo.baseline={method.baseline}", f"trainer.ppo.initial_policy_kl_penalty={scale.kl_penalty}",
            f"trainer.ppo.max_epochs={scale.few}", f"trainer.ppo.max_steps={scale.steps}",
            f"trainer.ppo.val_check_interval={scale.steps // scale.validations}",
            f"trainer.ppo.save_interval={scale.save_interval}",
            f"model.ppo.num_rollout_samples={prompts}", f"model.ppo.num_rollout_per_prompt={method.n}",
            f"model.global_batch_size={prompts * method.n}", "model.micro_batch_size=32",
            "model.ppo.rollout_micro_batch_size=64", "model.ppo.forward_micro_batch_size=64",
            "model.ppo.val_rollout_micro_batch_size=256",
            f"model.ppo.num_val_samples={scale.held_out * scale.held_out_n}",
            f"model.ppo.length_params.max_length={scale.tokens}",
            "model.ppo.length_params.min_length=0",  # as the sampler draws
            "~model.optim.sched", f"model.optim.lr={scale.actor_lr}", "model.optim.weight_decay=0.01",
            "remote_critic_rm.reward_model.ip=127.0.0.1", f"remote_critic_rm.reward_model.port={files.port}",
            "remote_critic_rm.init_timeout_s=300", "remote_critic_rm.inference_timeout_s=120",
        )  # fmt: skip

    def _actor_points(self) -> Iterator[Row]:
        """The validations of REINFORCE, which are plain samples on the held-out prompts."""
        scale, folder, steps = self.inputs.scale, self.folder / "actor", self.inputs.scale.steps
        share = (
            self.method.drawn / self.method.n
        )  # of all responses to those measured; the greedy ones taken to be as long
        if not (folder / "validation" / f"step_{steps}.jsonl").exists():
            self._train_actor(folder)
        drawn: dict[int, Row] = {}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "train_rollouts/rollout_size" in row:
                drawn[row["step"]] = row
        interval = steps // scale.validations
        for at, step in enumerate([*range(interval, steps, interval), steps], start=1):
            until = [row for number, row in drawn.items() if number <= step]
            sizes = [row["train_rollouts/rollout_size"] for row in until]
            tokens = sum(n * row["train_rollouts/generation_length"] for n, row in zip(sizes, until, strict=True))
            counted = {"responses": round(share * sum(sizes)), "generated_tokens": round(share * tokens)}
            for row in load_rows(folder / "validation" / f"step_{step}.jsonl", required={}):
                yield {"at": at, **counted, "input": row["input"], "output": row["output"], "kl": row["kl"]}


def evaluate(
    inputs: Inputs, folder: Path, policies: list[Path], n: int, seed: int, overrides: list[str] | None = None
) -> None:
    """`<folder>/evaluation.json` of `policies`, and beside it their samples, `n` to each held-out prompt."""
    run(
        folder, "evaluate", "eval",
        f"policy_files=[{','.join(map(str, policies))}]", f"initial_policy_file={inputs.start}",
        f"reward_function={VADER}", f"data.file_names=[{inputs.data('held_out_prompts')}]", f"data.n={n}",
        "data.micro_batch_size=64", f"inference.tokens_to_generate={inputs.scale.tokens}", f"seed={seed}",
        f"trainer.precision={inputs.scale.precision}", f"output_file={folder / 'evaluation.json'}", *(overrides or []),
    )  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The start model, sampled often enough to know what best-of-n of it gives."""

    inputs: Inputs
    seed: int

    @property
    def folder(self) -> Path:
        return self.inputs.folder / "runs" / "start"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    def make(self) -> None:
        if self.samples.exists():
            return
        start = self.inputs.start
        evaluate(self.inputs, self.folder, [start], self.inputs.scale.reference_n, self.seed)
        own = {"method": "start", "seed": self.seed, "at": 0, "responses": 0, "generated_tokens": 0}
        rows = load_rows(self.folder / f"evaluation.json.{start.stem}.jsonl", required={})
        write_jsonl(
            self.samples, ({**own, "input": row["input"], "output": row["output"], "kl": row["kl"]} for row in rows)
        )
