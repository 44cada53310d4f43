"""Which way to cut a model over the GPUs that there are: all that fit, and of them the fastest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.cut import can_cut, passes
from nemo_aligner.config.experts import ExpertOverrides
from nemo_aligner.config.recomputation import RecomputationKeys
from nemo_aligner.errors import LaunchError
from nemo_aligner.planning.memory import Memory, Work, inference, training
from nemo_aligner.planning.parameters import Layout

_RECOMPUTED = 4 / 3
"""Relative time of a step whose forward pass is done twice: forward 1, backward 2."""
_EACH_CUT = 0.08
"""What every doubling of tensor or expert parallelism costs: a rough figure of exchanges that are not hidden."""


@dataclass(frozen=True)
class Cluster:
    """GPUs to be used; `memory` is what one has for tensors, in bytes."""

    gpus: int
    gpus_per_node: int
    memory: int


@dataclass(frozen=True)
class Plan:
    arch: Architecture
    layout: Layout
    work: Work
    memory: Memory


@dataclass(frozen=True)
class Wish:
    """What is asked of a layout; None = whatever fits."""

    trains: bool
    global_rows: int  # rows of an optimizer step, over all ranks
    tp: int | None = None
    pp: int | None = None
    vpp: int = 1
    ep: int | None = None
    etp: int | None = None  # as tp
    sequence_parallel: bool | None = None
    recomputation: Layout | None = None  # its granularity, method and num_layers


def best_plan(arch: Architecture, cluster: Cluster, work: Work, wish: Wish) -> Plan:
    """The fastest layout that fits, as far as `_relative_time` knows. Raises LaunchError where none does."""
    plans = [_planned(arch, layout, work, wish) for layout in _layouts(arch, cluster, wish)]
    if not plans:
        raise LaunchError(
            f"{arch.num_attention_heads} heads, {arch.query_groups} groups of them and {_layers_of(arch)} cannot "
            f"be cut over {cluster.gpus} GPUs, {cluster.gpus_per_node} a node, in the way asked for"
        )
    fitting = [plan for plan in plans if plan.memory.peak <= cluster.memory]
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory.peak)
        raise LaunchError(
            f"nothing fits: the layout that takes least ({describe(least.layout)}) takes "
            f"{gib(least.memory.peak):.1f} of the {gib(cluster.memory):.1f} GB of a GPU; give more GPUs, "
            "shorter rows or smaller micro-batches"
        )
    return min(fitting, key=lambda plan: (_relative_time(plan, wish), plan.memory.peak))


def _layers_of(arch: Architecture) -> str:
    experts = "" if arch.num_moe_experts is None else f" of {arch.num_moe_experts} experts"
    return f"{arch.num_layers} layers{experts}"


def describe(layout: Layout) -> str:
    """In words, for a line."""
    stages = f"PP {layout.pp}" if layout.vpp == 1 else f"PP {layout.pp} × {layout.vpp}"
    parts = [f"TP {layout.tp}", stages, f"DP {layout.dp}"]
    if layout.gathers_experts:
        parts.append(f"EP {layout.ep}" + (f" of TP {layout.expert_tp}" if layout.expert_tp != layout.tp else ""))
    if layout.sequence_parallel:
        parts.append("sequence parallel")
    if layout.granularity is not None:
        what = f"{layout.method} {layout.num_layers}" if layout.granularity == "full" else "all but products"
        parts.append(f"{layout.granularity} recomputation ({what})")
    return ", ".join(parts)


def gib(size: int) -> float:
    """GPU makers' gigabytes are 2³⁰ bytes."""
    return size / 2**30


def _layouts(arch: Architecture, cluster: Cluster, wish: Wish) -> Iterator[Layout]:
    """Tensor parallelism stays inside a node, where the sums of every layer are fast."""
    if wish.recomputation is not None:
        recomputations = [wish.recomputation]
    else:  # of attention alone saves nothing: no scores are stored, and q and k would be
        recomputations = [Layout(), Layout(granularity="full")] if wish.trains else [Layout()]
    for tp in [wish.tp] if wish.tp else _divisors(cluster.gpus_per_node):
        for pp in [wish.pp] if wish.pp else _divisors(arch.num_layers):
            if cluster.gpus % (tp * pp) or not can_cut(arch, tensor=tp, pipeline=pp, virtual=wish.vpp):
                continue
            parallel = tp > 1 and (wish.trains if wish.sequence_parallel is None else wish.sequence_parallel)
            experts = _expert_sizes(arch, cluster.gpus // pp, tp, parallel, wish)
            fitting = [one for one in recomputations if _recomputes(one, arch.num_layers // (pp * wish.vpp))]
            for ep, recomputation in itertools.product(experts, fitting):
                yield replace(
                    recomputation,
                    tp=tp,
                    pp=pp,
                    vpp=wish.vpp,
                    dp=cluster.gpus // (tp * pp),
                    ep=ep,
                    etp=wish.etp,
                    sequence_parallel=parallel,
                )


def _recomputes(layout: Layout, layers: int) -> bool:
    """Whether a run recomputes the `layers` of a pipeline stage so."""
    keys = RecomputationKeys(layout.granularity, layout.method, layout.num_layers)
    return passes(lambda: keys.check_recomputed_layers(layers))


def _expert_sizes(arch: Architecture, ranks: int, tp: int, sequence_parallel: bool, wish: Wish) -> list[int]:
    """Over how many of the `ranks` of a pipeline stage the experts of a layer may be cut."""
    if arch.num_moe_experts is None or not wish.trains:
        return [1]

    def fits(ep: int) -> bool:
        check = ExpertOverrides(ep, wish.etp).check_expert_sizes
        return passes(lambda: check(arch, tensor=tp, ranks=ranks, sequence_parallel=sequence_parallel))

    return [ep for ep in ([wish.ep] if wish.ep else _divisors(arch.num_moe_experts)) if fits(ep)]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _planned(arch: Architecture, layout: Layout, work: Work, wish: Wish) -> Plan:
    work = replace(work, microbatches=max(1, wish.global_rows // (work.rows * layout.dp)))
    return Plan(arch, layout, work, (training if wish.trains else inference)(arch, layout, work))


def _relative_time(plan: Plan, wish: Wish) -> float:
    """Of a step, up to a factor that layouts share: more communication, idle stages, idle ranks, work done twice."""
    layout, work = plan.layout, plan.work
    communication = 1 + _EACH_CUT * (math.log2(layout.tp) + math.log2(layout.ep))
    taking_turns = communication * layout.pp  # stages without micro-batches to fill them: of a token, or a forward pass
    if not wish.trains:
        return taking_turns
    idle = (1 + (layout.pp - 1) / layout.vpp / work.microbatches) * max(1.0, work.rows * layout.dp / wish.global_rows)
    step = communication * idle * (_RECOMPUTED if layout.granularity == "full" else 1)
    return step + taking_turns if work.slots else step  # rollouts take about as long as the update
