"""From sizes to a plan: what a task computes at a time, which layout holds it, and how many responses at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.errors import ConfigError, LaunchError
from nemo_aligner.planning.config import PlanConfig
from nemo_aligner.planning.layouts import Cluster, Plan, Wish, best_plan
from nemo_aligner.planning.memory import Work
from nemo_aligner.planning.parameters import Layout
from nemo_aligner.planning.tasks import TASKS, Task

_SLOTS, _FEW_SLOTS = 256, 32
"""Responses decoded at once: the most that are planned for, and those that a layout must have room for."""


def make_plan(config: PlanConfig, arch: Architecture) -> tuple[PlanConfig, Plan]:
    """The plan, and the config with every size that it settles. Raises ConfigError, and LaunchError if nothing fits."""
    task = TASKS[config.task]
    if config.virtual_pipeline_model_parallel_size is not None and not task.trains:
        key = "virtual_pipeline_model_parallel_size"
        raise ConfigError(f"{config.task} has one stage on each pipeline rank; leave it out", key)
    _check_experts(config, arch, task)
    if task.trains and (arch.hidden_dropout or arch.attention_dropout):
        raise ConfigError(
            "it has dropout, and memory is counted without; set its hidden_dropout and attention_dropout to 0.0, and "
            "model.hidden_dropout, model.attention_dropout in the run",
            "model",
        )
    if task.of_reward_model:
        arch = replace(arch, reward_model_type=arch.reward_model_type or "binary_ranking")
    config = _settled(config, arch, task)
    assert config.gpus is not None
    per_node = min(config.gpus, config.gpus_per_node)
    if config.gpus % per_node:
        raise ConfigError(f"{config.gpus} GPUs are no whole number of nodes of {per_node}", "gpus")
    cluster = Cluster(config.gpus, per_node, int((config.gpu_memory_gb - config.reserve_gb) * 2**30))
    wish = _wish(config, task)
    if not task.generates or config.prompts_in_flight is not None:
        plan = best_plan(arch, cluster, _work(config, task), wish)
    else:
        config, plan = _with_most_prompts(config, arch, cluster, wish)
    layout = plan.layout
    return replace(
        config,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        sequence_parallel=layout.sequence_parallel,
        activations_checkpoint_granularity=layout.granularity or "none",
        activations_checkpoint_method=layout.method if layout.granularity == "full" else None,
        activations_checkpoint_num_layers=layout.num_layers if layout.granularity == "full" else None,
    ), plan


def _check_experts(config: PlanConfig, arch: Architecture, task: Task) -> None:
    """Raises ConfigError where there is nothing that the sizes of experts could cut."""
    for name, none in (("expert_model_parallel_size", (-1, 1)), ("expert_tensor_parallel_size", (None,))):
        given = getattr(config, name) not in none
        if given and arch.num_moe_experts is None:
            raise ConfigError("the model has no experts; leave it out", name)
        if given and not task.trains:
            raise ConfigError(f"{config.task} has every expert on each rank; leave it out", name)


def _with_most_prompts(config: PlanConfig, arch: Architecture, cluster: Cluster, wish: Wish) -> tuple[PlanConfig, Plan]:
    """The layout is chosen for a few responses at a time; then as many are decoded at once as it has room for."""
    task, samples = TASKS[config.task], config.samples_per_prompt or 1
    found = replace(config, prompts_in_flight=max(1, _FEW_SLOTS // samples))
    plan = best_plan(arch, cluster, _work(found, task), wish)
    own = replace(wish, tp=plan.layout.tp, pp=plan.layout.pp, ep=plan.layout.ep, recomputation=plan.layout)
    while 2 * plan.work.slots <= _SLOTS:
        more = replace(found, prompts_in_flight=2 * (found.prompts_in_flight or 1))
        try:
            plan = best_plan(arch, cluster, _work(more, task), own)
        except LaunchError:
            break
        found = more
    return found, plan


def _settled(config: PlanConfig, arch: Architecture, task: Task) -> PlanConfig:
    """With the task's own sizes where none were given. Raises ConfigError for sizes that contradict each other."""
    given: dict[str, Any] = {name: getattr(config, name) or value for name, value in task.defaults.items()}
    prompt, response, whole = config.prompt_length, config.response_length, config.seq_length
    if whole is None:
        whole = prompt + response if prompt and response else arch.encoder_seq_length
    if response is None:
        response = whole - prompt if prompt else whole // 2 if task.generates else whole
    prompt = whole - response if prompt is None else prompt
    if prompt + response != whole or (task.generates and min(prompt, response) < 1):
        raise ConfigError(f"a prompt of {prompt} and a response of {response} tokens do not make {whole}", "seq_length")
    if whole > arch.positions:
        raise ConfigError(f"{whole} is above the {arch.positions} positions of the model", "seq_length")
    given |= {"seq_length": whole, "response_length": response, "prompt_length": prompt}
    if "forward_micro_batch_size" in task.keys:
        given["forward_micro_batch_size"] = config.forward_micro_batch_size or given.get("forward_micro_batch_size", 4)
    return replace(config, **given)


def _work(config: PlanConfig, task: Task) -> Work:
    assert config.seq_length is not None
    assert config.response_length is not None
    samples = config.samples_per_prompt or 1
    return Work(
        seq_length=config.seq_length,
        response_length=config.response_length,
        rows=(config.micro_batch_size or 1) * task.rows_of_a_sample,
        forward_rows=config.forward_micro_batch_size or 1,
        item=4 if config.precision.startswith("32") else 2,
        sharded=config.optimizer in ("distributed_fused_adam", "mcore_distributed_optim"),
        slots=(config.prompts_in_flight or 1) * samples if task.generates else 0,
        samples_per_prompt=samples,
        keeps_initial=config.task == "actor",
    )


def _wish(config: PlanConfig, task: Task) -> Wish:
    granularity, recomputation = config.activations_checkpoint_granularity, None
    if granularity != "auto":
        recomputation = Layout(
            granularity=None if granularity == "none" else granularity,
            method=config.activations_checkpoint_method or "uniform",
            num_layers=config.activations_checkpoint_num_layers or 1,
        )
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    return Wish(
        trains=task.trains,
        global_rows=(config.global_batch_size or 1) * task.rows_of_a_sample,
        tp=None if tensor == -1 else tensor,
        pp=None if pipeline == -1 else pipeline,
        vpp=config.virtual_pipeline_model_parallel_size or 1,
        ep=None if config.expert_model_parallel_size == -1 else config.expert_model_parallel_size,
        etp=config.expert_tensor_parallel_size,
        sequence_parallel=config.sequence_parallel,
        recomputation=recomputation,
    )
