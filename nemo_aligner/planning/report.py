"""A plan as a table, and as overrides ready to paste."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from nemo_aligner.planning.config import PlanConfig
from nemo_aligner.planning.layouts import Plan, describe, gib
from nemo_aligner.planning.memory import training
from nemo_aligner.planning.tasks import TASKS, overrides


def report(config: PlanConfig, plan: Plan) -> str:
    """`config` and `plan` are those of `make_plan`."""
    return "\n".join(_lines(config, plan))


def _lines(config: PlanConfig, plan: Plan) -> Iterator[str]:
    task, memory, layout = TASKS[config.task], plan.memory, plan.layout
    assert config.gpus is not None
    yield f"{config.task} of {config.model} on {config.gpus} GPUs: {describe(layout)}"
    yield ""
    yield _row("of a GPU (that of the pipeline stage that needs most)", "GB")
    for name in ("weights", "gradients", "optimizer"):
        if getattr(memory, name):
            yield _row(name, f"{gib(getattr(memory, name)):.1f}")
    for phase, parts in memory.phases.items():
        named = ", ".join(f"{part} {gib(size):.1f}" for part, size in parts.items())
        yield _row(f"+ {phase}: {named}", f"{gib(sum(parts.values())):.1f}")
    yield _row("at most at once", f"{gib(memory.peak):.1f}")
    yield _row(f"of {config.gpu_memory_gb:g} GB, less a reserve of {config.reserve_gb:g}", f"{_room(config):.1f}")
    if task.trains:
        yield from _recomputation(plan)
    if memory.host:
        per_node = min(config.gpus, config.gpus_per_node)
        yield ""
        yield f"In the memory of each node, for the initial policy: {gib(memory.host * per_node):.1f} GB at most."
    yield ""
    yield f"Overrides of examples/nlp/gpt/{task.script}:"
    per_node = min(config.gpus, config.gpus_per_node)
    sizes = {**asdict(config), "devices": per_node, "num_nodes": config.gpus // per_node}
    for name in ("sequence_parallel", "activations_checkpoint_granularity"):
        sizes[name] = None if sizes[name] in (False, "none") else sizes[name]
    if plan.arch.num_moe_experts is None:
        sizes["expert_model_parallel_size"] = None
    yield " \\\n".join(f"  {override}" for override in overrides(sizes, task))


def _room(config: PlanConfig) -> float:
    return config.gpu_memory_gb - config.reserve_gb


def _recomputation(plan: Plan) -> Iterator[str]:
    """What the same cut takes with the other choices of recomputation."""
    yield ""
    for granularity, said in ((None, "without recomputation"), ("full", "with full recomputation")):
        layout = replace(plan.layout, granularity=granularity, method="uniform", num_layers=1)
        step = training(plan.arch, layout, plan.work).phases["forward and backward"]
        yield _row(f"forward and backward of this cut {said}", f"{gib(sum(step.values())):.1f}")


def _row(name: str, value: str) -> str:
    return f"{name:<96}{value:>8}"
