"""W&B, MLflow, ClearML, DLLogger and Neptune, through the logger classes that Lightning and NeMo bring.

Imported (4 s) only where one is asked for. A run that goes on, from a checkpoint or a journal, goes on in the same W&B
and MLflow run, whose ids lie in `<log dir>/loggers.json`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_aligner.config.loggers import LoggersConfig
from nemo_aligner.config.secrets import without_secrets
from nemo_aligner.errors import EXIT_FAILURE, EXIT_STOPPED_EARLY, ConfigError
from nemo_aligner.files import write_atomically
from nemo_aligner.quiet_nemo import quiet_nemo

log = logging.getLogger(__name__)

_IDS, _MADE_WITH = "loggers.json", "made_with"
_EXIT = {"success": 0, "aborted": EXIT_STOPPED_EARLY, "failed": EXIT_FAILURE}


def open_sinks(
    exp: LoggersConfig, folder: Path, config: Mapping[str, Any], *, resumed: bool, made_with: str = ""
) -> list[ExternalLogger]:
    """The loggers that `exp_manager` asks for, started; on the main rank alone.

    `folder` is the log folder, `config` what the run is (hyperparameters). With `resumed` the run goes on where one of
    the same `made_with` was. Raises ConfigError, naming the key, where a logger does not start (no server, no login,
    wrong values).
    """
    asked = exp.external_loggers()
    if not asked:
        return []
    ids: dict[str, str] = {_MADE_WITH: made_with}
    if resumed and (folder / _IDS).is_file():
        found = {_MADE_WITH: "", **json.loads((folder / _IDS).read_text())}
        ids = found if found[_MADE_WITH] == made_with else ids
    sinks = [ExternalLogger(name, exp, folder, kwargs, ids.get(name), resumed) for name, kwargs in asked.items()]
    for sink in sinks:
        sink.log_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _IDS, [json.dumps({**ids, **{sink.name: sink.id for sink in sinks if sink.id}}) + "\n"])
    return sinks


class ExternalLogger:
    """Implements metrics.Sink with a logger of Lightning's protocol.

    `known` is the id under which an earlier part of the run was logged. A logger that fails while the run goes on is
    left out from then on, with one warning: metrics.jsonl has everything.
    """

    def __init__(
        self, name: str, exp: LoggersConfig, folder: Path, kwargs: dict[str, Any], known: str | None, resumed: bool
    ) -> None:
        self.name = name
        given = {key: value for key, value in kwargs.items() if value is not None}
        try:
            self._logger, self.id = _STARTED[name](exp, folder, given, known)
        except Exception as fault:  # each package raises its own
            said = " ".join(str(fault).split()) or type(fault).__name__
            raise ConfigError(f"{name} does not start: {said}", f"exp_manager.create_{name}_logger") from None
        self.continues = resumed and self.id is not None and self.id in (known, *given.values())

    def log_config(self, config: Mapping[str, Any]) -> None:
        if not (self.name == "mlflow" and self.continues):  # a parameter cannot be changed there
            self._guarded(lambda logger: logger.log_hyperparams(without_secrets(config)))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        def send(logger: Any) -> None:
            logger.log_metrics(dict(scalars), step)
            logger.save()

        self._guarded(send)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """W&B has a table for each step, MLflow one that grows; the others have none."""
        columns = ["step", *rows[0]]
        cells = [[step, *row.values()] for row in rows]
        if self.name == "wandb":
            self._guarded(lambda logger: logger.log_table(name, columns, cells, step=step))
        elif self.name == "mlflow":
            table = {column: list(values) for column, values in zip(columns, zip(*cells, strict=True), strict=True)}
            self._guarded(lambda logger: logger.experiment.log_table(logger.run_id, table, f"{name}.json"))

    def note(self, name: str, value: str) -> None:
        """Into W&B's summary, among MLflow's tags; the others have no place for it."""
        if self.name == "wandb":
            self._guarded(lambda logger: logger.experiment.summary.update({name: value}))
        elif self.name == "mlflow":
            self._guarded(lambda logger: logger.experiment.set_tag(logger.run_id, name, value))

    def archived(self, path: Path) -> None:
        # what these loggers ask of a checkpoint callback of Lightning
        saved = SimpleNamespace(
            dirpath=str(path.parent), best_model_path=str(path), best_model_score=None, save_top_k=1, monitor=None
        )
        self._guarded(lambda logger: logger.after_save_checkpoint(saved))

    def close(self, status: str) -> None:
        def end(logger: Any) -> None:
            if self.name == "mlflow":
                logger.finalize("KILLED" if status == "aborted" else status)
            else:
                logger.finalize(status)
            if self.name == "wandb":
                if status == "aborted":
                    logger.experiment.mark_preempting()
                logger.experiment.finish(exit_code=_EXIT[status])

        self._guarded(end)
        self._logger = None

    def _guarded(self, call: Callable[[Any], None]) -> None:
        if self._logger is None:
            return
        try:
            call(self._logger)
        except Exception as fault:
            self._logger = None
            said = " ".join(str(fault).split()) or type(fault).__name__
            log.warning("%s takes no more of this run (%s); metrics.jsonl has everything", self.name, said)


Started = tuple[Any, str | None]
"""A logger, and the id of its run where a later part of the run can go on in it."""


def _wandb(exp: LoggersConfig, folder: Path, kwargs: dict[str, Any], known: str | None) -> Started:
    with quiet_nemo():
        from lightning.pytorch.loggers import WandbLogger

    kwargs["save_dir"] = kwargs.get("save_dir") or kwargs.pop("dir", None) or str(folder)
    if known is not None and not (kwargs.get("version") or kwargs.get("id")):
        kwargs["id"] = known
    os.makedirs(kwargs["save_dir"], exist_ok=True)
    _this_rank_logs()
    logger = WandbLogger(**kwargs)
    return logger, str(logger.experiment.id)


def _mlflow(exp: LoggersConfig, folder: Path, kwargs: dict[str, Any], known: str | None) -> Started:
    with quiet_nemo():
        from lightning.pytorch.loggers import MLFlowLogger

    place = kwargs.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or "file:"
    if place.startswith("file:") or "://" not in place:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask whether files are meant
    kwargs = {"experiment_name": exp.name, **({} if known is None else {"run_id": known}), **kwargs}
    _this_rank_logs()
    logger = MLFlowLogger(**kwargs)
    if "run_id" in kwargs:
        logger.experiment.update_run(kwargs["run_id"], "RUNNING")
    return logger, logger.run_id


def _clearml(exp: LoggersConfig, folder: Path, kwargs: dict[str, Any], known: str | None) -> Started:
    with quiet_nemo():
        from nemo.utils.loggers import ClearMLLogger

    # the archive is handed over once, at the end, and it takes the first one only when told that any will do
    return ClearMLLogger(exp.clearml_logger_kwargs, str(folder), exp.name, save_best_model=False), None


def _dllogger(exp: LoggersConfig, folder: Path, kwargs: dict[str, Any], known: str | None) -> Started:
    with quiet_nemo():
        from nemo.utils.loggers import DLLogger

    _this_rank_logs()
    return DLLogger(**{"json_file": None, **kwargs}), None


def _neptune(exp: LoggersConfig, folder: Path, kwargs: dict[str, Any], known: str | None) -> Started:
    with quiet_nemo():
        from lightning.pytorch.loggers import NeptuneLogger

    _this_rank_logs()
    logger = NeptuneLogger(**kwargs)
    logger.run  # noqa: B018  starts it
    return logger, None


def _this_rank_logs() -> None:
    """Lightning's loggers do nothing where it takes the process for another rank, which it guesses from Slurm's."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = 0  # type: ignore[attr-defined]


_STARTED: dict[str, Callable[[LoggersConfig, Path, dict[str, Any], str | None], Started]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "clearml": _clearml,
    "dllogger": _dllogger,
    "neptune": _neptune,
}
