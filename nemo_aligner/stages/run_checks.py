"""Settings that several stages share, checked before torch is imported and a model is loaded."""

from __future__ import annotations

from collections.abc import Collection

from nemo_aligner.config.schema import CheckpointCallbackParams, ExpManagerConfig, OptimConfig
from nemo_aligner.engine.training.schedules import check_schedule
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.checkpoint_names import check_pattern
from nemo_aligner.stages.run_control import parse_duration


def check_training_settings(
    exp: ExpManagerConfig, optim: OptimConfig, logged: Collection[str], save_interval: int
) -> None:
    """Raises ConfigError for checkpoints that cannot be (see `check_monitor`), a duration or a schedule."""
    check_monitor(exp.checkpoint_callback_params, logged)
    if exp.checkpoint_callback_params.save_best_model and not (exp.create_checkpoint_callback and save_interval):
        raise ConfigError(
            "the best of the checkpoints, and none is saved; give save_interval",
            "exp_manager.checkpoint_callback_params.save_best_model",
        )
    if exp.checkpoint_callback_params.async_save and not exp.create_checkpoint_callback:
        raise ConfigError(
            "no checkpoint is saved, with exp_manager.create_checkpoint_callback=False",
            "exp_manager.checkpoint_callback_params.async_save",
        )
    check_duration(exp.max_time_per_run, "exp_manager.max_time_per_run")
    check_schedule(optim.sched)


def check_duration(text: str | None, key: str) -> None:
    """Raises ConfigError for what is neither None nor a duration."""
    if text is not None:
        parse_duration(text, key)


def check_monitor(params: CheckpointCallbackParams, logged: Collection[str]) -> None:
    """Raises ConfigError where `monitor` or `filename` name what is not `logged`, or `mode` is none."""
    block = "exp_manager.checkpoint_callback_params"
    if params.mode not in ("min", "max"):
        raise ConfigError(f"{params.mode!r} is not min or max", f"{block}.mode")
    if params.monitor not in logged:
        raise ConfigError(
            f"{params.monitor!r} is not logged; one of {', '.join(sorted(logged))} is", f"{block}.monitor"
        )
    if params.filename is not None:
        check_pattern(params.filename, logged)
