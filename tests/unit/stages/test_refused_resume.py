"""A run that may not go on from what lies there is told so before its model is loaded, which takes minutes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemo_aligner.config.offline import LabelerConfig, SamplerConfig
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig
from nemo_aligner.engine import loading, policy, reward_model
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from nemo_aligner.errors import CheckpointError, OutputError
from nemo_aligner.stages.offline import random_sampler, reward_labeler
from nemo_aligner.stages.reinforce import settings, start
from nemo_aligner.stages.supervised import reward_training, sft
from tests.fakes import OneProcess, RankOfSeveral, on_ranks


class LoadsAModel(Exception):
    pass


@pytest.fixture(autouse=True)
def stops_where_a_model_would_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def one_process(*args: Any, **more: Any) -> Iterator[OneProcess]:
        yield OneProcess()

    def load(*args: Any, **more: Any) -> None:
        raise LoadsAModel

    monkeypatch.setattr(loading, "start_for_training", one_process)
    for engine, name in (
        (policy, "load_policy"),
        (policy, "load_policy_for_training"),
        (reward_model, "load_reward_model"),
        (reward_model, "load_reward_model_for_training"),
    ):
        monkeypatch.setattr(engine, name, load)
    for stage in (sft, reward_training, start, random_sampler, reward_labeler):
        for name in ("check_training", "check_is_policy", "check_is_reward_model", "check_archive"):
            monkeypatch.setattr(stage, name, lambda *args, **more: None, raising=False)
        monkeypatch.setattr(stage, "start_cluster", one_process, raising=False)


def rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text('{"input": "q", "output": "a", "text": "t"}\n' * 2)
    return str(path)


def trainers(folder: Path) -> dict[str, tuple[ModuleType, Any, dict[str, Any]]]:
    """Stage, config and what its steps depend on, by name."""
    supervised, ranked, actor = SFTConfig(), RMConfig(), ReinforceConfig()
    supervised.model.data.train_ds.file_path = rows(folder)
    supervised.exp_manager.checkpoint_callback_params.monitor = "loss"
    ranked.model.data.data_prefix = {"train": [rows(folder)]}
    ranked.exp_manager.checkpoint_callback_params.monitor = "loss"
    actor.model.data.data_prefix = {"train": [rows(folder)]}
    actor.exp_manager.checkpoint_callback_params.monitor = "rewards"
    for cfg in (supervised, ranked, actor):
        cfg.model.restore_from_path = str(folder / "model.nemo")
        cfg.exp_manager.explicit_log_dir = str(folder / "run")
    (folder / "model.nemo").write_bytes(b"model")
    return {
        "SFT": (sft, supervised, sft.settings(supervised)),
        "reward model": (reward_training, ranked, reward_training.settings(ranked)),
        "actor": (start, actor, settings.step_settings(actor)),
    }


def leave_checkpoint(folder: Path, fingerprint: dict[str, Any]) -> None:
    checkpoint = folder / "run/checkpoints/run-step=3-last"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(
        json.dumps({"format": 1, "step": 3, "steps": 9, "files": {}, "fingerprint": fingerprint})
    )


def test_every_rank_is_told_of_a_refused_checkpoint(tmp_path: Path) -> None:
    _, cfg, settings = trainers(tmp_path)["SFT"]
    leave_checkpoint(tmp_path, {})

    def refused(cluster: RankOfSeveral) -> str:
        with pytest.raises(CheckpointError) as fault:
            sft.refuse_other_run(cfg.exp_manager, cluster, cfg.model.restore_from_path, settings)  # type: ignore[arg-type]
        return str(fault.value)

    assert len(set(on_ranks(2, refused))) == 1


@pytest.mark.parametrize("name", ["sampler", "labeler"])
def test_another_runs_journal_is_refused_before_the_load_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Archive:
        append_eod = True

    monkeypatch.setattr(reward_labeler, "read_architecture", lambda path, key: Archive)
    archive, output = tmp_path / "model.nemo", tmp_path / "out.jsonl"
    archive.write_bytes(b"model")
    cfg: Any = {"sampler": SamplerConfig, "labeler": LabelerConfig}[name](gpt_model_file=str(archive))
    cfg.output_file, cfg.data.file_names, cfg.data.hf_dataset = str(output), [rows(tmp_path)], False
    stage = {"sampler": random_sampler, "labeler": reward_labeler}[name]
    given = archive_hash(archive)
    made_with = (
        random_sampler.fingerprint(cfg, given)
        if name == "sampler"
        else reward_labeler.fingerprint(cfg, (given, True), None)
    )
    with pytest.raises(LoadsAModel):
        stage.run(cfg)
    assert not (tmp_path / "out.jsonl_temp").exists()
    folder = tmp_path / "out.jsonl_temp"
    folder.mkdir()
    (folder / "fingerprint.json").write_text(json.dumps(made_with))
    (folder / "rank_0.json").write_text('{"torn')
    with pytest.raises(LoadsAModel):
        stage.run(cfg)
    archive.write_bytes(b"another")
    with pytest.raises(OutputError, match=r"holds progress of another run: gpt_model_file was "):
        stage.run(cfg)
    assert (folder / "rank_0.json").read_text() == '{"torn'
