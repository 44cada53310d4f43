"""What whole runs of a stage start from: archives of the tiny models, and an environment of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from nemo_aligner.config.cut import AS_STORED, Sizes
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine import loading
from nemo_aligner.engine.checkpoints import nemo_archive
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.tiny import ARCHIVED

MEAN, STD = 0.25, 2.0
"""Stored in the reward model."""


@dataclass(frozen=True)
class Archives:
    """Paths of archives with the byte tokenizer."""

    policy: Path
    other: Path  # a policy with weights of its own
    judge: Path  # a reward model that ends its texts with EOS


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """To be asked for where no cluster is up."""
    folder = tmp_path_factory.mktemp("archives")
    found = Archives(*(folder / f"{name}.nemo" for name in ("policy", "other", "judge")))
    judge = replace(
        ARCHIVED,
        reward_model_type="binary_ranking",
        append_eod=True,
        reward_standardization={"mean": MEAN, "std": STD},
    )
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        for seed, (path, arch) in enumerate([(found.policy, ARCHIVED), (found.other, ARCHIVED), (found.judge, judge)]):
            torch.manual_seed(seed)
            tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
            nemo_archive.save_archive(path, build_model(arch, RunOptions()), arch, tokenizer, cluster)
    return found


@pytest.fixture
def alone() -> Iterator[None]:
    """A run that is a process of its own: it is not one of several, and what it says of itself is forgotten."""
    before = dict(os.environ)
    for name in before:
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith("SLURM_"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, alone: None) -> list[dict[str, Any]]:
    """How each run of the test starts: archive, key, parallel sizes and seed."""
    calls: list[dict[str, Any]] = []
    start = loading.start_for_archive

    def noted(trainer: TrainerConfig, path: str | Path, sizes: Sizes = AS_STORED, **how: Any) -> Any:
        calls.append({"devices": trainer.devices, "path": str(path), "sizes": sizes, **how})
        return start(trainer, path, sizes, **how)

    monkeypatch.setattr(loading, "start_for_archive", noted)
    return calls


@pytest.fixture
def never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said before any process starts."""

    def start(*args: Any, **how: Any) -> NoReturn:
        raise AssertionError("the run starts")

    monkeypatch.setattr(loading, "start_for_archive", start)
    monkeypatch.setattr(loading, "start_for_training", start)
