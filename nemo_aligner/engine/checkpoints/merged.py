"""The weights of a model with its adapters added, written one after another: they are never all there twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import Tensor, nn

from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors
from nemo_aligner.engine.checkpoints.sharded import save_sharded
from nemo_aligner.engine.checkpoints.streamed import Streamed
from nemo_aligner.engine.checkpoints.whole_weights import Newest, shards


def save_merged(state: ShardedStateDict, folder: Path, model: Any, prefix: str) -> None:
    """What `save_sharded` writes of `state`, whose names begin with `prefix`, with the adapters of `model` added.

    Raises OutputError when the disk says no.
    """
    adapters = model.adapters
    weights = {f"{prefix}{name}": weight for name, weight in model.named_parameters() if adapters.has(weight)}
    newest = Newest(
        LazyTensors(
            {name: LazyTensor(weight.to("meta"), partial(adapters.merged, weight)) for name, weight in weights.items()}
        )
    )
    makers = {
        (shard.key, tuple(shard.global_offset)): _maker(shard, name, weight, newest)
        for name, weight in weights.items()
        for shard in shards(state[name])
    }
    save_sharded(state, folder, Streamed(makers))


def _maker(shard: ShardedTensor, name: str, weight: nn.Parameter, newest: Newest) -> Callable[[], Tensor]:
    """`shard` is of `weight` or, as the halves of a gated layer, of a part of it."""
    part = shard.data
    assert part is not None
    size, strides, start = part.shape, part.stride(), part.storage_offset() - weight.storage_offset()
    shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return lambda: newest[name].as_strided(size, strides, start).reshape(shape)
