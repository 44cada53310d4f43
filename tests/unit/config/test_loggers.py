"""A logger that is asked for is checked before the run: its package, and every keyword that it is given."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import asdict
from typing import Any

import pytest

from nemo_aligner.config.loggers import ClearMLKwargs, check_logger
from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.errors import ConfigError


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages seem to be installed; wandb.init takes `group`, neptune.init_run takes `tags`."""

    def init(project: str, group: str) -> None: ...

    def init_run(project: str, tags: list[str]) -> None: ...

    for name, function in (("wandb", init), ("neptune", init_run)):
        module = types.ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.delenv("NEPTUNE_API_TOKEN", raising=False)


CLEARML = asdict(ClearMLKwargs())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("wandb", {}),
        ("wandb", {"project": "p", "group": "g", "save_dir": "d", "checkpoint_name": "c"}),
        ("neptune", {"api_key": "k", "tags": ["t"], "prefix": "p"}),
        ("clearml", CLEARML),
        ("clearml", {**CLEARML, "log_model": True, "log_cfg": True, "log_metrics": True}),
        ("mlflow", {"anything": 1}),
        ("dllogger", {}),
    ],
)
def test_what_a_logger_takes_is_let_through(packages: None, name: str, kwargs: dict[str, Any]) -> None:
    check_logger(name, kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("wandb", {"project": "p", "tags": 1},
         "wandb_logger_kwargs.tags: no such key; neither Lightning's logger nor wandb.init has it"),
        ("neptune", {"api_key": "k", "group": 1},
         "neptune_logger_kwargs.group: no such key; neither Lightning's logger nor neptune.init_run has it"),
        ("neptune", {}, "neptune_logger_kwargs.api_key: required, unless NEPTUNE_API_TOKEN is set"),
        ("neptune", {"api_key": ""}, "neptune_logger_kwargs.api_key: required, unless NEPTUNE_API_TOKEN is set"),
        ("clearml", {**CLEARML, "log_cfg": True},
         "clearml_logger_kwargs.log_cfg: sent as part of the model; set log_model to True, too"),
        ("clearml", {**CLEARML, "log_metrics": True},
         "clearml_logger_kwargs.log_metrics: sent as part of the model; set log_model to True, too"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_refused_by_its_full_key(
    packages: None, name: str, kwargs: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_logger(name, kwargs)
    assert str(caught.value) == f"exp_manager.{says}"


def test_neptunes_token_may_come_from_its_variable(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEPTUNE_API_TOKEN", "t")
    check_logger("neptune", {})


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("wandb", 'pip install "nemo-aligner[trackers]"'),
        ("mlflow", 'pip install "nemo-aligner[trackers]"'),
        ("clearml", "pip install clearml"),
        ("dllogger", "pip install git+https://github.com/NVIDIA/dllogger"),
        ("neptune", "pip install neptune"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else object())
    with pytest.raises(ConfigError) as caught:
        check_logger(name, {})
    assert str(caught.value) == f"exp_manager.create_{name}_logger: {name} is not installed; {command}"


def test_only_the_loggers_asked_for_are_checked_each_with_its_own_arguments() -> None:
    exp = ExpManagerConfig(name="m", wandb_logger_kwargs={"project": "p"})
    assert exp.external_loggers() == {}
    exp.create_wandb_logger = exp.create_clearml_logger = exp.create_neptune_logger = True
    exp.clearml_logger_kwargs.task = "t"
    assert exp.external_loggers() == {"wandb": {"project": "p"}, "clearml": {**CLEARML, "task": "t"}, "neptune": {}}
