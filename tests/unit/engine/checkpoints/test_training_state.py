"""Training checkpoints: whole or not at all, found when whole, refused when damaged, and never run as code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints import streamed, training_state
from nemo_aligner.engine.checkpoints.checkpoint_folder import latest, latest_whole
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.errors import CheckpointError, OutputError
from nemo_aligner.stages.supervised.loop import sft_objective
from tests.tiny import rows, trainable
from tests.unit.engine.helpers import weights


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture
def model(cluster: MegatronCluster) -> MegatronTrainable:
    model = trainable(cluster)
    model.train_step([rows()], sft_objective)
    return model


def killed(*_: Any) -> None:
    raise SystemExit(137)


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


MOMENTS = {"shards": (streamed, "_write_item"), "random state": (training_state, "_rng_state"),
           "end": (training_state, "fsync_tree")}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_save_leaves_the_one_before_usable_and_is_cleared_away_by_the_next(
    moment: str, cluster: MegatronCluster, model: MegatronTrainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_training_state(tmp_path / "first", {"step": 1})
    at_first = weights(model)
    model.train_step([rows(seed=1)], sft_objective)
    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS[moment], killed)
        with pytest.raises(SystemExit):
            model.save_training_state(tmp_path / "second", {"step": 2})
    assert latest(tmp_path) == tmp_path / "first"
    other = trainable(cluster)
    assert other.load_training_state(tmp_path / "first")["step"] == 1
    assert all(torch.equal(a, b) for a, b in zip(at_first, weights(other), strict=True))
    model.save_training_state(tmp_path / "third", {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "third"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_said_and_leaves_nothing_behind(
    moment: str, model: MegatronTrainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*MOMENTS[moment], disk_full)
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path / 'full'}\S*: No space left on device$"):
        model.save_training_state(tmp_path / "full", {"step": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What the disk waits for."""
    go, write = threading.Event(), streamed._write_item

    def slow(*args: Any) -> Any:
        assert go.wait(20)
        return write(*args)

    monkeypatch.setattr(streamed, "_write_item", slow)
    return go


def test_what_is_saved_in_the_background_is_how_it_was_and_not_there_before_it_is_whole(
    cluster: MegatronCluster, tmp_path: Path, held: threading.Event
) -> None:
    model, other = trainable(cluster), trainable(cluster)
    model.train_step([rows()], sft_objective)
    saving = model.save_in_background(tmp_path / "a", {"step": 1})
    model.train_step([rows(seed=1)], sft_objective)
    went_on = weights(model)
    model.train_step([rows(seed=2)], sft_objective)
    assert not saving.done()
    assert latest(tmp_path) is None, "a kill now leaves what was there before"
    held.set()
    saving.finish()
    assert saving.done()
    assert latest_whole(tmp_path) == tmp_path / "a"
    assert other.load_training_state(tmp_path / "a")["step"] == 1
    other.train_step([rows(seed=1)], sft_objective)
    assert all(torch.equal(a, b) for a, b in zip(went_on, weights(other), strict=True))


def test_a_full_disk_in_the_background_is_said_when_the_save_ends(
    model: MegatronTrainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_write_item", disk_full)
    saving = model.save_in_background(tmp_path / "full", {"step": 1})
    model.train_step([rows(seed=1)], sft_objective)
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path / 'full'}\S*: No space left on device$"):
        saving.finish()
    assert list(tmp_path.iterdir()) == []


