"""The first process of a run holds the lock; its other ranks are not refused by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aligner.config.schema import ExpManagerConfig, TrainerConfig
from nemo_aligner.errors import OutputError
from nemo_aligner.stages.run_owner import owning, owning_log_dir

SRUN = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
FIRST = [
    {},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {**SRUN, "SLURM_PROCID": "0"},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
]
LATER = [{"RANK": "1", "WORLD_SIZE": "2"}, {**SRUN, "SLURM_PROCID": "1"}]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", *SRUN, "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("environment", FIRST)
def test_the_first_process_is_alone(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TrainerConfig(devices=2)
    with owning(tmp_path / "out", trainer):
        set_environment(monkeypatch, environment)
        with pytest.raises(OutputError), owning(tmp_path / "out", trainer):
            pass


@pytest.mark.parametrize("environment", LATER)
def test_other_ranks_are_let_through(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TrainerConfig(devices=2)
    with owning(tmp_path / "out", trainer):
        set_environment(monkeypatch, environment)
        with owning(tmp_path / "out", trainer):
            pass


def test_two_tasks_of_srun_that_are_runs_of_their_own_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, LATER[1])
    with (
        owning(tmp_path / "out", TrainerConfig()),
        pytest.raises(OutputError),
        owning(tmp_path / "out", TrainerConfig()),
    ):
        pass


def test_a_log_folder_is_one_output_whatever_the_names_of_its_runs(tmp_path: Path) -> None:
    first, second = (ExpManagerConfig(name=name, explicit_log_dir=str(tmp_path / "log")) for name in "ab")
    with (
        owning_log_dir(first, TrainerConfig()),
        pytest.raises(OutputError, match=r"log/run\.lock"),
        owning_log_dir(second, TrainerConfig()),
    ):
        pass
    assert list((tmp_path / "log").iterdir()) == []
