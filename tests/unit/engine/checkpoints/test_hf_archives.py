"""A Hugging Face folder stands for an archive: its shape, tokenizer, weights, and what makes it another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash, read_architecture
from nemo_aligner.engine.checks import check_is_reward_model
from nemo_aligner.engine.conversion import export_hf, read_checkpoint, write_part
from nemo_aligner.engine.policy import load_policy, load_policy_for_training
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.reward_model import load_reward_model_for_training
from nemo_aligner.errors import CheckpointError
from scripts.bench.large_checkpoints import write_random_hf_folder

SHAPE = Architecture(2, 64, 96, 4, 300, num_query_groups=2, max_position_embeddings=64, encoder_seq_length=64)
KEY = "pretrained_checkpoint.restore_from_path"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    write_random_hf_folder(folder, SHAPE, shard_bytes=60_000)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=4) as cluster:
        yield cluster


def test_every_byte_that_is_read_makes_it_another_archive_and_nothing_else_does(folder: Path) -> None:
    before = archive_hash(folder)
    (folder / "README.md").write_text("a model")
    (folder / ".cache").mkdir()
    (folder / ".cache/when").write_text("today")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert archive_hash(folder) == before
    found = {before}
    read = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for path in sorted(folder.iterdir()):
        if path.name in read or "model-" in path.name:
            content = bytearray(path.read_bytes())
            content[-2] ^= 1
            path.write_bytes(content)
            found.add(archive_hash(folder))
    assert len(found) == 1 + len(read) + len(list(folder.glob("*.safetensors")))


def test_a_policy_of_a_folder_trains_and_becomes_an_archive(
    folder: Path, cluster: MegatronCluster, tmp_path: Path
) -> None:
    trainer = TrainerConfig(precision="32")
    policy = load_policy_for_training(ModelOverrides(restore_from_path=str(folder)), trainer, cluster)
    policy.save_nemo(tmp_path / "m.nemo")
    rows = [[5, 9, 77, 30, 2], [8, 8, 3]]
    again = load_policy(tmp_path / "m.nemo", cluster, precision="32")
    for one, other in zip(policy.logprobs(rows, 2), again.logprobs(rows, 2), strict=True):
        assert torch.equal(one, other)
    assert again.tokenizer.encode("film") == policy.tokenizer.encode("film")


def test_a_reward_model_grows_from_a_folder_and_a_folder_is_none(folder: Path, cluster: MegatronCluster) -> None:
    settings = ModelOverrides(restore_from_path=str(folder))
    judge = load_reward_model_for_training(
        settings, TrainerConfig(precision="32"), cluster, reward_model_type="binary_ranking"
    )
    policy = load_policy(folder, cluster, precision="32")
    ours, theirs = (model.module.decoder.layers[1].mlp.linear_fc1.weight for model in (judge, policy))
    assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointError, match="is a language model, not a reward model"):
        check_is_reward_model(folder, "gpt_model_file")


def test_a_token_without_a_row_of_weights_is_refused_and_never_read_as_padding(
    folder: Path, cluster: MegatronCluster, tmp_path: Path
) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 301  # the 300 rows are padded to 384
    (folder / "tokenizer.json").write_text(json.dumps(content))
    said = r": the tokenizer has ids up to 301, the model up to 299$"
    with pytest.raises(CheckpointError, match=rf"^{KEY}={folder}{said}"):
        load_policy(folder, cluster, precision="32", key=KEY)
    with pytest.raises(CheckpointError, match=rf"^--input {folder}{said}"):
        write_part(read_checkpoint(folder), tmp_path / "m.nemo", cluster, precision="32")
    assert not (tmp_path / "m.nemo").exists()


def test_faults_name_the_key_and_the_folder(folder: Path, cluster: MegatronCluster, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^--input \S+: a Hugging Face folder already$"):
        export_hf(folder, tmp_path / "back")
    path = min(folder.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=rf"^{KEY}={path}: not a whole safetensors file"):
        load_policy(folder, cluster, precision="32", key=KEY)
    path.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=rf"^{KEY}={folder}: model\.layers\.\d\.mlp\.\S+ is \["):
        load_policy(folder, cluster, precision="32", key=KEY)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=rf"^{KEY}={folder}: the folder has no tokenizer\.json$"):
        read_architecture(folder, key=KEY)