def test_of_torchs_own_faults_a_full_disk_is_one_that_the_user_can_mend(
    model: MegatronTrainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(fault)

    monkeypatch.setattr("nemo_aligner.engine.checkpoints.sharded.dist_checkpointing.save", fails)
    fault = "[enforce fail at inline_container.cc:626] . write failed: No space left on device"
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/full\S*: No space left on device$"):
        model.save_training_state(tmp_path / "full", {"step": 1})
    assert list(tmp_path.iterdir()) == []
    fault = f"Worker failure: [Errno 122] Disk quota exceeded: '{tmp_path}/full.partial/shards/__0_0.distcp'"
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/full\S*: Disk quota exceeded$"):
        model.save_training_state(tmp_path / "full", {"step": 1})
    fault = "a fault of the program"
    with pytest.raises(RuntimeError, match=r"^a fault of the program$"):
        model.save_training_state(tmp_path / "full", {"step": 1})


def test_a_folder_that_cannot_be_made_is_named(model: MegatronTrainable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/file/a: Not a directory$"):
        model.save_training_state(tmp_path / "file" / "a", {"step": 1})


def test_saving_under_a_name_in_use_replaces_what_was_there(model: MegatronTrainable, tmp_path: Path) -> None:
    model.save_training_state(tmp_path / "same", {"step": 1})
    model.train_step([rows(seed=1)], sft_objective)
    model.save_training_state(tmp_path / "same", {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["same"]
    now = weights(model)
    model.train_step([rows(seed=2)], sft_objective)
    assert model.load_training_state(tmp_path / "same")["step"] == 2
    assert all(torch.equal(a, b) for a, b in zip(now, weights(model), strict=True))


@pytest.mark.parametrize("damage", ["shortened", "missing"])
@pytest.mark.parametrize("pattern", ["shards/*.distcp", "shards/.metadata", "rng_0.pt"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_file_name(
    damage: str, pattern: str, model: MegatronTrainable, tmp_path: Path
) -> None:
    model.save_training_state(tmp_path / "sound", {"step": 1})
    model.save_training_state(tmp_path / "damaged", {"step": 2})
    victim = next(iter(sorted((tmp_path / "damaged").glob(pattern))))
    if damage == "missing":
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size - 1)
    assert latest(tmp_path) == tmp_path / "sound"
    said = "it is missing" if damage == "missing" else f"it has {victim.stat().st_size} bytes"
    with pytest.raises(CheckpointError, match=f"{victim.name}: not as it was saved: {said}, "):
        model.load_training_state(tmp_path / "damaged")


@pytest.mark.parametrize("pattern", ["shards/*.distcp", "shards/.metadata", "rng_0.pt", "state.json"])
def test_a_flipped_bit_is_found_and_the_run_goes_on_from_the_newest_whole_checkpoint(
    pattern: str, model: MegatronTrainable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        model.save_training_state(tmp_path / f"step{step}", {"step": step, "note": "a" * 30})
    assert latest_whole(tmp_path) == tmp_path / "step3"
    victim = next(iter(sorted((tmp_path / "step3").glob(pattern))))
    content = bytearray(victim.read_bytes())
    place = content.index(b"aaaa") if pattern == "state.json" else len(content) // 2
    content[place] ^= 2
    victim.write_bytes(content)
    with caplog.at_level("WARNING"):
        assert latest_whole(tmp_path) == tmp_path / "step2"
    said = f"damaged, the next one is taken: {victim}: not as it was saved, by SHA256SUMS: its bytes are others"
    assert [line for line in caplog.messages if line.startswith(said)]
    assert latest(tmp_path) == tmp_path / "step3", "without a look at every byte"
    (tmp_path / "step3" / "SHA256SUMS").unlink()
    assert latest_whole(tmp_path) == tmp_path / "step3", "as those of earlier versions"


def test_random_numbers_go_on_where_the_save_left_them(model: MegatronTrainable, tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), float(torch.randn(()))

    model.save_training_state(tmp_path / "a", {"step": 1})
    expected = draw()
    draw()
    model.load_training_state(tmp_path / "a")
    assert draw() == expected


class Planted:
    """Unpickled the usual way, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["shards/.metadata", "rng_0.pt"])
def test_code_hidden_in_a_checkpoint_is_not_run(name: str, model: MegatronTrainable, tmp_path: Path) -> None:
    folder, trace = tmp_path / "a", tmp_path / "trace"
    model.save_training_state(folder, {"step": 1})
    if name.endswith(".pt"):
        torch.save(Planted(trace), folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Planted(trace)))
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = (folder / name).stat().st_size  # as one who plants it would
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError):
        model.load_training_state(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Planted(trace)))
    assert trace.exists(), "the planted code works where it is run"
