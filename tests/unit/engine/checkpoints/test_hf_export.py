"""A folder that is written holds one model, and nothing of another that was there before."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.hf_folder import read_hf_folder, write_hf_folder
from nemo_aligner.engine.checkpoints.tokenizer import FastTokenizer, byte_tokenizer
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.errors import CheckpointError, OutputError
from tests.faulty_disk import FaultyDisk
from tests.tiny import ARCHIVED

ARCH = replace(ARCHIVED, precision="32")
SEVERAL, ONE = 20_000, 1 << 30


@pytest.fixture(scope="module", autouse=True)
def weights() -> Iterator[dict[str, torch.Tensor]]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11):
        yield {name: weight.detach() for name, weight in build_model(ARCH, RunOptions()).named_parameters()}


def write(folder: Path, weights: dict[str, torch.Tensor], shard_bytes: int) -> None:
    write_hf_folder(folder, ARCH, weights, FastTokenizer(byte_tokenizer(), ARCH.tokenizer), shard_bytes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [ONE, SEVERAL])
def test_the_same_export_again_and_that_of_other_weights_of_the_shape_replace_what_is_there(
    shard_bytes: int, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    write(tmp_path / "hf", {name: weight + 1 for name, weight in weights.items()}, shard_bytes)
    (tmp_path / "hf/README.md").write_text("kept")
    write(tmp_path / "hf", weights, shard_bytes)
    write(tmp_path / "fresh", weights, shard_bytes)
    assert files(tmp_path / "hf") == files(tmp_path / "fresh") | {"README.md": b"kept"}


@pytest.mark.parametrize(("first", "second"), [(ONE, SEVERAL), (SEVERAL, ONE), (SEVERAL, 2 * SEVERAL)])
def test_files_of_other_weights_are_never_left_in_force(
    first: int, second: int, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    write(tmp_path / "hf", weights, first)
    before = files(tmp_path / "hf")
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/hf: its model\S* would be read too; take"):
        write(tmp_path / "hf", weights, second)
    assert files(tmp_path / "hf") == before


@pytest.mark.parametrize("name", ["chat_template.jinja", "adapter_config.json", "added_tokens.json", "my.safetensors"])
def test_no_file_that_readers_look_at_is_left_beside_an_export(
    name: str, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}: its {name} would be read too"):
        write(tmp_path, weights, ONE)
    assert files(tmp_path) == {name: b"{}"}


@pytest.mark.processes  # none is started, but it takes as long
def test_an_export_that_is_cut_short_over_an_older_one_is_no_model_and_can_be_run_again(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    write(tmp_path / "old", {name: weight + 1 for name, weight in weights.items()}, SEVERAL)
    write(tmp_path / "new", weights, SEVERAL)
    old, new = files(tmp_path / "old"), files(tmp_path / "new")
    unread = 0
    for at in range(1, 1000):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / f"hf_{at}"))
        disk = FaultyDisk(folder, errno.ENOSPC, removals=True)
        try:
            with disk.failing_from(at):
                write(folder, weights, SEVERAL)
            break
        except OutputError:
            pass
        left = {name: content for name, content in files(folder).items() if not name.startswith(".")}
        if left not in (old, new):
            unread += 1
            with pytest.raises(CheckpointError, match=r"the folder has no config\.json$"):
                read_hf_folder(folder)
        write(folder, weights, SEVERAL)
        assert files(folder) == new
    assert unread > 3
