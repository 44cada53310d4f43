"""Whole Megatron tensors (TP = PP = 1 names) ⇄ a model's own cut of them, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors
from nemo_aligner.engine.checkpoints.sharded import check_metadata, save_sharded
from nemo_aligner.engine.checkpoints.streamed import Streamed
from nemo_aligner.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """A part of a model's state: which whole tensor it is of, and where it begins there."""

    shard: ShardedTensor
    name: str
    offsets: tuple[int, ...]  # without the axes of layers and experts that Megatron puts in front

    def of(self, whole: Tensor) -> Tensor:
        """This part of the whole tensor. Raises CheckpointError where it is of another shape than the model's."""
        shard = self.shard
        expected = tuple(shard.global_shape[shard.prepend_axis_num :])
        if tuple(whole.shape) != expected:
            raise CheckpointError(f"{self.name} is {list(whole.shape)}, and the model's {list(expected)}")
        for axis, (start, length) in enumerate(zip(self.offsets, shard.local_shape, strict=True)):
            whole = whole.narrow(axis, start, length)
        return whole


def pieces(state: ShardedStateDict, prefix: str) -> Iterator[Piece]:
    """Of a model's sharded state, whose names begin with `prefix`."""
    for key, value in state.items():
        for shard in shards(value):
            front, offsets = (
                shard.global_offset[: shard.prepend_axis_num],
                shard.global_offset[shard.prepend_axis_num :],
            )
            yield Piece(shard, _name(key, shard.key, list(front)).removeprefix(prefix), tuple(offsets))


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def _name(key: str, saved: str, front: list[int]) -> str:
    """The whole tensor that `key` of this rank's state is a part of; `front`: where it is along the axes in front.

    A layer's tensor is named by its own stage's count of layers, an expert's by its own rank's count of experts, and
    its place says which it is of all. Layers that are not alike have no axis: there the name that is `saved` says which
    one it is. Norms are named as modules of their own, also where they are part of Transformer Engine's products.
    """
    if ".local_experts." in key:
        key = re.sub(r"\.local_experts\.\d+\.", f".local_experts.{front.pop()}.", key)
    if not front:
        layer = re.search(r"\.layers\.(\d+)\.", saved)
        if layer is None:
            return saved
        front = [int(layer[1])]
    for fused, own in _FUSED_NORMS.items():
        key = key.replace(fused, own)
    return re.sub(r"\.layers\.\d+\.", f".layers.{front[0]}.", key)


def shards(value: Any) -> Iterator[ShardedTensor]:
    """What an entry of a sharded state is written as."""
    if isinstance(value, ShardedTensorFactory):
        value = value.build()
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from shards(part)


class Newest:
    """Makes a tensor once for all of its parts that follow one another."""

    def __init__(self, whole: Mapping[str, Tensor]) -> None:
        self._whole, self._name, self._tensor = whole, "", torch.empty(0)

    def __getitem__(self, name: str) -> Tensor:
        if name != self._name:
            self._tensor = torch.empty(0)  # before the next one is there
            self._name, self._tensor = name, self._whole[name]
        return self._tensor


@torch.no_grad()
def fill(state: ShardedStateDict, whole: Mapping[str, Tensor], prefix: str) -> None:
    """Copy `whole` tensors into the parameters that `state` is of. Raises CheckpointError for shapes that differ."""
    newest = Newest(whole)
    for piece in pieces(state, prefix):
        assert piece.shard.data is not None
        piece.shard.data.copy_(piece.of(newest[piece.name]).view(piece.shard.data.shape))


def save_whole(state: ShardedStateDict, folder: Path, whole: LazyTensors, prefix: str) -> None:
    """What `save_sharded` writes, with `whole` tensors in the place of the state's own, which may be on meta.

    Raises CheckpointError for shapes that differ, OutputError when the disk says no.
    """
    newest, makers = Newest(whole), {}
    for piece in pieces(state, prefix):
        assert piece.shard.data is not None
        piece.of(whole.parts[piece.name].meta)
        makers[piece.shard.key, tuple(piece.shard.global_offset)] = _maker(piece, newest, piece.shard.data.dtype)
    save_sharded(state, folder, Streamed(makers))


def _maker(piece: Piece, newest: Newest, dtype: torch.dtype) -> Callable[[], Tensor]:
    shape = (1,) * piece.shard.prepend_axis_num + tuple(piece.shard.local_shape)
    return lambda: piece.of(newest[piece.name]).to(dtype).reshape(shape).contiguous()


def archive_tensors(folder: Path, state: ShardedStateDict, prefix: str) -> LazyTensors:
    """The whole tensors of an archive's weights, by a state of the whole model on the meta device.

    Raises CheckpointError naming tensors that are missing, and those that the model has no place for.
    """
    check_metadata(folder)
    reader = checkpoint.FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    own: dict[str, list[Piece]] = {}
    for piece in pieces(state, prefix):
        own.setdefault(piece.name, []).append(piece)
    wanted = {piece.shard.key for parts in own.values() for piece in parts}
    there = {key: one for key, one in metadata.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)}
    missing, other = wanted - there.keys(), there.keys() - wanted
    for which, said in ((missing, "lacks {} of the model's tensors"), (other, "has {} other tensors")):
        names = sorted(name for name in which if not name.endswith("_extra_state"))
        if names:
            raise CheckpointError(f"the checkpoint {said.format(len(names))}, among them {', '.join(names[:4])}")

    def described(parts: Sequence[Piece]) -> LazyTensor:
        shard = parts[0].shard
        assert shard.data is not None
        shape, dtype = shard.global_shape[shard.prepend_axis_num :], shard.data.dtype

        def make() -> Tensor:
            whole = torch.empty(shape, dtype=dtype)
            for piece in parts:
                _read(reader, there[piece.shard.key], piece, piece.of(whole))
            return whole

        return LazyTensor(torch.empty(shape, dtype=dtype, device="meta"), make)

    return LazyTensors({name: described(parts) for name, parts in own.items()})


def _read(reader: checkpoint.FileSystemReader, stored: TensorStorageMetadata, piece: Piece, target: Tensor) -> None:
    """One piece of a checkpoint, whatever pieces it was written in."""
    front = (1,) * piece.shard.prepend_axis_num
    target = target.view((*front, *target.shape))
    if len(piece.shard.global_offset) != len(stored.size) or piece.shard.global_shape != tuple(stored.size):
        expected = list(piece.shard.global_shape)
        raise CheckpointError(f"{piece.shard.key} is {list(stored.size)}, and the model's {expected}")
    chunk = ChunkStorageMetadata(torch.Size(piece.shard.global_offset), target.shape)
    items = create_read_items_for_chunk_list(piece.shard.key, stored, [chunk])
    try:
        reader.read_data(checkpoint.LoadPlan(items), _Into(target)).wait()
    except (OSError, ValueError, RuntimeError, EOFError) as fault:
        raise CheckpointError(f"{piece.shard.key} cannot be read: {' '.join(str(fault).split())[:300]}") from fault


class _Into(checkpoint.DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
