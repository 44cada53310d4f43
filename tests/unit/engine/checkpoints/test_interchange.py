"""NeMo's SaveRestoreConnector unpacks our archive, and we load the one that it packs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash, save_archive
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.loading import load_for_inference
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.quiet_nemo import quiet_nemo
from tests.tiny import ARCHIVED


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def connector() -> Any:
    with quiet_nemo():
        from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
    return SaveRestoreConnector()


def test_nemo_unpacks_what_we_pack_and_we_load_what_nemo_packs(
    cluster: MegatronCluster, connector: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = build_model(ARCHIVED, RunOptions())
    ours, folder, nemos = tmp_path / "ours.nemo", tmp_path / "folder", tmp_path / "nemos.nemo"
    save_archive(ours, model, ARCHIVED, FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER), cluster)
    folder.mkdir()
    connector._unpack_nemo_file(path2file=str(ours), out_folder=str(folder))
    config = OmegaConf.to_container(OmegaConf.load(folder / connector.model_config_yaml))  # as its restore_from does
    assert config == ARCHIVED.to_nemo()
    connector._make_nemo_file_from_folder(filename=str(nemos), source_dir=str(folder))
    assert archive_hash(nemos) != archive_hash(ours), "it packs another way: ./ before every name"
    for path in (folder, nemos):
        loaded = load_for_inference(path, cluster, precision="32", key="k")
        assert loaded.arch == ARCHIVED
        assert loaded.tokenizer.files == {"tokenizer.json": byte_tokenizer()}
        state = loaded.module.state_dict()
        for name, value in model.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, state[name]), name
