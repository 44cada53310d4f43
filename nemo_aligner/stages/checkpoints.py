"""Which training checkpoints are kept: the newest, always, and the `save_top_k` best by the monitored value.

    <log dir>/checkpoints/<name>--<monitor>=<value>-step=<s>-consumed_samples=<c>[-last]/
    <log dir>/checkpoints/<name>.nemo

The first is as `filename` has it, where given. Names are for people; what a run resumes from, and whose checkpoint it
is, is read from the state file inside.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.engine.checkpoints.checkpoint_folder import (
    PARTIAL,
    STATE,
    first_whole,
    latest_whole,
    read_state,
    remove,
    remove_unfinished,
)
from nemo_aligner.engine.interfaces import Cluster, Saving, TrainableModel
from nemo_aligner.errors import CheckpointError, ConfigError, ServerError, StoppedEarly, TrainingError
from nemo_aligner.files import writing
from nemo_aligner.stages.checkpoint_names import checkpoint_name, log_dir
from nemo_aligner.stages.run_checks import check_monitor

log = logging.getLogger(__name__)

_LAST = "-last"
_COUNTED = ("step", "consumed_samples")
_OF_ALL_RANKS = (StoppedEarly, TrainingError, ServerError)  # after others the ranks may not be at the same place


class Checkpoints:
    """The checkpoint folder of one training run. Raises ConfigError for a monitor that is never logged."""

    def __init__(
        self, config: ExpManagerConfig, cluster: Cluster, *, metrics: Collection[str], validates: bool
    ) -> None:
        params = config.checkpoint_callback_params
        check_monitor(params, metrics)
        self._monitor, self._sign = params.monitor, 1.0 if params.mode == "max" else -1.0
        if params.monitor.startswith("val_") and not validates:
            log.info(
                "no validation: the newest %d checkpoints are kept, not the best by %s",
                params.save_top_k,
                params.monitor,
            )
            self._monitor, self._sign = "global_step", 1.0
        self.root = log_dir(config) / "checkpoints"
        self.archive = self.root / f"{config.name}.nemo"
        self._name, self._top_k, self._cluster = config.name, params.save_top_k, cluster
        self._pattern = params.filename or f"{config.name}--{{{self._monitor}:.3f}}-{{step}}-{{consumed_samples}}"
        self._archives_best, self._in_background = params.save_best_model, params.async_save
        self._saving: tuple[Saving, str] | None = None  # what is being written, and its name
        self._resume, self._may_begin = config.resume_if_exists, config.resume_ignore_no_checkpoint

    @property
    def logged_before_any(self) -> int | None:
        """`resumed_at` of the metrics where there is no checkpoint: a run that resumes begins its log anew."""
        return 0 if self._resume else None

    def newest(self) -> Path | None:
        """The checkpoint to resume from, the same on every rank.

        Raises ConfigError where there is none and `resume_ignore_no_checkpoint` is False.
        """
        found = latest_whole(self.root) if self._resume and self._cluster.is_main else None
        found = self._cluster.broadcast(found)
        if found is None and self._resume and not self._may_begin:
            raise ConfigError(
                f"no checkpoint to resume from in {self.root}; set it to True to begin anew",
                "exp_manager.resume_ignore_no_checkpoint",
            )
        return found

    def save(
        self, model: TrainableModel, state: dict[str, Any], values: dict[str, float], *, ranked: bool = True
    ) -> None:
        """Write one more checkpoint as the newest, then drop those that need not be kept. Collective.

        One that is there only because the run was stopped (`ranked` False) comes after all that have a value: which is
        the best does not depend on where a run was stopped.
        With `async_save` it is begun, once the one before is there, and `settle` sees to the rest.
        """
        self.settle()
        value = values.get(self._monitor, math.nan) if ranked else math.nan
        label = checkpoint_name(self._pattern, {**values, **{name: state[name] for name in _COUNTED}})
        if self._cluster.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
        self._cluster.barrier()
        name, full = f"{label}{_LAST}", {**state, "monitored": value, "run": self._name}
        if self._in_background:
            self._saving = model.save_in_background(self.root / name, full), name
        else:
            model.save_training_state(self.root / name, full)
            self.drop_others(self.root / name)

    def settle(self, *, wait: bool = True) -> None:
        """Let the checkpoint that is being written appear, now if it is written, or else if `wait`. Collective.

        Raises OutputError on every rank where one could not write.
        """
        if self._saving is None or not (wait or self._saving[0].done()):
            return
        (saving, name), self._saving = self._saving, None
        saving.finish()
        self.drop_others(self.root / name)

    def __enter__(self) -> Checkpoints:
        """Around the steps of a run: a checkpoint that is being written when they end appears."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, _OF_ALL_RANKS):
            self.settle()

    def drop_others(self, newest: Path) -> None:
        """Remove the checkpoints that need not be kept beside `newest`.

        A run that goes on from `newest` does so too: a kill may have kept the one before from it.
        """
        if self._cluster.is_main:
            with writing(self.root):
                remove_unfinished(self.root)
                self._drop_all_but_the_best(newest.name)
        self._cluster.barrier()

    def restore_best(self, model: TrainableModel) -> None:
        """With `save_best_model`: the weights of the best checkpoint take the place of the newest. Collective.

        Raises CheckpointError where every one of them is damaged.
        """
        if not self._archives_best:
            return
        best = self._cluster.broadcast(first_whole(self._ranked(self._own())) if self._cluster.is_main else None)
        if best is None:
            raise CheckpointError(f"{self.root}: no checkpoint is whole, so there is no best one")
        state = model.load_training_state(best)
        log.info("the archive is that of step %d, %s=%g", state["step"], self._monitor, state["monitored"])

    def _drop_all_but_the_best(self, keep: str) -> None:
        others = [path for path in self._own() if path.name != keep]
        best = self._ranked([*others, self.root / keep])
        kept = best if self._top_k < 0 else best[: self._top_k]
        for path in others:
            if path not in kept:
                remove(path)
            elif path.name.endswith(_LAST):
                path.rename(path.with_name(path.name.removesuffix(_LAST)))

    def _own(self) -> list[Path]:
        """This run's checkpoints, and damaged ones."""

        def is_own(path: Path) -> bool:
            try:
                return read_state(path).get("run") == self._name
            except CheckpointError:
                return (path / STATE).is_file()

        return [path for path in self.root.glob("*/") if not path.name.endswith(PARTIAL) and is_own(path)]

    def _ranked(self, paths: Iterable[Path]) -> list[Path]:
        """Best first."""

        def rank(path: Path) -> tuple[float, int]:
            try:
                state = read_state(path)
            except CheckpointError:  # damaged: the first to go
                return -math.inf, -1
            value = float(state["monitored"]) * self._sign
            return (-math.inf if math.isnan(value) else value), int(state["step"])

        return sorted(paths, key=rank, reverse=True)
