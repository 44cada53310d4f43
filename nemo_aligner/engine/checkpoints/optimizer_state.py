"""Adam's state in a checkpoint: the same tensors whether it is cut over data-parallel ranks or not.

A run may go on with the other kind of optimizer, on more ranks or fewer. Both kinds save `exp_avg`, `exp_avg_sq` and,
of bf16 weights, `fp32_param` of each parameter; what else they note differs, and is known without a checkpoint.

What Megatron's distributed optimizer needs besides: each data-parallel rank holds a part of every *bucket*, a stretch
of one flat buffer of all parameters:

    buffer   | bucket 0: a b c, padding | bucket 1: d e, padding | ...      places in it: `param_index_map`
    saved    | a b c d e ...                                                without padding, cut by the same places

- Cut so, every parameter after the first padding gets its neighbour's values. `_with_padding` puts the padding back.
- torch's AdamW, in use where neither Transformer Engine nor apex is there, counts steps for each parameter by itself.
  Loading asks for the count before a first step has made it, asks for it again among what was not read, and gives all
  parameters one counter, which then advances once for each of them: `_begin`, `_keeping_steps`, `_own_counters`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedStateDict
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Method = Callable[..., Any]

_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,  # experts cut over ranks have an optimizer of their own, others none
}


def sharded_state(optimizer: MegatronOptimizer, weights: ShardedStateDict, *, loading: bool) -> dict[str, Any]:
    """What is saved of `optimizer`, its tensors, or what is asked for; `weights` is the sharded state of its model."""
    state: dict[str, Any] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=_RESHARDABLE)
    for part in _parts(optimizer, state):
        for tensors in part.get("param_state", {}).values():
            master = tensors.pop("param")
            if optimizer.config.params_dtype != torch.float32:  # else they are the weights, which are saved anyway
                name = master.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.", 1)
                tensors["fp32_param"] = dataclasses.replace(master, key=name)
    return state if loading else extract_sharded_base(state)[0]


def restore(optimizer: MegatronOptimizer, asked: dict[str, Any], loaded: dict[str, Any], steps: int) -> None:
    """Put what was `loaded` for `asked`, a `sharded_state`, into `optimizer`, which has made so many `steps`.

    The model's weights are loaded before.
    """
    state = _with_tensors(asked, loaded)
    for part in _parts(optimizer, state):
        if "param_state" in part:
            for group in part["optimizer"]["param_groups"]:
                group["step"] = steps
        else:
            part.get("optimizer", part)["state"]["common_step"] = torch.tensor(float(steps))
    optimizer.load_state_dict(state)


def _parts(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """The state of each optimizer that `optimizer` is made of."""
    several = isinstance(optimizer, ChainedOptimizer) and len(optimizer.chained_optimizers) > 1
    yield from state.values() if several else [state]


def _with_tensors(asked: Any, loaded: Any) -> Any:
    """`asked` with the loaded tensors in place of their descriptions."""
    if isinstance(asked, ShardedBase):
        return loaded
    if isinstance(asked, LocalNonpersistentObject):
        return asked.unwrap()
    if isinstance(asked, dict):
        there = loaded if isinstance(loaded, dict) else {}
        return {name: _with_tensors(value, there.get(name)) for name, value in asked.items()}
    if isinstance(asked, list):
        others = loaded if isinstance(loaded, list) else []
        return [_with_tensors(value, other) for value, other in itertools.zip_longest(asked, others[: len(asked)])]
    return asked


def make_checkpointable(optimizer: MegatronOptimizer) -> None:
    """Let the distributed parts of `optimizer` save and load what they hold; others do so by themselves."""
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = _with_padding(part, part.get_parameter_state_dp_zero)
            part._set_main_param_and_optimizer_states = _keeping_steps(part, part._set_main_param_and_optimizer_states)
            part.load_state_dict = _own_counters(part, part.load_state_dict)
            if isinstance(part.optimizer, HybridDeviceOptimizer):
                _begin_beside_gpu(part.optimizer)
                part.load_state_dict = _with_copies(part.optimizer, part.load_state_dict)
            elif isinstance(part.optimizer, torch.optim.Adam):
                _begin(part.optimizer)


def _begin(adam: torch.optim.Adam) -> None:
    """Its state before the first step, which torch makes at the first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _begin_beside_gpu(hybrid: HybridDeviceOptimizer) -> None:
    hybrid.param_update_in_fp32 = False  # what it is given is fp32, and it would look for bf16 originals of that
    for adam in hybrid.cpu_optimizers:
        _begin(adam)
    hybrid._sync_sub_optimizers_state_to_hdo()


def _with_copies(hybrid: HybridDeviceOptimizer, load: Method) -> Method:
    """Megatron copies parameters to the CPU before they are loaded; here again after."""

    def load_state(state: Any) -> None:
        load(state)
        hybrid._init_sub_optimizers()
        hybrid._sync_hdo_param_groups_to_sub_optimizers()
        hybrid._sync_hdo_state_to_sub_optimizers()

    return load_state


def _with_padding(part: Any, gathered: Method) -> Method:
    def gather(*args: Any, **kwargs: Any) -> Any:
        state = gathered(*args, **kwargs)
        for index, buffer in enumerate(part.buffers if state is not None else []):
            for tensors in state[index].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[name] = padded(tensors[name], buffer)
        return state

    return gather


def padded(packed: Tensor, buffer: Any) -> Tensor:
    """`packed`, the buckets of a buffer one behind the other `[sum of their sizes]`, at their places `[its size]`."""
    result = packed.new_zeros(buffer.numel)
    taken = 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        result[bucket.offset : bucket.offset + size] = packed[taken : taken + size]
        taken += size
    return result


def _keeping_steps(part: Any, put: Method) -> Method:
    def put_with_step(parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        present = part._get_main_param_and_optimizer_states(parameter)
        put(parameter, {name: tensors.get(name, value) for name, value in present.items()})

    return put_with_step


def _own_counters(part: Any, load: Method) -> Method:
    def load_state(state: Any) -> None:
        load(state)
        for held in part.optimizer.state.values():
            if isinstance(held.get("step"), torch.Tensor):
                held["step"] = held["step"].clone()

    return load_state
