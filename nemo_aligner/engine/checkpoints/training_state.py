"""Training checkpoints: a folder that appears whole or not at all.

<folder>/shards/        what is trained of the model, and optimizer, torch_dist; any TP, PP, DP reads them
<folder>/rng_<rank>.pt  random number generators of each rank
<folder>/state.json     step, consumed samples and whatever the caller adds; sizes of the other files
<folder>/SHA256SUMS     sums of all of them

While it is written the folder is called <folder>.partial, which no reader looks at.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from nemo_aligner.checksums import sums_of, write_sums
from nemo_aligner.engine.checkpoints.checkpoint_folder import (
    FORMAT,
    PARTIAL,
    STATE,
    check_sizes,
    read_state,
    remove_unfinished,
)
from nemo_aligner.engine.checkpoints.optimizer_state import restore, sharded_state
from nemo_aligner.engine.checkpoints.sharded import (
    end_save,
    load_sharded,
    plan_save,
    without_extra_state,
    without_frozen,
)
from nemo_aligner.engine.checkpoints.streamed import Streamed
from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.engine.processes.cuda_on_cpu import cuda_type_names
from nemo_aligner.errors import CheckpointError, OutputError
from nemo_aligner.files import fsync, fsync_tree, writing
from nemo_aligner.ranks import together

log = logging.getLogger(__name__)


def _sharded(model: MegatronModule, optimizer: MegatronOptimizer | None, *, loading: bool) -> dict[str, Any]:
    weights = without_extra_state(model.sharded_state_dict(prefix="model."))
    saved = without_frozen(weights, model, "model.")
    if optimizer is None:
        return saved
    with cuda_type_names():
        return {**saved, "optimizer": sharded_state(optimizer, weights, loading=loading)}


def save(
    folder: Path, model: MegatronModule, optimizer: MegatronOptimizer | None, state: dict[str, Any], cluster: Cluster
) -> None:
    """Write a checkpoint in place of any of that name; collective.

    What killed saves left in the same folder is removed first. Raises OutputError on every rank when one cannot write,
    and then leaves nothing behind.
    """
    _begin(folder, model, optimizer, state, cluster, background=False).finish()


def save_in_background(
    folder: Path, model: MegatronModule, optimizer: MegatronOptimizer | None, state: dict[str, Any], cluster: Cluster
) -> Saving:
    """As `save`, by a thread of each rank, from a copy of all that is saved; one at a time. Collective."""
    return _begin(folder, model, optimizer, state, cluster, background=True)


def _begin(
    folder: Path,
    model: MegatronModule,
    optimizer: MegatronOptimizer | None,
    state: dict[str, Any],
    cluster: Cluster,
    *,
    background: bool,
) -> Saving:
    partial = folder.with_name(folder.name + PARTIAL)
    with _nothing_left(partial, cluster):
        with together(cluster), writing(folder):
            if cluster.is_main:
                remove_unfinished(folder.parent)
                (partial / "shards").mkdir(parents=True)
        shards = _sharded(model, optimizer, loading=False)
        planned = plan_save(shards, partial / "shards", Streamed(copies=background))
        with together(cluster), writing(folder):
            # torch writing to a file says "unexpected pos" of a full disk; a plain write says what it is
            buffer = io.BytesIO()
            torch.save(_rng_state(), buffer)
            (partial / f"rng_{cluster.rank}.pt").write_bytes(buffer.getvalue())
        saving = Saving(folder, planned, state, cluster)
        if background:
            threading.Thread(target=saving.write, name=f"saving {folder.name}").start()
        else:
            saving.write()
        return saving


class Saving:
    """A checkpoint whose parts are being written; implements interfaces.Saving."""

    def __init__(self, folder: Path, planned: AsyncRequest, state: dict[str, Any], cluster: Cluster) -> None:
        self._folder, self._partial = folder, folder.with_name(folder.name + PARTIAL)
        self._planned, self._state, self._cluster = planned, state, cluster
        self._sums: Future[dict[str, str]] = Future()

    def write(self) -> None:
        """This rank's part, on the disk, and the sums of its files: all that takes time, and nothing collective."""
        try:
            self._planned.async_fn()  # keeps its own faults for the end
            files = [self._partial / f"rng_{self._cluster.rank}.pt", *self._own_shards()]
            for path in files:
                fsync(path)
            self._sums.set_result(sums_of(self._partial, files))
        except BaseException as fault:
            self._sums.set_exception(fault)
            if not isinstance(fault, Exception):
                raise

    def _own_shards(self) -> Iterable[Path]:
        return (self._partial / "shards").glob(f"__{self._cluster.rank}_*")

    def done(self) -> bool:
        """Whether every rank has written its part; collective."""
        return not self._cluster.any(not self._sums.done())

    def finish(self) -> None:
        """Wait until it is written, and give it its name; collective. Raises OutputError on every rank."""
        with _nothing_left(self._partial, self._cluster):
            sums: dict[str, str] = {}
            with together(self._cluster), writing(self._folder):
                sums = self._sums.result()
            with together(self._cluster), writing(self._folder):
                end_save(self._planned, self._partial / "shards")
            known = {name: each for part in self._cluster.gather_ranks(sums) for name, each in part.items()}
            with together(self._cluster), writing(self._folder):
                if self._cluster.is_main:
                    _publish(self._partial, self._folder, self._state, known)


@contextmanager
def _nothing_left(partial: Path, cluster: Cluster) -> Iterator[None]:
    """A save that fails, which it does on every rank, leaves no files behind."""
    try:
        yield
    except OutputError:
        if cluster.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, folder: Path, state: dict[str, Any], known: Mapping[str, str]) -> None:
    """Complete `partial` with its state file, make it durable, and give it its name; some sums are `known`."""
    files = {
        str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
    }
    (partial / STATE).write_text(json.dumps({"format": FORMAT, **state, "files": files}, indent=1))
    write_sums(partial, known)
    fsync_tree(partial)
    replaced = folder.with_name(f"{folder.name}.replaced{PARTIAL}")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def load(folder: Path, model: MegatronModule, optimizer: MegatronOptimizer | None, cluster: Cluster) -> dict[str, Any]:
    """Read a checkpoint into model and optimizer; returns the caller's state. Collective."""
    state = read_state(folder)
    check_sizes(folder, state.pop("files", {}))
    asked = _sharded(model, optimizer, loading=True)
    loaded = load_sharded(asked, folder / "shards")
    optimizer_state = loaded.pop("optimizer", None)
    weights = {name.removeprefix("model."): value for name, value in loaded.items() if name.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    if optimizer is not None:
        restore(optimizer, asked["optimizer"], optimizer_state, state["optimizer_steps"])
    own = folder / f"rng_{cluster.rank}.pt"
    if own.is_file():
        try:
            _restore_rng(torch.load(own, weights_only=True))
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as fault:
            raise CheckpointError(f"{own}: not a saved random state ({' '.join(str(fault).split())[:200]})") from None
    else:
        log.warning("%s has no random state for rank %d: the run has more ranks than before", folder, cluster.rank)
    return state


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
        state["megatron"] = tensor_parallel.get_cuda_rng_tracker().get_states()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
