"""Loggers of other packages: what lies in their stores is what was logged, once, also by a run in two parts."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import struct
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner import loggers
from nemo_aligner.checksums import file_sum
from nemo_aligner.config import loggers as config
from nemo_aligner.config.offline import SamplerConfig
from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.errors import ConfigError, StoppedEarly
from nemo_aligner.stages.run_logger import output_logger, run_logger
from tests.fakes import OneProcess

CONFIG = {
    "name": "m",
    "model": {"optim": {"lr": 0.1, "sched": None}, "betas": [0.9, 0.98], "template": "{input} {output}"},
    "exp_manager": {"neptune_logger_kwargs": {"api_key": "secret"}},
}


def experiment(folder: Path, package: str, **kwargs: Any) -> ExpManagerConfig:
    exp = ExpManagerConfig(explicit_log_dir=str(folder), name="m", create_tensorboard_logger=False)
    typed = {"mlflow": config.MLFlowKwargs, "clearml": config.ClearMLKwargs, "dllogger": config.DLLoggerKwargs}
    setattr(exp, f"create_{package}_logger", True)
    setattr(exp, f"{package}_logger_kwargs", typed.get(package, dict)(**kwargs))
    return exp


def log_steps(exp: ExpManagerConfig, steps: Sequence[int], resumed_at: int | None, end: Exception | None = None) -> int:
    """Log a training and a validation value at each step; the position in the log before the last step."""
    position = 0
    with run_logger(exp, OneProcess(), CONFIG, resumed_at, samples=2) as logger:
        assert logger is not None
        for step in steps:
            position = logger.position
            logger.log(step, "train", {"loss": 1 / step, "lr": step / 1000})
            logger.log(step, "val", {"loss": 2 / step}, samples(step))
        if end is not None:
            raise end
        archive = Path(str(exp.explicit_log_dir)) / "checkpoints" / "m.nemo"
        archive.parent.mkdir(exist_ok=True)
        archive.write_bytes(b"archive")
        logger.archived(archive, "abc")
    return position


def samples(step: int) -> list[dict[str, Any]]:
    return [{"input": f"q{i}", "output": f"{i} at {step}", "reward": i / 2**step, "kl": None} for i in range(3)]


def shown(steps: Sequence[int]) -> list[list[Any]]:
    """Rows of the table that has the first two samples of each step."""
    return [[step, *sample.values()] for step in steps for sample in samples(step)[:2]]


def test_a_run_says_what_it_is_where_it_logs_but_for_secrets(tmp_path: Path) -> None:
    exp = ExpManagerConfig(explicit_log_dir=str(tmp_path), name="m", create_tensorboard_logger=False)
    log_steps(exp, [1], None)
    secrets = {"exp_manager": {"neptune_logger_kwargs": {"api_key": "***"}}}
    assert json.loads((tmp_path / "run.json").read_text())["config"] == CONFIG | secrets


def in_two_parts(exp: ExpManagerConfig) -> None:
    """Steps 1 to 3, told to stop with a checkpoint of step 2, gone on with to step 5."""
    with pytest.raises(StoppedEarly):
        log_steps(exp, [1, 2, 3], None, StoppedEarly("told"))
    lines = (Path(str(exp.explicit_log_dir)) / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    log_steps(exp, [3, 4, 5], len(b"".join(lines[:4])))


def test_mlflow_has_every_value_once_in_one_run_with_config_and_archive(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"file:{tmp_path}/store"
    exp = experiment(tmp_path / "logs", "mlflow", tracking_uri=uri, tags={"who": "me"}, log_model=True)
    exp.validate()
    in_two_parts(exp)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("m")
    assert found is not None, "the experiment has the name of exp_manager"
    [run] = client.search_runs([found.experiment_id])
    for name, top in (("train/loss", 1), ("val/loss", 2)):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == [(step, top / step) for step in (1, 2, 3, 4, 5)]
    assert run.data.params["model/optim/lr"] == "0.1"
    assert run.data.params["model/template"] == "{input} {output}"
    assert run.data.params["exp_manager/neptune_logger_kwargs/api_key"] == "***"
    assert run.data.tags["who"] == "me"
    assert run.info.status == "FINISHED"
    assert run.data.tags["archive_sha256"] == "abc"
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "table/val.json", str(tmp_path))).read_text())
    assert table == {"columns": ["step", "input", "output", "reward", "kl"], "data": shown((1, 2, 3, 4, 5))}
    artifact = client.download_artifacts(run.info.run_id, "model/checkpoints/m/m.nemo", str(tmp_path))
    assert Path(artifact).read_bytes() == b"archive"


@pytest.mark.parametrize(("end", "status"), [(StoppedEarly("told"), "KILLED"), (ValueError("fault"), "FAILED")])
def test_mlflow_is_told_how_a_run_ended(tmp_path: Path, end: Exception, status: str) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"file:{tmp_path}/store"
    with pytest.raises(type(end)):
        log_steps(experiment(tmp_path / "logs", "mlflow", tracking_uri=uri), [1], None, end)
    [run] = MlflowClient(uri).search_runs(["0", *(e.experiment_id for e in MlflowClient(uri).search_experiments())])
    assert run.info.status == status


def test_a_run_that_begins_anew_is_another_run(tmp_path: Path) -> None:
    exp = experiment(tmp_path / "logs", "mlflow", tracking_uri=f"file:{tmp_path}/store")
    ids = []
    for resumed_at in (None, 0, None):
        log_steps(exp, [1], resumed_at)
        ids.append(json.loads((tmp_path / "logs/loggers.json").read_text())["mlflow"])
    assert len(set(ids)) == 3


def test_without_a_uri_mlflow_takes_the_variable_or_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_steps(experiment(tmp_path / "logs", "mlflow", save_dir=str(tmp_path / "runs")), [1], None)
    assert list((tmp_path / "runs").glob("*/*/metrics/train/loss"))


@pytest.mark.parametrize(
    ("change", "runs"), [(None, 1), ("trainer.devices", 1), ("data.n", 2), ("made_with", 2), ("stopped", 1)]
)
def test_a_command_run_again_stands_once_where_it_logs_and_one_that_makes_something_else_apart(
    tmp_path: Path, change: str | None, runs: int
) -> None:
    from mlflow.tracking import MlflowClient

    cfg, uri = SamplerConfig(output_file=str(tmp_path / "out.jsonl")), f"file:{tmp_path}/store"
    Path(cfg.output_file).write_text("rows")
    cfg.exp_manager.create_mlflow_logger, cfg.exp_manager.mlflow_logger_kwargs.tracking_uri = True, uri
    made_with = {"archive": "a"}

    def run(is_stopped: bool = False) -> None:
        with contextlib.suppress(StoppedEarly), output_logger(cfg, OneProcess(), made_with) as logger:
            assert logger is not None
            if is_stopped:
                raise StoppedEarly("told")
            logger.log(0, "sampler", {"samples": 4}, samples(1))

    run(is_stopped=change == "stopped")
    if change == "data.n":
        cfg.data.n = 4
    elif change == "trainer.devices":
        cfg.trainer.devices = 2
    elif change == "made_with":
        made_with["archive"] = "b"
    run()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("offline")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == runs
    for one in found:
        assert [m.value for m in client.get_metric_history(one.info.run_id, "sampler/samples")] == [4.0]
        assert one.data.tags["output_sha256"] == file_sum(cfg.output_file)
        assert one.info.status == "FINISHED"


def test_a_command_that_writes_a_file_logs_nothing_unless_asked_to(tmp_path: Path) -> None:
    with output_logger(SamplerConfig(output_file=str(tmp_path / "out.jsonl")), OneProcess(), {}) as logger:
        assert logger is None
    assert list(tmp_path.iterdir()) == []


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format of protobuf messages behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # the rest of a block that holds no header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(message)
            message = b""


def all_records(path: Path) -> list[Any]:
    """With the last, which W&B's own process writes when it has told the run that it is done."""
    end = time.monotonic() + 20
    while True:
        found = [*records(path)]
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < end, f"{path} does not end"
        time.sleep(0.05)


