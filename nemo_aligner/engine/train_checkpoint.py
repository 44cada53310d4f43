"""Training checkpoints: a folder that appears whole or not at all.

<folder>/shards/        model and optimizer, torch_dist; any TP, PP, DP reads them
<folder>/rng_<rank>.pt  random number generators of each rank
<folder>/state.json     step, consumed samples and whatever the caller adds; written last, so it marks completeness
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from nemo_aligner.engine.cpu import cuda_type_names
from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.engine.sharded import fsync_tree, load_sharded, save_sharded, without_extra_state
from nemo_aligner.errors import CheckpointError, OutputError

log = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def _sharded(model: MegatronModule, optimizer: MegatronOptimizer | None, *, loading: bool) -> dict[str, Any]:
    weights = without_extra_state(model.sharded_state_dict(prefix="model."))
    if optimizer is None:
        return weights
    with cuda_type_names():
        optimizer_state = optimizer.sharded_state_dict(
            model.sharded_state_dict(prefix="model."), is_loading=loading, metadata=_RESHARDABLE
        )
    return {**weights, "optimizer": optimizer_state}


def save(
    folder: Path, model: MegatronModule, optimizer: MegatronOptimizer | None, state: dict[str, Any], cluster: Cluster
) -> None:
    """Write a checkpoint; collective. Raises OutputError, and then leaves nothing behind."""
    partial = folder.with_name(f"{folder.name}.partial")
    fault: str | None = None
    if cluster.is_main:
        try:
            shutil.rmtree(partial, ignore_errors=True)  # what a killed save left
            (partial / "shards").mkdir(parents=True)
        except OSError as error:
            fault = f"cannot write {folder}: {error.strerror or error}"
    fault = cluster.broadcast(fault)
    if fault:
        raise OutputError(fault)
    save_sharded(_sharded(model, optimizer, loading=False), partial / "shards")
    torch.save(_rng_state(), partial / f"rng_{cluster.rank}.pt")
    cluster.barrier()
    if cluster.is_main:
        (partial / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1))
        fsync_tree(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    cluster.barrier()


def load(folder: Path, model: MegatronModule, optimizer: MegatronOptimizer | None, cluster: Cluster) -> dict[str, Any]:
    """Read a checkpoint into model and optimizer; returns the caller's state. Collective."""
    state = read_state(folder)
    loaded = load_sharded(_sharded(model, optimizer, loading=True), folder / "shards")
    optimizer_state = loaded.pop("optimizer", None)
    weights = {name.removeprefix("model."): value for name, value in loaded.items() if name.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(optimizer_state)
    own = folder / f"rng_{cluster.rank}.pt"
    if own.is_file():
        _restore_rng(torch.load(own, weights_only=True))
    else:
        log.warning("%s has no random state for rank %d: the run has more ranks than before", folder, cluster.rank)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The state file of a checkpoint. Raises CheckpointError when there is none or it is not ours."""
    try:
        state = json.loads((folder / STATE).read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(f"{folder}: checkpoint format {state['format']} is not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({fault})") from None
    return state


def latest(root: Path) -> Path | None:
    """The complete checkpoint below `root` with the most steps by its state file; incomplete ones are passed over."""
    best: tuple[int, Path] | None = None
    for path in sorted(root.glob("*/")) if root.is_dir() else []:
        try:
            step = int(read_state(path)["step"])
        except CheckpointError as fault:
            log.info("%s", fault)
            continue
        if best is None or step >= best[0]:
            best = step, path
    return best[1] if best else None


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
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
