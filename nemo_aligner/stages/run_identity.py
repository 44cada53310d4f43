"""What decides the result of a training run: a checkpoint of one run is not gone on from by another."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_aligner.config.peft import PeftConfig
from nemo_aligner.config.schema import ExpManagerConfig, ModelOverrides, OptimConfig
from nemo_aligner.engine.checkpoints.checkpoint_folder import latest, read_state
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from nemo_aligner.engine.interfaces import Cluster, TrainableModel
from nemo_aligner.errors import CheckpointError
from nemo_aligner.ranks import together
from nemo_aligner.stages.checkpoint_names import log_dir

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
    return cluster.broadcast(_short(model.archive_hash()) if cluster.is_main else "")


def _short(archive: str) -> str:
    return archive[:16]


def batch_settings(
    global_batch_size: int, seed: int, shuffle: bool, drop_last: bool = False, limit: int | float | None = None
) -> dict[str, Any]:
    """What decides which examples a step is made of; no limit is None, as for checkpoints made before it counted."""
    return {
        "global_batch_size": global_batch_size,
        "model.seed": seed,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "limit_train_batches": limit,
    }


def optimizer_settings(optim: OptimConfig, clip: float) -> dict[str, Any]:
    """What decides a step; a longer run may go on, so the schedule's own length does not count."""
    sched = {name: value for name, value in (optim.sched or {}).items() if name != "max_steps"}
    own = {name: getattr(optim, name) for name in ("name", "lr", "weight_decay", "betas", "eps")}
    return {f"model.optim.{name}": value for name, value in {**own, "sched": sched or None}.items()} | {
        "gradient_clip_val": clip
    }


def adapter_settings(peft: PeftConfig) -> dict[str, Any]:
    """Whether an adapter is trained, and which."""
    if peft.lora is None:
        return {"model.peft": None}
    begun = None if peft.restore_from_path is None else _short(archive_hash(peft.restore_from_path))
    return {"model.peft": {**peft.lora.to_nemo(), "restore_from_path": begun}}


def model_settings(model: ModelOverrides) -> dict[str, Any]:
    """What decides the losses of routers, and which parts a step drops; None = as the archive says."""
    dropouts = {"hidden_dropout": model.hidden_dropout, "attention_dropout": model.attention_dropout}
    return {f"model.{name}": value for name, value in (model.router_settings() | dropouts).items()}


def refuse_other_run(exp: ExpManagerConfig, cluster: Cluster, archive: str, settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError on every rank where the checkpoint to go on from is of another archive or other settings.

    For the time before a model is loaded; the examples, which take its tokenizer, are compared afterwards. Collective.
    """
    with together(cluster):
        newest = latest(log_dir(exp) / "checkpoints", tell=False) if exp.resume_if_exists and cluster.is_main else None
        if newest is not None:
            wanted = {"the archive to start from": _short(archive_hash(archive)), **settings}
            check_same_run(newest, read_state(newest).get("fingerprint", {}), json.loads(json.dumps(wanted)))


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
