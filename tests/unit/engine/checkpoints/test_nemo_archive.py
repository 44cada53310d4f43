"""The archive: what goes in comes out, and nothing that is not an archive is read."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine.checkpoints import archive_weights, nemo_archive
from nemo_aligner.engine.checkpoints.sharded import check_metadata
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.loading import load_for_inference
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import load_policy, load_policy_for_training
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import CheckpointError, OutputError
from tests.tiny import ARCHIVED


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def archive(cluster: MegatronCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "model.nemo"
    save(path, cluster)
    return path


def save(path: Path, cluster: MegatronCluster, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_model(ARCHIVED, RunOptions())
    nemo_archive.save_archive(path, model, ARCHIVED, FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER), cluster)
    return model


def test_weights_shape_and_tokenizer_survive(cluster: MegatronCluster, tmp_path: Path) -> None:
    model = save(tmp_path / "m.nemo", cluster)
    loaded = load_for_inference(tmp_path / "m.nemo", cluster, precision="32", key="k")
    assert loaded.arch == ARCHIVED
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("a é\n{}")) == "a é\n{}"
    state = loaded.module.state_dict()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state[name]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.nemo"], "nothing is left beside it"


def test_an_extracted_folder_and_a_dot_slash_archive_are_read_too(
    archive: Path, cluster: MegatronCluster, tmp_path: Path
) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    with tarfile.open(tmp_path / "dot.nemo", "w") as tar:
        tar.add(tmp_path / "folder", arcname=".")
    for path in (tmp_path / "folder", tmp_path / "dot.nemo"):
        assert load_for_inference(path, cluster, precision="32", key="k").arch == ARCHIVED


def test_keys_are_nemos(archive: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    keys = set(FileSystemReader(tmp_path / "model_weights").read_metadata().state_dict_metadata)
    assert "model.decoder.layers.self_attention.linear_qkv.weight" in keys
    assert "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "model.decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys


def test_a_truncated_or_foreign_file_is_refused_in_one_line(
    archive: Path, cluster: MegatronCluster, tmp_path: Path
) -> None:
    data = archive.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "text": b"hello" * 1000, "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"^gpt_model_file={tmp_path / name}"):
            load_for_inference(tmp_path / name, cluster, precision="32", key="gpt_model_file")
    with pytest.raises(CheckpointError, match=r"gpt_model_file=nowhere\.nemo: no such file"):
        nemo_archive.read_architecture("nowhere.nemo", key="gpt_model_file")


@pytest.mark.parametrize("kind", ["..", "absolute", "link", "link out of a folder"])
def test_members_that_leave_the_folder_are_refused_and_nothing_lands_outside(
    kind: str, archive: Path, cluster: MegatronCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would land, lands below tmp_path: that is where the archive is opened."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    names = {
        "..": "../escape",
        "absolute": str(tmp_path / "escape"),
        "link": "escape",
        "link out of a folder": "escape",
    }
    path = tmp_path / "evil.nemo"
    shutil.copy(archive, path)
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(names[kind])
        if kind.startswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd" if kind == "link" else "../../evil.nemo"
        tar.addfile(member, io.BytesIO())
    with pytest.raises(CheckpointError, match=r"^k=\S+evil\.nemo: member '"):
        load_for_inference(path, cluster, precision="32", key="k")
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["evil.nemo", "temporary"]
    with tarfile.open(path) as tar:  # as it would be without the refusal
        tar.extractall(tmp_path / "temporary" / "inside", filter="fully_trusted")
    assert any(found.name == "escape" for found in tmp_path.rglob("*"))


def test_an_archive_lands_in_a_folder_that_is_not_there_yet(cluster: MegatronCluster, tmp_path: Path) -> None:
    save(tmp_path / "a" / "b" / "m.nemo", cluster)
    assert (tmp_path / "a" / "b" / "m.nemo").is_file()


def test_the_hash_of_a_folder_is_of_its_names_and_contents(tmp_path: Path) -> None:
    def hash_of(**files: str) -> str:
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return nemo_archive.archive_hash(folder)

    first = hash_of(a="1", b="2")
    assert hash_of(b="2", a="1") == first
    assert len({first, hash_of(a="2", b="1"), hash_of(a="1", c="2"), hash_of(a="1"), hash_of(a="1", b="3")}) == 5
    (tmp_path / "file").write_text("x")
    assert nemo_archive.archive_hash(tmp_path / "file") == hashlib.sha256(b"x").hexdigest()


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="system"):
        check_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_save_that_fails_leaves_the_old_archive_whole(
    cluster: MegatronCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.nemo"
    save(path, cluster)
    before = nemo_archive.archive_hash(path)
    (tmp_path / ".m.nemo.saving").mkdir()  # what an earlier kill may have left

    def full_disk(*args: object, **how: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nemo_archive, "pack", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        save(path, cluster, seed=2)
    assert nemo_archive.archive_hash(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.nemo"]


def test_a_reward_model_starts_from_a_policys_weights_with_a_head_of_its_own(
    archive: Path, cluster: MegatronCluster
) -> None:
    model = build_model(replace(ARCHIVED, reward_model_type="binary_ranking"), RunOptions())
    with nemo_archive.open_archive(archive, cluster) as folder:
        with pytest.raises(CheckpointError, match="rm_head"):
            archive_weights.load_weights(model, folder, cluster)
        archive_weights.load_weights(model, folder, cluster, new_head=True)
    policy = load_for_inference(archive, cluster, precision="32", key="k").module
    assert torch.equal(model.decoder.layers[0].mlp.linear_fc2.weight, policy.decoder.layers[0].mlp.linear_fc2.weight)


def test_a_tensor_that_the_model_has_no_place_for_is_named(cluster: MegatronCluster, tmp_path: Path) -> None:
    biased = replace(ARCHIVED, qkv_bias=True)
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    nemo_archive.save_archive(tmp_path / "m.nemo", build_model(biased, RunOptions()), biased, tokenizer, cluster)
    with tarfile.open(tmp_path / "m.nemo") as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    config = tmp_path / "folder" / "model_config.yaml"
    config.write_text(config.read_text().replace("qkv_bias: true", "qkv_bias: false"))
    (tmp_path / "folder" / "SHA256SUMS").unlink()  # it is changed on purpose
    with pytest.raises(CheckpointError, match=r"no place for: model\.decoder\.layers.*linear_qkv\.bias"):
        load_for_inference(tmp_path / "folder", cluster, precision="32", key="k")


def test_a_reward_model_is_no_policy(cluster: MegatronCluster, tmp_path: Path) -> None:
    judge = replace(ARCHIVED, reward_model_type="binary_ranking")
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    nemo_archive.save_archive(tmp_path / "rm.nemo", build_model(judge, RunOptions()), judge, tokenizer, cluster)
    with pytest.raises(CheckpointError, match=r"gpt_model_file=.*rm\.nemo is a reward model, not a language model"):
        load_policy(tmp_path / "rm.nemo", cluster, precision="32")
    overrides = ModelOverrides(restore_from_path=str(tmp_path / "rm.nemo"))
    with pytest.raises(CheckpointError, match=r"model\.restore_from_path=.*is a reward model"):
        load_policy_for_training(overrides, TrainerConfig(), cluster)
