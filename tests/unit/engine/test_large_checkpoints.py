"""A checkpoint larger than memory goes through: tensors are read, turned and written one at a time, bit by bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_aligner.config.architecture import Architecture, padded_vocab_size
from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.engine.checkpoints import archive_tar
from nemo_aligner.engine.checkpoints.hf_settings import INDEX
from nemo_aligner.engine.conversion import export_hf, read_checkpoint, with_first_layers, write_archive
from nemo_aligner.engine.policy import load_policy_for_training
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.errors import CheckpointError
from scripts.bench.large_checkpoints import write_random_hf_folder
from tests.live_bytes import LiveBytes

SHAPE = Architecture(2, 64, 96, 4, 300, num_query_groups=2, max_position_embeddings=64, encoder_seq_length=64)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_through_an_archive_and_back_every_tensor_is_the_same_bits_in_files_of_any_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_tar, "_LONG", 1)
    write_random_hf_folder(tmp_path / "hf", SHAPE, shard_bytes=50_000)
    write_archive(read_checkpoint(tmp_path / "hf"), tmp_path / "m.nemo", precision="bf16", seed=1)
    export_hf(tmp_path / "m.nemo", tmp_path / "back", shard_bytes=30_000)
    shown = re.findall(r"(\w+): 100%.* (\d+)/(\d+) \[.*(?:tensor|MB)/s\]", capsys.readouterr().err)
    assert [name for name, *_ in shown] == ["writing", "packing", "writing"], "a line each where there is no terminal"
    assert all(done == total for _, done, total in shown)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    given, found = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert given.keys() == found.keys() == index["weight_map"].keys()
    assert all(torch.equal(given[name], found[name]) for name in given)
    largest = max(tensor.nbytes for tensor in given.values())
    assert all(file.stat().st_size < max(30_000, largest) + 3000 for file in files)


def test_weights_of_another_shape_than_the_config_says_are_named(tmp_path: Path) -> None:
    write_random_hf_folder(tmp_path / "hf", SHAPE)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    said = rf"^--input {tmp_path}/hf: model\.layers\.0\.mlp\.\S+ is \[\d+, \d+\], and the model's \["
    with pytest.raises(CheckpointError, match=said):
        write_archive(read_checkpoint(tmp_path / "hf"), tmp_path / "m.nemo", precision="bf16", seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_only_num_layers_leaves_layers_out(tmp_path: Path) -> None:
    write_random_hf_folder(tmp_path / "hf", SHAPE)
    write_archive(with_first_layers(read_checkpoint(tmp_path / "hf"), 1), tmp_path / "m.nemo", precision="bf16", seed=1)
    export_hf(tmp_path / "m.nemo", tmp_path / "back")
    given, found = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert found.keys() == {name for name in given if ".layers.1." not in name}
    assert all(torch.equal(given[name], found[name]) for name in found)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"hf: model\.layers\.1\.\S+ is of a layer above the model's 1$"):
        write_archive(read_checkpoint(tmp_path / "hf"), tmp_path / "m.nemo", precision="bf16", seed=1)


def test_no_more_than_a_few_tensors_are_alive_at_once(tmp_path: Path) -> None:
    """What the process takes with all around them is seen in tests/functional/test_large_checkpoints.py."""
    arch = replace(SHAPE, num_layers=12)
    write_random_hf_folder(tmp_path / "hf", arch, shard_bytes=100_000)
    given = tensors(tmp_path / "hf").values()
    largest = padded_vocab_size(arch, 1) * arch.hidden_size * 2
    with LiveBytes() as live:
        write_archive(read_checkpoint(tmp_path / "hf"), tmp_path / "m.nemo", precision="bf16", seed=1)
        export_hf(tmp_path / "m.nemo", tmp_path / "back")
    assert largest < live.peak < 5 * largest < sum(tensor.nbytes for tensor in given) / 2


def test_the_archive_of_a_training_takes_the_memory_of_its_largest_tensor(tmp_path: Path) -> None:
    """Though its weights are parts of one buffer, as with any optimizer those of a gated layer are of one weight."""
    arch = replace(SHAPE, num_layers=6)
    write_random_hf_folder(tmp_path / "hf", arch)
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1) as cluster, LiveBytes() as live:
        given = ModelOverrides(restore_from_path=str(tmp_path / "hf"), precision="bf16")
        model = load_policy_for_training(given, TrainerConfig(precision="bf16"), cluster)
        model.add_optimizer(OptimConfig(name="mcore_distributed_optim"), clip_grad=1.0, max_steps=1)
        sizes = [parameter.detach().nbytes for parameter in model.module.parameters()]
        live.restart()
        before = live.now
        model.save_nemo(tmp_path / "m.nemo")
    other = 1 << 14  # bytes of what is no weight, such as pickled objects, until they are collected
    assert live.peak - before <= max(sizes) + other < sum(sizes) / 3
    assert (tmp_path / "m.nemo").stat().st_size > sum(sizes)
