"""What decides the result of a training run: a checkpoint of one run is not gone on from by another."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.engine.interfaces import TrainableModel
from nemo_aligner.errors import CheckpointError

log = logging.getLogger(__name__)


def short_hash(parts: Iterable[bytes]) -> str:
    """Of what stands for data in a message and in a state file."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def tokens_hash(rows: Iterable[Sequence[int]]) -> str:
    """Of token rows, in their order; each ends in a number that no token has."""
    return short_hash(array("q", [*row, -1]).tobytes() for row in rows)


def archive_of(model: TrainableModel) -> str:
    """The archive that training begins from, the same on every rank. Collective."""
    cluster = model.cluster
    return cluster.broadcast(model.archive_hash()[:16] if cluster.is_main else "")


def optimizer_settings(optim: OptimConfig, clip: float) -> dict[str, Any]:
    """What decides a step; a longer run may go on, so the schedule's own length does not count."""
    sched = {name: value for name, value in (optim.sched or {}).items() if name != "max_steps"}
    own = {name: getattr(optim, name) for name in ("name", "lr", "weight_decay", "betas", "eps")}
    return {f"model.optim.{name}": value for name, value in {**own, "sched": sched or None}.items()} | {
        "gradient_clip_val": clip
    }


def check_same_run(checkpoint: Path, made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming what has changed since `checkpoint` was made."""
    for name, value in wanted.items():
        if made_with.get(name) != value:
            raise CheckpointError(
                f"{checkpoint} was made with {name} = {made_with.get(name)}, this run has {value}; choose another "
                "exp_manager.explicit_log_dir, or set exp_manager.resume_if_exists=False"
            )


def tell_resumed(checkpoint: Path, done: int, before: int, now: int) -> None:
    """Say where a run goes on that was begun for `before` steps and now has `now`."""
    if done >= now:
        log.info("%s: %d steps are done, nothing is left to train", checkpoint, done)
        return
    log.info("resuming at step %d of %d from %s", done, now, checkpoint)
    if before != now:
        log.info("the run was begun for %d steps: from here on its schedule is that of %d", before, now)


def tell_end_of_data(steps: int, max_steps: int, block: str) -> None:
    """Say that a run ends before its `max_steps`, the data having been seen `max_epochs` times."""
    if steps < max_steps:
        log.info("%s.max_steps=%d: the data ends after %d steps; more come with max_epochs", block, max_steps, steps)
