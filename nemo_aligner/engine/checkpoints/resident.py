"""Weights that stay in memory from one stage to the next, where one process runs several (`aligner loop`).

What stays is plain tensors in the CPU's memory, those of one policy and of one reward model at most, under the hash of
the archive that holds the same. A stage builds its model as ever and takes them in place of what it would read from
there: models, optimizers, process groups and random numbers are those of a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.module import MegatronModule
    from torch import Tensor

    from nemo_aligner.engine.checkpoints.tokenizer import ArchiveTokenizer
    from nemo_aligner.engine.processes.cluster import MegatronCluster


@dataclass(frozen=True)
class Resident:
    """This rank's weights of an archive, as a model in `dtype` had them, and the tokenizer."""

    digest: str  # of the archive
    dtype: torch.dtype
    cut: tuple[int, ...]
    weights: Mapping[str, Tensor]
    tokenizer: ArchiveTokenizer


_EXTRA = "_extra_state"  # of modules of Transformer Engine, which archives do not hold

_residents: dict[bool, Resident] | None = None
"""By whether it is a reward model; None: nothing stays, as nothing comes after the stage of this process."""


def stay_from_now_on() -> None:
    """Say that this process runs one stage after another."""
    global _residents
    _residents = {}


def digest_of(path: str | Path, cluster: MegatronCluster) -> str | None:
    """sha256 of the archive, the same on every rank; None where nothing stays in memory. Collective."""
    if _residents is None:
        return None
    return cluster.broadcast(archive_hash(path) if cluster.is_main else "")


def leave(
    model: MegatronModule, arch: Architecture, tokenizer: ArchiveTokenizer, digest: str, cluster: MegatronCluster
) -> None:
    """Leave the weights of `model`, which are those of the archive of this hash, to the stage after this one.

    Nothing is copied where the model is in the CPU's memory, so that nobody may change it any more.
    """
    if _residents is not None:
        dtype = next(model.parameters()).dtype
        named = model.state_dict().items()
        weights = {name: value.detach().cpu() for name, value in named if not name.endswith(_EXTRA)}
        _residents[_is_judge(arch)] = Resident(digest, dtype, _cut(cluster, len(model.chunks)), weights, tokenizer)


def take(
    arch: Architecture, digest: str | None, dtype: torch.dtype, cluster: MegatronCluster, chunks: int = 1
) -> Resident | None:
    """What stayed of the archive of this hash, on every rank or on none; whatever else of its kind stayed goes.

    `chunks` of a rank are what the model is to have. Collective.
    """
    if _residents is None:
        return None
    found = _residents.pop(_is_judge(arch), None)
    wanted = (digest, dtype, _cut(cluster, chunks))
    fits = found is not None and (found.digest, found.dtype, found.cut) == wanted
    return None if cluster.any(not fits) else found


def _is_judge(arch: Architecture) -> bool:
    return arch.reward_model_type is not None


def _cut(cluster: MegatronCluster, chunks: int) -> tuple[int, ...]:
    """Which part of the weights this rank has, which are in `chunks`."""
    return (cluster.rank, cluster.world_size, cluster.tp, cluster.pp, chunks, cluster.ep, cluster.etp)


def fill(model: MegatronModule, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into a model of the same archive, dtype and cut."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    missing = [name for name in missing if not name.endswith(_EXTRA)]
    assert not missing, missing
    assert not unexpected, unexpected
