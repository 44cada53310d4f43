"""What the optimizer does to weights: clipping and master weights against plain torch, faults before any change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_aligner.algorithms.terms import LossTerms
from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.kernels.library import cpu_kernels
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.training.optimizer import data_parallel_settings, is_sharded
from nemo_aligner.errors import ConfigError, TrainingError
from nemo_aligner.stages.supervised.loop import sft_objective
from tests.tiny import ARCH, plain_sft_loss, rows, trainable
from tests.unit.engine.helpers import split, without_optimizer


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def test_clipping_is_by_the_norm_over_all_parameters(cluster: MegatronCluster) -> None:
    # eps far above the gradient makes Adam's first step proportional to it, so that a missing clip is seen
    optim = OptimConfig(name="adamw", lr=1.0, weight_decay=0.0, eps=10.0)
    model, reference = without_optimizer(cluster), without_optimizer(cluster).module
    parameters = list(reference.parameters())
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(plain_sft_loss(reference, rows()), parameters), strict=True
    ):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    assert norm > 0.2, "the gradient is one that clipping changes"
    torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.98), eps=10.0, weight_decay=0.0).step()
    model.add_optimizer(optim, clip_grad=0.1, max_steps=1)
    assert model.train_step([rows()], sft_objective).grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for ours, theirs in zip(model.module.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


SHARDED = {"name": "mcore_distributed_optim"}
BESIDE = {**SHARDED, "overlap_grad_sync": True, "overlap_param_sync": True, "bucket_cap_mb": 0.01}


@pytest.mark.parametrize("kind", [{"name": "adamw"}, SHARDED, BESIDE], ids=["plain", "sharded", "beside the passes"])
def test_the_steps_are_those_of_adam_with_the_betas_and_the_decay_given(
    cluster: MegatronCluster, kind: dict[str, Any]
) -> None:
    """Three steps, as the first is the same for any betas."""
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, betas=[0.3, 0.6], eps=1e-3, **kind)
    model, reference = without_optimizer(cluster), without_optimizer(cluster).module
    parameters = list(reference.parameters())
    decays = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() == 1]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.3, 0.6), eps=1e-3)
    model.add_optimizer(optim, clip_grad=0.0, max_steps=3)
    for _ in range(3):
        gradients = torch.autograd.grad(plain_sft_loss(reference, rows()), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        model.train_step([rows()], sft_objective)
    for ours, theirs in zip(model.module.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_bf16_weights_move_by_steps_smaller_than_their_resolution(cluster: MegatronCluster) -> None:
    model = without_optimizer(cluster, dtype=torch.bfloat16)
    model.add_optimizer(OptimConfig(name="adamw", lr=1e-4, weight_decay=0.0), clip_grad=0.0, max_steps=40)
    matrix = dict(model.module.named_parameters())["decoder.layers.0.mlp.linear_fc1.weight"]
    before = matrix.detach().clone()
    coarse = before.abs() > 0.5  # neighbours 2^-8 apart: a step of 1e-4 is rounded away
    model.train_step([rows()], sft_objective)
    assert torch.equal(matrix[coarse], before[coarse])
    for _ in range(39):
        model.train_step([rows()], sft_objective)
    assert (matrix[coarse] != before[coarse]).float().mean() > 0.25


def test_a_gradient_whose_norm_overflows_changes_no_weight(cluster: MegatronCluster) -> None:
    model = trainable(cluster)
    before = [p.clone() for p in model.module.parameters()]

    def steep(logprobs: torch.Tensor, batch: Microbatch) -> LossTerms:
        terms = sft_objective(logprobs, batch)
        return replace(terms, loss_sum=terms.loss_sum * 1e25)

    with pytest.raises(TrainingError, match="not finite"):
        model.train_step([rows()], steep)
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))


def test_an_unknown_optimizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"model\.optim\.name: 'lion' is not one of .*adamw"):
        OptimConfig(name="lion").check()


def test_ranks_speak_as_the_config_says() -> None:
    plain = data_parallel_settings(OptimConfig(name="adamw"), sharded=False)
    assert (plain.use_distributed_optimizer, plain.overlap_grad_reduce, plain.overlap_param_gather) == (False,) * 3
    assert (plain.grad_reduce_in_fp32, plain.bucket_size) == (True, None)
    asked = OptimConfig(
        name="mcore_distributed_optim", overlap_grad_sync=True, overlap_param_sync=True, bucket_cap_mb=2
    )
    both = data_parallel_settings(asked, sharded=True)
    assert (both.use_distributed_optimizer, both.overlap_grad_reduce, both.overlap_param_gather) == (True,) * 3
    assert both.align_param_gather, "all are fetched from the end of the step on"
    assert both.bucket_size == 2 * 2**20 // 4, "of gradients of four bytes"


@pytest.mark.parametrize(("cap", "overlaps", "said"), [(None, False, False), (2, True, False), (2, False, True)])
def test_buckets_that_are_not_used_are_said(
    cap: float | None, overlaps: bool, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        data_parallel_settings(OptimConfig(bucket_cap_mb=cap, overlap_grad_sync=overlaps), sharded=False)
    assert ("model.optim.bucket_cap_mb: one bucket for all gradients" in caplog.text) == said


def test_weights_that_nobody_else_updates_cannot_be_fetched(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"^model\.optim\.overlap_param_sync: with name=adamw every rank"):
        data_parallel_settings(OptimConfig(name="adamw", overlap_param_sync=True), sharded=False)
    with caplog.at_level("INFO"):
        here = data_parallel_settings(
            OptimConfig(name="distributed_fused_adam", overlap_param_sync=True), sharded=False
        )
    assert not here.overlap_param_gather
    assert "one rank updates all weights, there is nothing to fetch" in caplog.text


@pytest.mark.parametrize(("name", "alone", "of_two"), [("mcore_distributed_optim", True, True), ("adam", False, False),
                         ("distributed_fused_adam", False, True), ("fused_adam", False, False)])  # fmt: skip
def test_on_cpus_adams_state_is_cut_over_ranks_as_its_name_says(name: str, alone: bool, of_two: bool) -> None:
    assert [is_sharded(OptimConfig(name=name), ranks) for ranks in (1, 2)] == [alone, of_two]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_added_up_in_our_kernel_are_those_that_torch_adds_up(
    cluster: MegatronCluster, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = cpu_kernels(torch.bfloat16, torch.device("cpu"))
    if kernels is None or not kernels.has_units:
        pytest.skip("there are no units for matrices")
    arch = replace(ARCH, hidden_size=32, ffn_hidden_size=48, bias=True, share_embeddings_and_output_weights=tied)

    def gradients(*, fused: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(kernels, "has_units", fused)
        model = without_optimizer(cluster, arch, torch.bfloat16)
        model.add_optimizer(OptimConfig(name="adamw"), clip_grad=0.0, max_steps=1)
        model.train_step(split(rows(), 2), sft_objective)
        return [parameter.main_grad for parameter in model.module.parameters()]

    found, wanted = gradients(fused=True), gradients(fused=False)
    assert not all(torch.equal(ours, torchs) for ours, torchs in zip(found, wanted, strict=True)), "it was in use"
    for ours, torchs in zip(found, wanted, strict=True):
        assert torchs.any()
        assert (ours - torchs).norm() <= 0.01 * torchs.norm()
