"""The sharded optimizer's state: every number back at its parameter, whatever padding lies between buckets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.engine.checkpoints.optimizer_state import padded
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.stages.supervised.loop import sft_objective
from tests.tiny import rows
from tests.unit.engine.helpers import weights, without_optimizer


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def sharded(cluster: MegatronCluster) -> MegatronTrainable:
    """With several buckets, as gradients go by 10 KiB."""
    model = without_optimizer(cluster)
    optim = OptimConfig(
        name="mcore_distributed_optim", lr=1e-2, weight_decay=0.1, overlap_grad_sync=True, bucket_cap_mb=0.01
    )
    model.add_optimizer(optim, clip_grad=0.0, max_steps=10)
    return model


def test_training_with_several_buckets_goes_on_from_a_checkpoint_as_if_never_stopped(
    cluster: MegatronCluster, tmp_path: Path
) -> None:
    straight, first, second = sharded(cluster), sharded(cluster), sharded(cluster)
    [optimizer] = straight._optimizer.chained_optimizers  # type: ignore[union-attr]
    [buffer] = optimizer.buffers
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    assert [bucket.offset for bucket in buffer.buckets][-1] > sum(sizes[:-1]), "padding lies before the last bucket"
    for step in range(4):
        straight.train_step([rows(seed=step)], sft_objective)
    for step in range(2):
        first.train_step([rows(seed=step)], sft_objective)
    first.save_training_state(tmp_path / "a", {"step": 2})
    assert second.load_training_state(tmp_path / "a")["step"] == 2
    for step in range(2, 4):
        second.train_step([rows(seed=step)], sft_objective)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(second), strict=True))


def test_each_bucket_lies_at_its_offset_and_padding_is_zero() -> None:
    buckets = [SimpleNamespace(offset=at, numel_unpadded=size) for at, size in ((0, 3), (4, 4), (8, 1))]
    found = padded(torch.arange(1.0, 9.0), SimpleNamespace(numel=12, buckets=buckets))
    assert found.tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 8, 0, 0, 0]
