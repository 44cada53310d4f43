"""What is planned for: the scripts, and by which keys each takes the sizes that decide memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_aligner.errors import ConfigError

_TRAINED = {
    "num_nodes": "trainer.num_nodes",
    "devices": "trainer.devices",
    "precision": "trainer.precision",
    "tensor_model_parallel_size": "model.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "model.pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "model.virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size": "model.expert_model_parallel_size",
    "expert_tensor_parallel_size": "model.expert_tensor_parallel_size",
    "sequence_parallel": "model.sequence_parallel",
    "activations_checkpoint_granularity": "model.activations_checkpoint_granularity",
    "activations_checkpoint_method": "model.activations_checkpoint_method",
    "activations_checkpoint_num_layers": "model.activations_checkpoint_num_layers",
    "optimizer": "model.optim.name",
}
_OFFLINE = {
    "num_nodes": "trainer.num_nodes",
    "devices": "trainer.devices",
    "precision": "trainer.precision",
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
}


@dataclass(frozen=True)
class Task:
    """A script, its keys by the names of `PlanConfig`, and what tells its config from those of other scripts."""

    script: str
    keys: Mapping[str, str]
    mark: str  # a key that its config alone has
    trains: bool = False
    generates: bool = False
    of_reward_model: bool = False
    rows_of_a_sample: int = 1  # a pair is two rows
    defaults: Mapping[str, int] = field(default_factory=dict)


TASKS = {
    "sft": Task(
        "train_gpt_sft.py",
        {
            **_TRAINED,
            "micro_batch_size": "model.data.train_ds.micro_batch_size",
            "global_batch_size": "model.data.train_ds.global_batch_size",
            "seq_length": "model.data.train_ds.max_seq_length",
        },
        mark="trainer.sft",
        trains=True,
        defaults={"micro_batch_size": 1, "global_batch_size": 128},
    ),
    "rm": Task(
        "train_reward_model.py",
        {
            **_TRAINED,
            "micro_batch_size": "model.micro_batch_size",
            "global_batch_size": "model.global_batch_size",
            "seq_length": "model.data.seq_length",
        },
        mark="trainer.rm",
        trains=True,
        of_reward_model=True,
        rows_of_a_sample=2,
        defaults={"micro_batch_size": 1, "global_batch_size": 64},
    ),
    "actor": Task(
        "train_gpt_reinforce_actor.py",
        {
            **_TRAINED,
            "micro_batch_size": "model.micro_batch_size",
            "global_batch_size": "model.global_batch_size",
            "prompt_length": "model.data.seq_length",
            "response_length": "model.ppo.length_params.max_length",
            "samples_per_prompt": "model.ppo.num_rollout_per_prompt",
            "prompts_in_flight": "model.ppo.rollout_micro_batch_size",
            "forward_micro_batch_size": "model.ppo.forward_micro_batch_size",
        },
        mark="trainer.ppo",
        trains=True,
        generates=True,
        defaults={"micro_batch_size": 1, "global_batch_size": 64, "samples_per_prompt": 4},
    ),
    "sampler": Task(
        "offline/launch_random_sampler.py",
        {
            **_OFFLINE,
            "prompt_length": "data.max_seq_length",
            "response_length": "inference.tokens_to_generate",
            "samples_per_prompt": "data.n",
            "prompts_in_flight": "data.micro_batch_size",
        },
        mark="inference.tokens_to_generate",
        generates=True,
        defaults={"samples_per_prompt": 4},
    ),
    "labeler": Task(
        "offline/launch_reward_labeler.py",
        {**_OFFLINE, "forward_micro_batch_size": "data.micro_batch_size", "seq_length": "data.max_seq_length"},
        mark="processor",
        of_reward_model=True,
        defaults={"forward_micro_batch_size": 4},
    ),
    "server": Task(
        "serve_reward_model.py",
        {
            **{name: _TRAINED[name] for name in _OFFLINE},
            "forward_micro_batch_size": "inference.inference_micro_batch_size",
        },
        mark="rm_model_file",
        of_reward_model=True,
        defaults={"forward_micro_batch_size": 4},
    ),
}


def task_of(run: DictConfig) -> str:
    """The task whose config `run` is, as a script's `--cfg job` prints it. Raises ConfigError."""
    for name, task in TASKS.items():
        *above, last = task.mark.split(".")
        block = OmegaConf.select(run, ".".join(above)) if above else run
        if isinstance(block, DictConfig) and last in block:
            return name
    raise ConfigError("not the config of a script that has a plan; give what its --cfg job prints", "run")


def sizes_of(run: DictConfig, task: Task) -> dict[str, Any]:
    """The sizes in a script's config, by the names of `PlanConfig`."""
    return {name: OmegaConf.select(run, key) for name, key in task.keys.items()}


def overrides(sizes: Mapping[str, Any], task: Task) -> list[str]:
    """`sizes` as the task's overrides; those that are None are left to their defaults."""
    return [f"{key}={sizes[name]}" for name, key in task.keys.items() if sizes.get(name) is not None]
