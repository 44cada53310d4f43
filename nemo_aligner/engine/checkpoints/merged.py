"""The weights of a model with its adapters added, written one after another: they are never all there twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import Tensor, nn

from nemo_aligner.engine.checkpoints.sharded import save_sharded
from nemo_aligner.engine.checkpoints.streamed import Streamed
from nemo_aligner.engine.checkpoints.whole_weights import shards


def save_merged(state: ShardedStateDict, folder: Path, model: Any, prefix: str) -> None:
    """What `save_sharded` writes of `state`, whose names begin with `prefix`, with the adapters of `model` added.

    Raises OutputError when the disk says no.
    """
    newest, makers = _Newest(model.adapters), {}
    weights = dict(model.named_parameters())
    for name, value in state.items():
        weight = weights.get(name.removeprefix(prefix))
        if weight is not None and model.adapters.has(weight):
            for shard in shards(value):
                makers[shard.key, tuple(shard.global_offset)] = _maker(shard, weight, newest)
    save_sharded(state, folder, Streamed(makers))


class _Newest:
    """Adds the adapter to a weight once for all of its parts that follow one another."""

    def __init__(self, adapters: Any) -> None:
        self._adapters = adapters
        self._of: nn.Parameter | None = None
        self._merged: Tensor | None = None

    def __call__(self, weight: nn.Parameter) -> Tensor:
        if weight is not self._of or self._merged is None:
            self._merged = None  # before the next one is there
            self._of, self._merged = weight, self._adapters.merged(weight)
        return self._merged


def _maker(shard: ShardedTensor, weight: nn.Parameter, newest: _Newest) -> Callable[[], Tensor]:
    """`shard` is of `weight` or, as the halves of a gated layer, of a part of it."""
    part = shard.data
    assert part is not None
    size, strides, start = part.shape, part.stride(), part.storage_offset() - weight.storage_offset()
    shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return lambda: newest(weight).as_strided(size, strides, start).reshape(shape)
