"""What a step and an evaluation report: averages over the whole batch, and the rate that was used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.loading import load_for_inference
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import TrainingError
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from nemo_aligner.stages.supervised.loop import ranking_objective, sft_objective
from tests.fakes import OneProcess
from tests.tiny import ARCH, ARCHIVED, plain_sft_loss, rows, trainable
from tests.unit.engine.helpers import split, weights, without_optimizer


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.mark.parametrize("trains", [True, False])
def test_an_evaluation_is_the_loss_of_the_whole_batch_and_changes_nothing(
    cluster: MegatronCluster, trains: bool
) -> None:
    model = trainable(cluster) if trains else without_optimizer(cluster)
    before = weights(model)
    found = model.evaluate(split(rows(), 1), sft_objective)
    assert found.loss == pytest.approx(plain_sft_loss(model.module, rows()).item(), abs=1e-5)
    assert (found.grad_norm, found.lr, found.terms) == (0.0, 0.0, {})
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    twin = trainable(cluster)
    if trains:  # nor does it leave a gradient for the next step
        assert model.train_step([rows()], sft_objective) == twin.train_step([rows()], sft_objective)


def test_terms_are_averaged_over_the_count_of_all_micro_batches(cluster: MegatronCluster) -> None:
    """The pairs of the first micro-batch are ranked rightly, the one of the second is not."""
    model = trainable(cluster, replace(ARCH, reward_model_type="binary_ranking"))
    tokens = torch.arange(54).reshape(6, 9)
    rewards: list[float] = []

    def spy(found: torch.Tensor, batch: Microbatch) -> Any:
        rewards.extend(found[:, 0].tolist())
        return ranking_objective(found, batch)

    model.evaluate([Microbatch(tokens, torch.full((6,), 9), {"weights": torch.ones(6)})], spy)
    best = sorted(range(6), key=lambda i: -rewards[i])
    right, wrong = [best[0], best[5], best[1], best[4]], [best[3], best[2]]
    batches = [
        Microbatch(tokens[order], torch.full((len(order),), 9), {"weights": torch.ones(len(order))})
        for order in (right, wrong)
    ]
    assert model.evaluate(batches, ranking_objective).terms["accuracy"] == pytest.approx(2 / 3)


def test_averages_are_over_the_rows_of_every_data_parallel_rank(cluster: MegatronCluster) -> None:
    model, first = trainable(cluster), split(rows(), 1)[0]
    alone = model.evaluate([first], sft_objective)
    count = float(first.fields["loss_mask"].sum())

    class WithAPeer(OneProcess):
        def gather(self, value: Any) -> list[Any]:
            return [value, [{"loss": 6.0, "count": 2.0}, {"loss": 1.0, "count": 5.0}]]

    model.cluster = WithAPeer(0, 2)  # type: ignore[assignment]
    assert model.evaluate([first], sft_objective).loss == pytest.approx((alone.loss * count + 7) / (count + 7))


def test_a_fault_of_another_rank_stops_the_step_here_too(cluster: MegatronCluster) -> None:
    model = trainable(cluster)
    before = weights(model)

    class BesideAFaultyOne(OneProcess):
        def any(self, flag: bool) -> bool:
            assert not flag
            return True

    model.cluster = BesideAFaultyOne(0, 2)  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="at optimizer step 1;"):
        model.train_step([rows()], sft_objective)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_gradient_is_too_large_when_the_sum_of_squares_over_ranks_is_no_float32(cluster: MegatronCluster) -> None:
    model = trainable(cluster)
    assert model._wrapped is not None
    [gradient] = [buffer.grad_data for buffer in model._wrapped.buffers]
    for norm, ranks, finite in ((1.5e19, 1, True), (1.5e19, 2, False), (2e19, 1, False), (float("nan"), 1, False)):
        gradient.zero_()
        gradient[:4] = norm / 2
        model.cluster = OneProcess(0, ranks)  # type: ignore[assignment]
        assert model._gradient_is_finite() == finite


def test_dropout_acts_in_training_alone(cluster: MegatronCluster) -> None:
    model = without_optimizer(cluster, replace(ARCH, hidden_dropout=0.5))
    model.module.eval()
    model.add_optimizer(OptimConfig(name="adamw", lr=0.0), clip_grad=0.0, max_steps=10)
    trained = [model.train_step([rows()], sft_objective).loss for _ in range(2)]
    plain = model.evaluate([rows()], sft_objective).loss
    assert plain == model.evaluate([rows()], sft_objective).loss
    trained.append(model.train_step([rows()], sft_objective).loss)
    assert len({plain, *trained}) == 4, "each step drops other units"
    model.module.eval()
    assert plain == pytest.approx(plain_sft_loss(model.module, rows()).item(), abs=1e-5)


def test_the_rate_of_a_step_is_that_of_the_schedule_also_after_a_resume(
    cluster: MegatronCluster, tmp_path: Path
) -> None:
    falling = OptimConfig(name="adamw", lr=0.01, sched={"name": "ExponentialLR", "gamma": 0.5})
    model, resumed = without_optimizer(cluster), without_optimizer(cluster)
    for one in (model, resumed):
        one.add_optimizer(falling, clip_grad=0.0, max_steps=10)
    assert [model.train_step([rows()], sft_objective).lr for _ in range(3)] == [0.01, 0.005, 0.0025]
    model.save_training_state(tmp_path / "a", {"step": 7})
    assert resumed.load_training_state(tmp_path / "a")["step"] == 7
    assert resumed.train_step([rows()], sft_objective).lr == 0.00125


def test_a_rate_of_zero_moves_no_weight(cluster: MegatronCluster) -> None:
    model = without_optimizer(cluster)
    sched = {"name": "StepLR", "step_size": 1, "gamma": 0.0}
    model.add_optimizer(OptimConfig(name="adamw", lr=0.01, sched=sched), clip_grad=0.0, max_steps=10)
    start = weights(model)
    model.train_step([rows()], sft_objective)
    after = weights(model)
    assert not any(torch.equal(a, b) for a, b in zip(start, after, strict=True))
    model.train_step([rows()], reinforce_objective)
    assert all(torch.equal(a, b) for a, b in zip(after, weights(model), strict=True))


def test_the_archive_is_the_weights_of_now_and_what_is_to_be_noted(cluster: MegatronCluster, tmp_path: Path) -> None:
    model = trainable(cluster, replace(ARCHIVED, precision="bf16"))
    model.tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    model.train_step([rows()], sft_objective)
    noted = {"reward_standardization": {"mean": 1.5, "std": 2.5}}
    model.save_nemo(tmp_path / "m.nemo", noted)
    loaded = load_for_inference(tmp_path / "m.nemo", cluster, precision="32", key="k")
    assert loaded.arch == replace(model.arch, precision="32", **noted)
    for ours, theirs in zip(model.module.parameters(), loaded.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
