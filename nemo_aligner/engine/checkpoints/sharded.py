"""Sharded state on disk: megatron-core's torch_dist format, written from any cut of a model, read into any other."""

from __future__ import annotations

import errno
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from nemo_aligner.engine.checkpoints.streamed import Streamed
from nemo_aligner.errors import CheckpointError, OutputError

_METADATA = ".metadata"
_OF_TORCHS_FILE = re.compile("iostream error|PytorchStreamWriter failed writing|unexpected pos")
"""What torch's writer in C++ says when the system refuses: that it did, and not why."""
_SAFE_MODULES = ("torch.distributed.checkpoint.", "collections", "pathlib")
_SAFE_GLOBALS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("io", "BytesIO"),
    ("builtins", "set"),
    ("builtins", "slice"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    *(("torch", name) for name in ("memory_format", "contiguous_format", "strided", "device")),
    ("torch.serialization", "_get_dtype"),
}


class _AllowList(pickle.Unpickler):
    """Reads a pickle, resolving the names that checkpoint metadata is made of and refusing all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE_GLOBALS or (f"{module}.".startswith(_SAFE_MODULES) and "." not in name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


def check_metadata(folder: Path) -> None:
    """Refuse a `.metadata` pickle that could run code, before torch reads it. Raises CheckpointError."""
    path = folder / _METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a torch_dist checkpoint ({_METADATA} is missing)")
    try:
        with path.open("rb") as stream:
            _AllowList(stream).load()
    except Exception as fault:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path}: not accepted as checkpoint metadata: {fault}") from None


def _forget_where_and_when(folder: Path) -> None:
    """Take the folder's path and torch's random number of a save out of the metadata, which no reader asks for.

    So the same state is the same bytes, wherever and however often it is saved.
    """
    path = folder / _METADATA
    with path.open("rb") as stream:
        metadata = _AllowList(stream).load()
    metadata.storage_meta = None
    for parts in (metadata.state_dict_metadata, metadata.storage_data):  # several threads wrote them, in any order
        ordered = sorted(parts.items(), key=lambda part: str(part[0]))
        parts.clear()
        parts.update(ordered)
    path.write_bytes(pickle.dumps(metadata))


def without_extra_state(state: ShardedStateDict) -> ShardedStateDict:
    """Leave out Transformer Engine's `_extra_state` placeholders: they hold nothing here, and peers differ in them."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def without_frozen(state: ShardedStateDict, model: nn.Module, prefix: str) -> ShardedStateDict:
    """Leave out the weights of `model` that are not trained: with adapters, all that belong to the base."""
    frozen = {f"{prefix}{name}" for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def save_sharded(state: ShardedStateDict, folder: Path, strategy: Streamed | None = None) -> None:
    """Write `state` into the existing, empty `folder`; collective. Raises OutputError when the disk says no."""
    planned = plan_save(state, folder, strategy or Streamed())
    planned.async_fn()
    end_save(planned, folder)


def plan_save(state: ShardedStateDict, folder: Path, strategy: Streamed) -> AsyncRequest:
    """Begin to save; collective. What comes next is to call `async_fn` of it, then `end_save`. Raises OutputError."""
    with _disk_faults(folder):
        return dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, async_sharded_save=True)


def end_save(planned: AsyncRequest, folder: Path) -> None:
    """Complete what every rank has written; collective. Raises OutputError on every rank where one could not write."""
    with _disk_faults(folder):
        for finalize in planned.finalize_fns:
            finalize()
        if torch.distributed.get_rank() == 0:
            _forget_where_and_when(folder)


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Raises OutputError for whatever torch and Megatron make of a disk that says no."""
    try:
        yield
    except CheckpointException as found:  # of the ranks that wrote, with what failed on each; only rank 0 is told
        faults = [fault for fault, _ in found.failures.values()]
        fault = faults[0] if faults else OSError("another rank could not")
        said = _refusal(folder, fault)
        raise fault if said is None else OutputError(f"cannot write {folder}: {said}") from found
    except (OSError, RuntimeError) as fault:
        said = _refusal(folder, fault)
        if said is None:
            raise
        raise OutputError(f"cannot write {folder}: {said}") from fault


def _refusal(folder: Path, fault: BaseException) -> str | None:
    """What the disk said, where it is behind a fault of Megatron's or torch's writers; None for any other fault."""
    if isinstance(fault, OSError):
        return fault.strerror or str(fault)
    number = re.search(r"\[Errno (\d+)\]", str(fault))  # in the words of a writer's own thread
    if number is not None:
        return os.strerror(int(number[1]))
    if "No space left" in str(fault):
        return os.strerror(errno.ENOSPC)
    return _asked_again(folder) or str(fault) if _OF_TORCHS_FILE.search(str(fault)) else None


def _asked_again(folder: Path) -> str | None:
    """Why the disk takes no file in `folder`; None where it does."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(1 << 20))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as fault:
        return fault.strerror
    return None


def load_sharded(state: ShardedStateDict, folder: Path, *, may_stay: Sequence[str] | None = None) -> dict[str, Any]:
    """Read into the places `state` describes; collective. Raises CheckpointError naming keys that are missing.

    With `may_stay`, also those that the checkpoint has and nobody asked for, unless their names end in one of these.
    """
    check_metadata(folder)
    try:
        # Megatron calls "unexpected" what was asked for and is not in the checkpoint
        loaded, left, missing = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    except (OSError, ValueError, RuntimeError, EOFError, dist_checkpointing.core.CheckpointingException) as fault:
        raise CheckpointError(f"{folder.name} cannot be read: {' '.join(str(fault).split())[:300]}") from fault
    if missing:
        some = ", ".join(sorted(missing)[:4])
        raise CheckpointError(f"the checkpoint lacks {len(missing)} of the model's tensors, among them {some}")
    unused = [name for name in left if not name.endswith(tuple(may_stay))] if may_stay is not None else []
    if unused:
        some = ", ".join(sorted(unused)[:4])
        raise CheckpointError(f"the checkpoint has {len(unused)} tensors that this model has no place for: {some}")
    return loaded
