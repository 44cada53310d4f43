"""`exp_manager.create_<name>_logger` and `<name>_logger_kwargs`: NeMo's key names and defaults."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_aligner.errors import ConfigError
from nemo_aligner.extras import install

PACKAGES = {
    "wandb": ("wandb", install("trackers")),
    "mlflow": ("mlflow", install("trackers")),
    "clearml": ("clearml", "pip install clearml"),
    "dllogger": ("dllogger", "pip install git+https://github.com/NVIDIA/dllogger"),
    "neptune": ("neptune", "pip install neptune"),
}
"""By the name in the keys: what must be installed, and how."""

WANDB_LOGGER = (
    "name", "save_dir", "version", "offline", "dir", "id", "anonymous", "project", "log_model", "prefix",
    "checkpoint_name",
)  # fmt: skip
"""What Lightning's WandbLogger takes itself; everything else goes on to wandb.init."""

NEPTUNE_LOGGER = ("api_key", "project", "name", "log_model_checkpoints", "prefix")
"""What Lightning's NeptuneLogger takes itself; everything else goes on to neptune.init_run."""


@dataclass
class MLFlowKwargs:
    """Of Lightning's MLFlowLogger; null = as it has it."""

    experiment_name: str | None = None  # null = exp_manager.name
    run_name: str | None = None  # null = one that MLflow makes up
    tracking_uri: str | None = None  # null = MLFLOW_TRACKING_URI, or the files in save_dir
    tags: dict[str, Any] | None = None
    save_dir: str | None = "./mlruns"
    prefix: str = ""  # of metric names
    artifact_location: str | None = None
    run_id: str | None = None  # go on with this run
    log_model: bool = False  # upload the archive at the end
    synchronous: bool | None = None


@dataclass
class DLLoggerKwargs:
    """Of NeMo's DLLogger."""

    verbose: bool = False
    stdout: bool = False
    json_file: str | None = "./dllogger.json"


@dataclass
class ClearMLKwargs:
    """Of NeMo's ClearMLLogger, which sends metrics and config as part of the model."""

    project: str | None = None  # null = CLEARML_PROJECT, or NeMo
    task: str | None = None  # null = CLEARML_TASK, or "Trainer <exp_manager.name>"
    connect_pytorch: bool = False
    model_name: str | None = None  # null = exp_manager.name
    tags: list[str] | None = None
    log_model: bool = False  # upload the archive at the end
    log_cfg: bool = False  # with log_model: the run's config
    log_metrics: bool = False  # with log_model: the last metrics


def check_logger(name: str, kwargs: Mapping[str, Any]) -> None:
    """That the package of a logger asked for is installed, and takes `kwargs`. Raises ConfigError, naming the key."""
    package, command = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{package} is not installed; {command}", f"exp_manager.create_{name}_logger")
    block = f"exp_manager.{name}_logger_kwargs"
    if name == "wandb":
        _check_names(block, kwargs, WANDB_LOGGER, "wandb", "init")
    if name == "neptune":
        _check_names(block, kwargs, NEPTUNE_LOGGER, "neptune", "init_run")
        if not (kwargs.get("api_key") or os.environ.get("NEPTUNE_API_TOKEN")):
            raise ConfigError("required, unless NEPTUNE_API_TOKEN is set", f"{block}.api_key")
    if name == "clearml" and not kwargs["log_model"]:
        for key in ("log_cfg", "log_metrics"):
            if kwargs[key]:
                raise ConfigError("sent as part of the model; set log_model to True, too", f"{block}.{key}")


def _check_names(block: str, kwargs: Mapping[str, Any], own: tuple[str, ...], package: str, function: str) -> None:
    passed_on = inspect.signature(getattr(importlib.import_module(package), function)).parameters
    for key in kwargs:
        if key not in own and key not in passed_on:
            raise ConfigError(
                f"no such key; neither Lightning's logger nor {package}.{function} has it", f"{block}.{key}"
            )


@dataclass
class LoggersConfig:
    """Where a run logs: TensorBoard and loggers of other packages."""

    name: str = "???"  # of the run
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] | None = field(  # of Lightning's WandbLogger, and of wandb.init
        default_factory=lambda: {"project": None, "name": None}
    )
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: MLFlowKwargs = field(default_factory=MLFlowKwargs)
    create_dllogger_logger: bool = False
    dllogger_logger_kwargs: DLLoggerKwargs = field(default_factory=DLLoggerKwargs)
    create_clearml_logger: bool = False
    clearml_logger_kwargs: ClearMLKwargs = field(default_factory=ClearMLKwargs)
    create_neptune_logger: bool = False
    neptune_logger_kwargs: dict[str, Any] | None = None  # of Lightning's NeptuneLogger, and of neptune.init_run

    def validate(self) -> None:
        for name, kwargs in self.external_loggers().items():
            check_logger(name, kwargs)

    def external_loggers(self) -> dict[str, dict[str, Any]]:
        """Arguments of the loggers asked for besides TensorBoard, by the name in their keys."""
        asked = [name for name in PACKAGES if getattr(self, f"create_{name}_logger")]
        blocks = {name: getattr(self, f"{name}_logger_kwargs") or {} for name in asked}
        return {name: dict(block) if isinstance(block, dict) else asdict(block) for name, block in blocks.items()}


@dataclass
class SampleLoggersConfig(LoggersConfig):
    """Of a run that draws samples, or judges them."""

    log_samples: int = 8  # that TensorBoard, W&B and MLflow show of each validation, policy or output; 0 = none

    def validate(self) -> None:
        super().validate()
        if self.log_samples < 0:
            raise ConfigError(f"{self.log_samples} is below 0", "exp_manager.log_samples")


@dataclass
class OutputLoggersConfig(SampleLoggersConfig):
    """`exp_manager` of a command that writes one file: nothing is logged unless asked for."""

    explicit_log_dir: str | None = None  # null: <output_file>_log
    name: str = "offline"
    create_tensorboard_logger: bool = False
