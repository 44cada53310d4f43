"""Training on a GPU: its random numbers are saved with a checkpoint, and are the same when a layer is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from nemo_aligner.stages.supervised.loop import sft_objective
from tests.fakes import ByteTokenizer
from tests.pretend_gpu import pretend_gpu
from tests.tiny import ARCH, OPTIM, rows
from tests.unit.engine.helpers import weights

DROPPING = replace(ARCH, hidden_dropout=0.2, attention_dropout=0.2)


@pytest.fixture(autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with pretend_gpu(), start_cluster(TrainerConfig(accelerator="gpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def trainable(cluster: MegatronCluster, run: RunOptions | None = None, name: str = "adamw") -> MegatronTrainable:
    """With the same weights, and the same random numbers to come, every time."""
    torch.cuda.manual_seed(5)
    run = run or RunOptions()
    loaded = LoadedModel(build_model(DROPPING, run), DROPPING, ByteTokenizer(), run, Path("none"))  # type: ignore[arg-type]
    with torch.no_grad():
        for seed, parameter in enumerate(loaded.module.parameters()):
            generator = torch.Generator().manual_seed(seed)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    model = MegatronTrainable(loaded, cluster)
    model.add_optimizer(replace(OPTIM, name=name), clip_grad=0.0, max_steps=10)
    return model


@pytest.mark.processes  # none is started, but it takes as long
@pytest.mark.parametrize("name", ["adamw", "distributed_fused_adam"])
def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(
    name: str, cluster: MegatronCluster, tmp_path: Path
) -> None:
    model = trainable(cluster, name=name)
    model.train_step([rows()], sft_objective)
    model.save_training_state(tmp_path / "a", {"step": 1})
    model.train_step([rows(seed=1)], sft_objective)
    torch.cuda.manual_seed(99)
    again = trainable(cluster, name=name)
    again.load_training_state(tmp_path / "a")
    again.train_step([rows(seed=1)], sft_objective)
    for ours, theirs in zip(weights(again), weights(model), strict=True):
        assert ours.device.type == "cuda"
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_layer_that_is_recomputed_drops_what_it_dropped(cluster: MegatronCluster) -> None:
    full = RunOptions(activations_checkpoint_granularity="full", activations_checkpoint_method="uniform")
    found = [trainable(cluster, run).train_step([rows()], reinforce_objective) for run in (RunOptions(), full)]
    assert found[1].loss == pytest.approx(found[0].loss, abs=1e-6)
    assert found[1].grad_norm == pytest.approx(found[0].grad_norm, rel=1e-5)
