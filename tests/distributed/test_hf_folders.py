"""A Hugging Face folder is an archive: every rank takes its own part of its tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import TrainerConfig
from scripts.bench.large_checkpoints import write_random_hf_folder
from tests.distributed.helpers import run_ranks

SHAPES = {
    "odd vocabulary": Architecture(4, 64, 96, 4, 300, num_query_groups=2, max_position_embeddings=64),
    "tied, biased": Architecture(
        4, 64, 96, 4, 259, num_query_groups=2, max_position_embeddings=64, qkv_bias=True,
        share_embeddings_and_output_weights=True,
    ),
}  # fmt: skip
ROWS = [[5, 9, 77, 30, 2], [100, 3, 40, 41, 42, 43], [8, 8]]


def logprobs(cluster: Any, folder: Path) -> list[list[float]]:
    from nemo_aligner.engine.policy import load_policy

    return [row.tolist() for row in load_policy(folder, cluster, precision="32").logprobs(ROWS, 2)]


def compare(cluster: Any, folders: list[Path]) -> None:
    """With what one process found; each rank has the log-probabilities of all rows."""
    for folder in folders:
        expected = json.loads((folder.with_suffix(".json")).read_text())
        for found, row in zip(logprobs(cluster, folder), expected, strict=True):
            assert found == pytest.approx(row, abs=2e-5), folder


def contents(path: Path, cluster: Any) -> dict[str, Any]:
    """Shape, tokenizer and whole tensors of an archive."""
    from nemo_aligner.engine.loading import described_archive

    with described_archive(path, cluster, key="k") as found:
        tensors = {name: found.tensors[name] for name in found.tensors.parts}
        return {"shape": found.arch, "tokenizer": found.tokenizer.files, **tensors}


def imported(cluster: Any, folders: list[Path]) -> None:
    from nemo_aligner.engine.conversion import read_checkpoint, write_part

    for folder in folders:
        write_part(read_checkpoint(folder), folder.with_suffix(".cut.nemo"), cluster, precision="bf16")


def test_an_archive_is_the_same_however_many_processes_write_it(tmp_path: Path) -> None:
    import torch

    from nemo_aligner.engine.processes.cluster import start_cluster

    experts = replace(SHAPES["odd vocabulary"], num_moe_experts=4, moe_router_topk=2, qk_layernorm=True)
    folders = [tmp_path / f"model{i}" for i in range(len(SHAPES) + 1)]
    for folder, arch in zip(folders, (*SHAPES.values(), experts), strict=True):
        write_random_hf_folder(folder, replace(arch, encoder_seq_length=64), shard_bytes=60_000)
    run_ranks(2, imported, folders, tensor=2)
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1) as cluster:
        for folder in folders:
            cut = contents(folder.with_suffix(".cut.nemo"), cluster)
            imported(cluster, [folder])
            whole = contents(folder.with_suffix(".cut.nemo"), cluster)
            assert cut.keys() == whole.keys()
            for name, value in whole.items():
                same = torch.equal(cut[name], value) if isinstance(value, torch.Tensor) else cut[name] == value
                assert same, name


def test_a_folder_cut_over_ranks_gives_the_numbers_of_one_process_and_of_its_archive(tmp_path: Path) -> None:
    from nemo_aligner.engine.conversion import read_checkpoint, write_archive
    from nemo_aligner.engine.processes.cluster import start_cluster

    folders = [tmp_path / f"model{i}" for i in range(len(SHAPES))]
    for folder, arch in zip(folders, SHAPES.values(), strict=True):
        write_random_hf_folder(folder, replace(arch, encoder_seq_length=64), shard_bytes=60_000)
        write_archive(read_checkpoint(folder), folder.with_suffix(".nemo"), precision="32", seed=1)
        with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1) as cluster:
            found = logprobs(cluster, folder)
            assert found == logprobs(cluster, folder.with_suffix(".nemo"))
        folder.with_suffix(".json").write_text(json.dumps(found))
    run_ranks(4, compare, folders, tensor=2, pipeline=2)
