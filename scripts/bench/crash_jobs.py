"""What scripts/bench/crash.py kills: every command of the project on the tiny model, small enough to be run often.

A job that trains has batches of two micro-batches, so that one rank and two ranks add the same two gradients, and the
weights must be the same bits whatever the number of ranks was before and after a kill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_GPT = "examples/nlp/gpt"
_OFFLINE = f"{_GPT}/offline"


@dataclass(frozen=True)
class Invocation:
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """`run` makes the invocation for inputs, output folder, number of ranks and the reward server's port."""

    name: str
    run: Callable[[Path, Path, int, int], Invocation]
    weight: int = 4  # how often it is chosen among the others
    most_kills: int = 3  # of one output, before it may come to its end
    most_ranks: int = 2
    has_server: bool = False

    def needs(self, name: str) -> bool:
        """Whether the input of that name is among those that its command names."""
        invocation = self.run(Path("inputs"), Path("out"), 1, 1)
        server_too = server(Path("inputs"), 1).command if self.has_server else []
        return name in " ".join([*invocation.command, *invocation.environment.values(), *server_too])


def python(script: str, *arguments: str) -> Invocation:
    return Invocation([sys.executable, script, *arguments])


def imported(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
    return python("scripts/import_hf.py", "--input", f"{inputs}/hf", "--dtype", "32", "--output", f"{out}/model.nemo")


def sampler(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
    return python(
        f"{_OFFLINE}/launch_random_sampler.py", f"gpt_model_file={inputs}/sft_model.nemo", "trainer.precision=32",
        f"data.file_names=[{inputs}/prompts.jsonl]", "data.n=4", "data.micro_batch_size=1", "checkpoint_interval=1",
        "inference.tokens_to_generate=8", "data.export_metadata=True", "data.hf_dataset=False",
        f"trainer.devices={ranks}", f"output_file={out}/generated.jsonl",
    )  # fmt: skip


def labeler(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
    return python(
        f"{_OFFLINE}/launch_reward_labeler.py", f"gpt_model_file={inputs}/reward_model.nemo", "trainer.precision=32",
        f"data.file_names=[{inputs}/samples.jsonl]", "data.micro_batch_size=1", "checkpoint_interval=1",
        "processor=null", "data.hf_dataset=False", f"trainer.devices={ranks}", f"output_file={out}/labeled.jsonl",
    )  # fmt: skip


_BATCHES = ("model.global_batch_size=2", "model.micro_batch_size=1", "model.optim.name=adamw", "model.optim.lr=1e-3")


def sft(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
    data = "model.data.train_ds"
    return python(
        f"{_GPT}/train_gpt_sft.py", f"model.restore_from_path={inputs}/sft_model.nemo", "trainer.precision=32",
        f"{data}.file_path={inputs}/samples.jsonl", f"{data}.global_batch_size=2", f"{data}.micro_batch_size=1",
        f"model.data.validation_ds.file_path={inputs}/samples.jsonl", "trainer.sft.val_check_interval=2",
        "trainer.sft.max_epochs=1", "trainer.sft.save_interval=1", *_BATCHES[2:], f"trainer.devices={ranks}",
        "exp_manager.checkpoint_callback_params.save_top_k=2", f"exp_manager.explicit_log_dir={out}",
    )  # fmt: skip


def reward_model(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
    pairs = f"{inputs}/pairs.jsonl"
    return python(
        f"{_GPT}/train_reward_model.py", f"pretrained_checkpoint.restore_from_path={inputs}/sft_model.nemo",
        f"model.data.data_prefix={{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}", "trainer.precision=32",
        *_BATCHES, "trainer.rm.save_interval=2", "trainer.rm.val_check_interval=4", f"trainer.devices={ranks}",
        "exp_manager.checkpoint_callback_params.save_top_k=1", f"exp_manager.explicit_log_dir={out}",
    )  # fmt: skip


def actor(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
    prompts = f"{inputs}/prompts.jsonl"
    return python(
        f"{_GPT}/train_gpt_reinforce_actor.py", f"pretrained_checkpoint.restore_from_path={inputs}/sft_model.nemo",
        f"model.data.data_prefix={{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
        "trainer.precision=32", *_BATCHES, "~model.optim.sched", "model.ppo.num_rollout_samples=2",
        "model.ppo.num_rollout_per_prompt=2", "model.ppo.rollout_micro_batch_size=1",
        "model.ppo.forward_micro_batch_size=1", "model.ppo.length_params.max_length=6", "trainer.ppo.save_interval=1",
        "trainer.ppo.val_check_interval=2", "trainer.ppo.keep_rollouts=4", f"trainer.devices={ranks}",
        "remote_critic_rm.reward_model.ip=127.0.0.1", f"remote_critic_rm.reward_model.port={port}",
        f"exp_manager.explicit_log_dir={out}",
    )  # fmt: skip


def server(inputs: Path, port: int) -> Invocation:
    return python(
        f"{_GPT}/serve_reward_model.py", f"rm_model_file={inputs}/reward_model.nemo", f"inference.port={port}",
        "trainer.precision=32",
    )  # fmt: skip


def evaluation(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
    policy = f"{inputs}/sft_model.nemo"
    return python(
        f"{_OFFLINE}/evaluate_policy.py", f"policy_files=[{policy}]", f"initial_policy_file={policy}",
        f"reward_model_file={inputs}/reward_model.nemo", f"data.file_names=[{inputs}/prompts.jsonl]", "data.n=2",
        "inference.tokens_to_generate=6", "data.hf_dataset=False", "trainer.precision=32", f"trainer.devices={ranks}",
        f"output_file={out}/evaluation.json",
    )  # fmt: skip


def loop(*command: str) -> Callable[[Path, Path, int, int], Invocation]:
    def run(inputs: Path, out: Path, ranks: int, port: int) -> Invocation:
        stage = f"trainer.precision=32 trainer.devices={ranks}"
        data = "model.data.train_ds"
        return Invocation(
            [*command],
            {
                "TRAINING_ITERS": "2", "ROLLOUT_BATCH_SIZE": "3", "KEEP_SAMPLES": "4", "RESULT_PATH": f"{out}/loop",
                "PROMPTS_PATH": f"{inputs}/prompts.jsonl", "POLICY_MODEL_PATH": f"{inputs}/sft_model.nemo",
                "REWARD_MODEL_PATH": f"{inputs}/reward_model.nemo", "THRESHOLD": "-5",
                "SAMPLER_ARGS": f"data.n=3 inference.tokens_to_generate=6 checkpoint_interval=1 {stage}",
                "LABELER_ARGS": f"data.micro_batch_size=1 checkpoint_interval=1 {stage}",
                "SFT_ARGS": f"{data}.global_batch_size=2 {data}.micro_batch_size=1 model.optim.name=adamw "
                f"'{data}.prompt_template=\"{{input}}{{output}}\"' trainer.sft.save_interval=1 {stage}",
            },
        )  # fmt: skip

    return run


JOBS = {
    job.name: job
    for job in (
        Job("import", imported, weight=3, most_ranks=1),
        Job("sampler", sampler, most_kills=5),
        Job("labeler", labeler),
        Job("sft", sft, most_kills=5),
        Job("reward_model", reward_model, weight=2, most_kills=4),
        Job("actor", actor, most_kills=4, has_server=True),
        Job("evaluation", evaluation, weight=2),
        Job("online_rs", loop("bash", "scripts/online_rs.sh"), weight=1, most_kills=6),
        Job("online_rest", loop("bash", "scripts/online_rest.sh"), weight=1, most_kills=6),
        Job("aligner_loop", loop(sys.executable, "-m", "nemo_aligner", "loop", "rs"), weight=1, most_kills=6),
    )
}


def make_inputs(inputs: Path, jobs: Sequence[Job]) -> None:
    """The models and files that the jobs begin with."""
    inputs.mkdir(parents=True)
    policy, made = inputs / "sft_model.nemo", inputs / "made"
    _now("scripts/import_hf.py", "--random-init", "conf/model/tiny.yaml", "--dtype", "32", "--output", str(policy))
    _write(inputs / "prompts.jsonl", [{"input": f"prompt {i % 5}", "id": i} for i in range(6)])
    _write(inputs / "samples.jsonl", [{"input": f"p{i % 3}", "output": f" answer {i}", "id": i} for i in range(9)])
    _write(inputs / "pairs.jsonl", [{"text": f"{word} film {i}"} for i in range(8) for word in ("good", "bad")])
    if any(job.needs("inputs/hf") for job in jobs):
        _now("scripts/export_hf.py", "--input", str(policy), "--output", str(inputs / "hf"))
    if any(job.needs("reward_model.nemo") for job in jobs):
        _now(*reward_model(inputs, made, 1, 0).command[1:])
        (made / "checkpoints" / "megatron_gpt.nemo").rename(inputs / "reward_model.nemo")


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _now(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}: {done.stdout[-1500:]}")
