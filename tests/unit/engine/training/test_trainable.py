"""One optimizer step against plain torch, and checkpoints against uninterrupted training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.checkpoint_folder import latest
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import TrainingError
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from nemo_aligner.stages.supervised.loop import ranking_objective, sft_objective
from tests.tiny import ARCH, plain_sft_loss, rows, trainable
from tests.unit.engine.helpers import split


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def test_a_step_equals_torch_adamw_on_the_plain_gradient(cluster: MegatronCluster) -> None:
    model, twin = trainable(cluster), trainable(cluster)
    reference = twin.module
    decayed = [p for p in reference.parameters() if p.dim() > 1]
    others = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        batch = rows(seed=step)
        loss = plain_sft_loss(reference, batch)
        adamw.zero_grad()
        for parameter, gradient in zip(
            reference.parameters(), torch.autograd.grad(loss, list(reference.parameters())), strict=True
        ):
            parameter.grad = gradient
        adamw.step()
        metrics = model.train_step([batch], sft_objective)
        assert metrics.loss == pytest.approx(loss.item(), abs=1e-5)
        for (name, ours), theirs in zip(model.module.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(
                ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batch_size_changes_neither_loss_nor_weights(cluster: MegatronCluster, size: int) -> None:
    whole, parts = trainable(cluster), trainable(cluster)
    a = whole.train_step([rows()], sft_objective)
    b = parts.train_step(split(rows(), size), sft_objective)
    assert a.loss == pytest.approx(b.loss, abs=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for ours, theirs in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def plain_reinforce_loss(module: torch.nn.Module, batch: Microbatch) -> torch.Tensor:
    """-Σ A_i log π(y_it) / Σ 1 over response tokens, row by row over the dense model, nothing padded."""
    total, count = torch.zeros(()), 0.0
    for row, length, mask, advantage in zip(
        batch.tokens, batch.lengths.tolist(), batch.fields["loss_mask"], batch.fields["weights"], strict=True
    ):
        tokens = row[:length]
        logits = module(tokens[None], torch.arange(length)[None], None)[0, :, : ARCH.vocab_size]
        for t in range(1, length):
            if mask[t]:
                total = total - advantage * logits[t - 1].log_softmax(-1)[tokens[t]]
                count += 1
    return total / count


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_reinforce_gradient_is_that_of_the_plain_objective(cluster: MegatronCluster, size: int) -> None:
    model, twin = trainable(cluster), trainable(cluster)
    batch = rows()
    batch.fields["weights"][:] = torch.tensor([0.7, -1.3, 0.2, 2.1])
    loss = plain_reinforce_loss(twin.module, batch)
    gradients = torch.autograd.grad(loss, list(twin.module.parameters()))
    metrics = model.train_step(split(batch, size), reinforce_objective)
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-5)
    for parameter, gradient in zip(model.module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.main_grad, gradient, atol=1e-5, rtol=0)  # type: ignore[attr-defined]


def test_rewards_are_read_at_the_last_real_token_and_do_not_see_padding(cluster: MegatronCluster) -> None:
    model = trainable(cluster, replace(ARCH, reward_model_type="binary_ranking"))
    seen: list[torch.Tensor] = []

    def spy(rewards: torch.Tensor, batch: Microbatch):  # type: ignore[no-untyped-def]
        seen.append(rewards.detach().clone())
        return ranking_objective(rewards, batch)

    model.evaluate([rows()], spy)
    alone = [Microbatch(rows().tokens[i : i + 1, :n], torch.tensor([n])) for i, n in enumerate((9, 5, 7, 3))]
    for i, single in enumerate(alone):
        raw = model.module(single.tokens, torch.arange(single.tokens.size(1))[None], None)
        torch.testing.assert_close(seen[0][i], raw[0, -1], atol=1e-5, rtol=1e-5)


def test_learning_to_rank_ranks(cluster: MegatronCluster) -> None:
    model = trainable(cluster, replace(ARCH, reward_model_type="binary_ranking"))
    accuracy = [model.train_step([rows()], ranking_objective).terms["accuracy"] for _ in range(10)]
    assert accuracy[-1] == 1.0


def test_a_loss_that_is_not_finite_changes_no_weight(cluster: MegatronCluster) -> None:
    model = trainable(cluster)
    model.train_step([rows()], sft_objective)
    before = [p.clone() for p in model.module.parameters()]
    broken = replace(rows(), fields={**rows().fields, "weights": torch.full((4,), float("nan"))})
    with pytest.raises(TrainingError, match="loss nan or its gradient is not finite at optimizer step 2;"):
        model.train_step([broken], reinforce_objective)
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))


def test_nothing_to_train_on_is_said(cluster: MegatronCluster) -> None:
    masked = replace(rows(), fields={**rows().fields, "loss_mask": torch.zeros(4, 9)})
    with pytest.raises(TrainingError, match="every row is masked"):
        trainable(cluster).train_step([masked], sft_objective)


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(cluster: MegatronCluster, tmp_path: Path) -> None:
    straight = trainable(cluster)
    for step in range(4):
        straight.train_step([rows(seed=step)], sft_objective)
    first = trainable(cluster)
    for step in range(2):
        first.train_step([rows(seed=step)], sft_objective)
    first.save_training_state(tmp_path / "a", {"step": 2})
    torch.manual_seed(99)
    second = trainable(cluster)
    assert second.load_training_state(tmp_path / "a")["step"] == 2
    for step in range(2, 4):
        second.train_step([rows(seed=step)], sft_objective)
    for ours, theirs in zip(straight.module.parameters(), second.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_newest_complete_checkpoint_is_found_by_its_state_not_its_name(
    cluster: MegatronCluster, tmp_path: Path
) -> None:
    model = trainable(cluster)
    model.save_training_state(tmp_path / "zzz-step=9", {"step": 1})
    model.save_training_state(tmp_path / "aaa-step=1", {"step": 5})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "state.json").write_text('{"step": 77')
    model.save_training_state(tmp_path / "half", {"step": 99})
    (tmp_path / "half").rename(tmp_path / "half.partial")
    (tmp_path / "half.partial" / "state.json").unlink()
    assert latest(tmp_path) == tmp_path / "aaa-step=1"
    assert latest(tmp_path / "none") is None
