"""What a checkpoint needs of Megatron's distributed optimizer and does not get as it is.

Each data-parallel rank holds a part of every *bucket*, a stretch of one flat buffer of all parameters:

    buffer   | bucket 0: a b c, padding | bucket 1: d e, padding | ...      places in it: `param_index_map`
    saved    | a b c d e ...                                                without padding, cut by the same places

- Cut so, every parameter after the first padding gets its neighbour's values. `_with_padding` puts the padding back.
- torch's AdamW, in use where neither Transformer Engine nor apex is there, counts steps for each parameter by itself.
  Loading asks for the count before a first step has made it, asks for it again among what was not read, and gives all
  parameters one counter, which then advances once for each of them: `_begin`, `_keeping_steps`, `_own_counters`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Method = Callable[..., Any]


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether its state is cut over data-parallel ranks."""
    return any(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def make_checkpointable(optimizer: MegatronOptimizer) -> None:
    """Let the distributed parts of `optimizer` save and load what they hold; others do so by themselves."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = _with_padding(part, part.get_parameter_state_dp_zero)
            part._set_main_param_and_optimizer_states = _keeping_steps(part, part._set_main_param_and_optimizer_states)
            part.load_state_dict = _own_counters(part, part.load_state_dict)
            if isinstance(part.optimizer, torch.optim.Adam):
                _begin(part.optimizer)


def _begin(adam: torch.optim.Adam) -> None:
    """Its state before the first step, which torch makes at the first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


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