@pytest.mark.processes
def test_wandb_offline_has_every_value_once_in_one_run_with_its_config(tmp_path: Path) -> None:
    exp = experiment(tmp_path / "logs", "wandb", project="p", name="n", offline=True, tags=["t"])
    exp.validate()
    in_two_parts(exp)
    files = sorted((tmp_path / "logs/wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    found = [all_records(file) for file in files]
    rows: list[tuple[float, str, float]] = []
    for record in (record for part in found for record in part if record.HasField("history")):
        values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        step = values["trainer/global_step"]
        rows += [(step, name, value) for name, value in values.items() if name.startswith(("train/", "val/"))]
    steps = (1, 2, 3, 4, 5)
    assert [(s, v) for s, name, v in rows if name == "train/loss"] == [(s, 1 / s) for s in steps]
    assert [(s, v) for s, name, v in rows if name == "val/loss"] == [(s, 2 / s) for s in steps]
    tables = sorted((tmp_path / "logs/wandb").glob("offline-run-*/files/media/table/table/val_*.table.json"))
    found_tables = sorted((json.loads(path.read_text()) for path in tables), key=lambda table: table["data"])
    assert [row for table in found_tables for row in table["data"]] == shown((1, 2, 3, 4, 5))
    assert {tuple(table["columns"]) for table in found_tables} == {("step", "input", "output", "reward", "kl")}
    summaries = [u for part in found for record in part if record.HasField("summary") for u in record.summary.update]
    assert {json.loads(u.value_json) for u in summaries if u.key == "archive_sha256"} == {"abc"}
    runs = [next(record.run for record in part if record.HasField("run")) for part in found]
    assert runs[0].run_id == runs[1].run_id
    assert [(run.project, run.display_name, list(run.tags)) for run in runs] == [("p", "n", ["t"])] * 2
    updates = [u for record in found[0] if record.HasField("config") for u in record.config.update]
    stored = {"/".join(u.nested_key) or u.key: json.loads(u.value_json) for u in updates}
    assert stored["model"]["optim"]["lr"] == 0.1
    assert stored["exp_manager"]["neptune_logger_kwargs"]["api_key"] == "***"
    codes = [record.exit.exit_code for part in found for record in part if record.HasField("exit")]
    assert codes == [75, 0]


class Client:
    """A package's client: remembers what is called on it and on what that gives."""

    def __init__(self, calls: list[tuple[Any, ...]], name: str = "") -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, name: str) -> Client:
        return Client(self._calls, f"{self._name}.{name}".strip("."))

    def __call__(self, *args: Any, **kwargs: Any) -> Client:
        self._calls.append((self._name, *args, kwargs))
        return self


def test_clearml_gets_metrics_config_and_archive_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo.utils.loggers import clearml_logger as nemos

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(nemos, "HAVE_CLEARML_LOGGER", True)
    monkeypatch.setattr(nemos, "Task", Client(calls, "Task"), raising=False)
    monkeypatch.setattr(nemos, "OutputModel", Client(calls, "OutputModel"), raising=False)
    exp = experiment(tmp_path, "clearml", project="p", log_model=True, log_cfg=True, log_metrics=True)
    log_steps(exp, [1, 2], None)
    by_name = {call[0]: call[1:] for call in calls}
    assert by_name["Task.init"][-1]["project_name"] == "p"
    assert "lr: 0.1" in by_name["OutputModel.update_design"][-1]["config_text"]
    assert by_name["OutputModel.update_weights"][-1]["weights_filename"] == str(tmp_path / "checkpoints/m.nemo")
    assert by_name["OutputModel.set_all_metadata"][0]["val/loss"]["value"] == "1.0"
    assert calls[-1][0].endswith("mark_completed")
    with pytest.raises(ValueError, match="fault"):
        log_steps(exp, [1], None, ValueError("fault"))
    assert calls[-1][0].endswith("mark_failed")


def test_dllogger_gets_parameters_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only
    from nemo.utils.loggers import dllogger as nemos

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(nemos, "HAVE_DLLOGGER", True)
    monkeypatch.setattr(nemos, "dllogger", Client(calls), raising=False)
    monkeypatch.setattr(nemos, "Verbosity", Client(calls, "Verbosity"), raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # Slurm's number of this task, where the main rank is not task 0
    log_steps(experiment(tmp_path, "dllogger", json_file=str(tmp_path / "sub/log.json")), [1], None)
    logged = [call[-1] for call in calls if call[0] == "log"]
    assert logged[0]["step"] == "PARAMETER"
    assert logged[0]["data"]["model/optim/lr"] == 0.1
    assert logged[1:] == [
        {"step": 1, "data": {"train/loss": 1.0, "train/lr": 0.001}},
        {"step": 1, "data": {"val/loss": 2.0}},
    ]
    assert calls[-1][0] == "flush"


def test_neptune_gets_a_run_with_values_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import neptune as lightnings

    series: list[tuple[str, float, int]] = []
    fields: dict[str, Any] = {}

    class Field:
        def __init__(self, name: str) -> None:
            self.append = lambda value, step: series.append((name, value, step))
            self.upload = self.fetch = lambda *args: "RUN-1"

    class Run:
        def __setitem__(self, name: str, value: Any) -> None:
            fields[name] = value

        def __getitem__(self, name: str) -> Field:
            return Field(name)

        def wait(self) -> None: ...

        def exists(self, name: str) -> bool:
            return name == "sys/id"

    started: list[dict[str, Any]] = []

    def init_run(**kwargs: Any) -> Run:
        started.append(kwargs)
        return Run()

    class Inactive(Exception):
        pass

    package = {
        "neptune": {"init_run": init_run, "Run": Run},
        "neptune.handler": {"Handler": type("Handler", (), {})},
        "neptune.utils": {"stringify_unsupported": lambda value: value},
        "neptune.exceptions": {"InactiveRunException": Inactive},
        "neptune.types": {"File": types.SimpleNamespace(from_stream=lambda stream: stream.read())},
    }
    for name, content in package.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightnings, "_NEPTUNE_AVAILABLE", True)
    log_steps(experiment(tmp_path, "neptune", api_key="k", project="w/p", tags=["t"]), [1, 2], None)
    assert started == [{"tags": ["t"], "project": "w/p", "api_token": "k"}]
    assert ("training/train/loss", 0.5, 2) in series
    assert ("training/val/loss", 2.0, 1) in series
    assert fields["training/hyperparams"]["model"]["optim"]["lr"] == 0.1
    assert fields["training/model/checkpoints/m"] == b"archive"
    assert fields["training/status"] == "success"


@pytest.mark.parametrize("name", ["clearml", "dllogger", "neptune", "wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named_with_its_key_and_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("wandb", "mlflow"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"^exp_manager.create_{name}_logger: {name} is not installed; pip install "):
        experiment(tmp_path, name).validate()


def test_keyword_arguments_of_no_one_are_refused_by_their_full_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^exp_manager\.wandb_logger_kwargs\.projekt: no such key"):
        experiment(tmp_path, "wandb", projekt="p").validate()
    experiment(tmp_path, "wandb", project="p", group="g", save_dir="d", log_model=False).validate()
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    with pytest.raises(ConfigError, match=r"^exp_manager\.clearml_logger_kwargs\.log_metrics: sent as part"):
        experiment(tmp_path, "clearml", log_metrics=True).validate()


def test_names_and_defaults_are_those_of_nemo_and_lightning() -> None:
    from lightning.pytorch.loggers import MLFlowLogger, NeptuneLogger, WandbLogger
    from nemo.utils.loggers import ClearMLParams, DLLoggerParams, MLFlowParams

    assert asdict(config.ClearMLKwargs()) == asdict(ClearMLParams())
    assert asdict(config.DLLoggerKwargs()) == asdict(DLLoggerParams())
    ours = asdict(config.MLFlowKwargs())
    assert ours.pop("synchronous") is None  # Lightning's, later than NeMo's list
    assert ours == asdict(MLFlowParams())
    assert set(inspect.signature(MLFlowLogger.__init__).parameters) == {"self", "synchronous", *ours}
    for logger, own, given in (
        (WandbLogger, config.WANDB_LOGGER, "experiment"),
        (NeptuneLogger, config.NEPTUNE_LOGGER, "run"),
    ):
        names = [name for name, p in inspect.signature(logger.__init__).parameters.items() if p.kind != p.VAR_KEYWORD]
        assert {*own, "self", given} == set(names)


def test_a_logger_that_fails_on_the_way_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        def log_hyperparams(self, params: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: int) -> None:
            if step == 2:
                raise ConnectionError("server\ngone")

        def log_table(self, *args: Any, step: int) -> None: ...

        def save(self) -> None: ...

    monkeypatch.setitem(loggers._STARTED, "wandb", lambda *args: (Failing(), None))
    with caplog.at_level(logging.WARNING):
        log_steps(experiment(tmp_path, "wandb"), [1, 2, 3], None)
    assert [record.getMessage() for record in caplog.records] == [
        "wandb takes no more of this run (server gone); metrics.jsonl has everything"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_logger_that_does_not_start_is_one_line_with_its_key(tmp_path: Path) -> None:
    exp = experiment(tmp_path, "mlflow", tracking_uri=f"file:{tmp_path}/store", run_id="no such run")
    with pytest.raises(ConfigError, match=r"^exp_manager\.create_mlflow_logger: mlflow does not start: .*no such run"):
        log_steps(exp, [1], None)


def test_other_ranks_start_nothing(tmp_path: Path) -> None:
    class Other(OneProcess):
        is_main = False

    with run_logger(experiment(tmp_path / "logs", "wandb", offline=True), Other(), CONFIG, None) as logger:
        assert logger is None
    assert not (tmp_path / "logs").exists()
