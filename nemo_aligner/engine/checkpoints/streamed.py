"""How tensors of a sharded state get into files: one after another, at once or later, without a second copy of all.

Megatron's own writer first copies every tensor that is a part of another, which with the distributed optimizer are all
weights, and of a gated layer the two halves with any. torch's keeps those that it copied until its file is complete.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, _wrap_exception
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

_FORMAT = SerializationFormat.TORCH_SAVE

Makers = Mapping[tuple[str, tuple[int, ...]], Callable[[], Tensor]]
"""By name and offset: what gives a tensor that is to be written in the place of the state's own."""


class Streamed(TorchDistSaveShardedStrategy):
    """Megatron's format, one tensor after another.

    `copies`: of the tensors as they are now, in the memory of the CPU, so that they may change before they are written.
    """

    def __init__(self, makers: Makers | None = None, *, copies: bool = False) -> None:
        super().__init__("torch_dist", 1)
        self._makers, self._copies = makers or {}, copies

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> AsyncRequest:
        """Plan the save with the other ranks; writing this rank's part, and the end of it, are left to be called."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        if self._copies:
            state = {key: [_copy(part) for part in parts] for key, parts in state.items()}
        writer = _Writer(checkpoint_dir)
        planner = _Planner(self._makers)
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(state, False), writer, planner=planner)
        return AsyncRequest(writer.write, (), [functools.partial(save_state_dict_async_finalize, *planned)])


def _copy(part: Any) -> Any:
    if not isinstance(part, ShardedTensor) or part.data is None:
        return part
    return dataclasses.replace(part, data=part.data.detach().to("cpu", copy=True))


class _Planner(MCoreSavePlanner):
    def __init__(self, makers: Makers) -> None:
        super().__init__(flatten_state_dict=False)
        self._makers = makers

    def lookup_object(self, index: MetadataIndex) -> Any:
        make = self._makers.get((index.fqn, tuple(index.offset or ())))
        return super().lookup_object(index) if make is None else make()

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object.detach() if isinstance(object, Tensor) else super().transform_object(write_item, object)


class _Writer(FileSystemWriterAsync):
    """Writes when it is told to; what goes wrong then is told to all ranks when they meet at the end."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._part: tuple[SavePlan, SavePlanner] | None = (plan, planner)

    def write(self) -> None:
        assert self._part is not None, "a writer is for one save"
        self._results: list[WriteResult] | WRAPPED_EXCEPTION
        try:
            self._results = self._written(*self._part)
        except Exception as fault:
            self._results = _wrap_exception(fault)
        self._part = None  # copies, where there are any, are needed no more

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        if not plan.items:
            return []
        with Path(self.path, name).open("wb") as stream:
            return [
                _write_item(self.transforms, stream, _ready(planner.resolve_data(item)), item, name, _FORMAT)
                for item in plan.items
            ]

    def retrieve_write_results(self) -> list[WriteResult] | WRAPPED_EXCEPTION:
        return self._results


def _ready(data: Any) -> Any:
    """A tensor in the CPU's memory, and no part of a larger one, all of which torch would write."""
    if not isinstance(data, Tensor):
        return data
    data = data.cpu()
    return data.clone() if data.untyped_storage().nbytes() != data.nbytes else data
