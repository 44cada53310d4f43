"""The losses of routers are what their definitions say of plain rows, and so are their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_aligner.algorithms.batching import pad_rows
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.interfaces import Microbatch, Objective
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.model.forward import run_objective
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from nemo_aligner.stages.supervised.loop import ranking_objective
from tests.tiny import EXPERTS

pytestmark = pytest.mark.processes  # none is started, but they take as long

SHARED = [7, 3, 40, 41, 42, 43, 44, 9, 8, 5]
ROWS = [[*SHARED, 1, 2], [*SHARED, 60], [9, 8, 7, 6, 5], [*SHARED, 3, 4, 200, 201], [11], [12, 13]]
COUNTS = [2.0, 1.0, 3.0, 4.0, 0.0, 1.0]
LOSSES = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.05}
SHAPE = replace(EXPERTS, moe_layer_freq=1, **LOSSES)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def batch(rows: slice = slice(None)) -> Microbatch:
    tokens, lengths = pad_rows(ROWS[rows], 0)
    counts = torch.tensor(COUNTS[rows])
    mask = (torch.arange(tokens.size(1)) >= (lengths - counts)[:, None]) & (
        torch.arange(tokens.size(1)) < lengths[:, None]
    )
    mask[:, 0] = False
    return Microbatch(
        tokens, lengths, {"loss_mask": mask.float(), "weights": torch.ones(len(lengths)), "targets": counts}
    )


def model_of(arch: Architecture, **run: Any) -> Any:
    torch.manual_seed(0)
    return build_model(arch, RunOptions(**run)).train()


def router_losses(model: Any, arch: Architecture, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Load balancing and z loss, each summed over layers, of rows that go through the model by themselves."""
    balance = z = torch.zeros(())
    logits: dict[int, list[Tensor]] = {}
    hooks = [
        layer.mlp.router.register_forward_pre_hook(
            lambda router, inputs, n=n: logits.setdefault(n, []).append(inputs[0].flatten(0, 1) @ router.weight.T)
        )
        for n, layer in enumerate(model.decoder.layers)
    ]
    for row in ROWS:
        model(torch.tensor([row]), torch.arange(len(row))[None], None)
    for hook in hooks:
        hook.remove()
    experts, k = arch.num_moe_experts, arch.moe_router_topk
    assert experts is not None
    for rows in logits.values():
        chosen = [torch.zeros_like(row).scatter(1, row.topk(k).indices, 1.0) for row in rows]
        if arch.moe_router_load_balancing_type == "seq_aux_loss":
            for share, row, one in zip(shares, rows, chosen, strict=True):
                fractions = one.mean(0) / k
                balance = balance + share * experts * (fractions * row.softmax(-1).mean(0)).sum()
        else:
            fractions, means = torch.cat(chosen).mean(0) / k, torch.cat(rows).softmax(-1).mean(0)
            balance = balance + experts * (fractions * means).sum()
        z = z + sum(share * row.exp().sum(-1).log().square().mean() for share, row in zip(shares, rows, strict=True))
    return balance, z


def plain_loss(model: Any, arch: Architecture, rewards: bool) -> Tensor:
    """Of `batch()`, by rows, in plain torch; not yet divided."""
    whole = batch()
    outputs = []
    for row in ROWS:
        raw = model(torch.tensor([row]), torch.arange(len(row))[None], None)[0]
        if rewards:
            outputs.append(raw[-1])
        else:
            logprobs = raw[:, : arch.vocab_size].log_softmax(-1)[:-1].gather(-1, torch.tensor(row[1:])[:, None])
            outputs.append(torch.nn.functional.pad(logprobs.squeeze(-1), (1, whole.tokens.size(1) - len(row))))
    objective = ranking_objective if rewards else reinforce_objective
    return objective(torch.stack(outputs), whole).loss_sum


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm().clamp(min=1e-2), name


@pytest.mark.parametrize("balancing", ["aux_loss", "seq_aux_loss", "none"])
@pytest.mark.parametrize("rewards", [False, True])
def test_loss_and_gradient_of_routers_are_those_of_their_definition(balancing: str, rewards: bool) -> None:
    kind = "binary_ranking" if rewards else None
    arch = replace(SHAPE, moe_router_load_balancing_type=balancing, reward_model_type=kind)
    model = model_of(arch)
    objective: Objective = ranking_objective if rewards else reinforce_objective
    [sums] = run_objective(model, [batch()], objective, arch.vocab_size, forward_only=False)
    found = gradients(model)
    shares = torch.full((6,), 1 / 6) if rewards else torch.tensor(COUNTS) / sum(COUNTS)
    balance, z = router_losses(model, arch, shares)
    count = sums["count"]
    weighed = LOSSES["moe_z_loss_coeff"] * z
    if balancing != "none":
        assert sums["load_balancing_loss"] == pytest.approx(count * balance.item(), rel=1e-4)
        weighed = weighed + LOSSES["moe_aux_loss_coeff"] * balance
    else:
        assert "load_balancing_loss" not in sums
    assert sums["router_z_loss"] == pytest.approx(count * z.item(), rel=1e-4)
    plain = plain_loss(model, arch, rewards)
    assert sums["loss"] == pytest.approx(plain.item(), rel=1e-4)
    (plain + count * weighed).backward()
    assert_close(found, gradients(model))


def test_losses_of_rows_do_not_depend_on_micro_batches_nor_on_recomputation() -> None:
    arch = replace(SHAPE, moe_router_load_balancing_type="seq_aux_loss")

    def found(parts: list[slice], **run: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        model = model_of(arch, **run)
        batches = [batch(part) for part in parts]
        sums = run_objective(model, batches, reinforce_objective, arch.vocab_size, forward_only=False)
        return {name: sum(part[name] for part in sums) for name in sums[0]}, gradients(model)

    expected, gradient = found([slice(None)])
    full = {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform"}
    for parts, run in (([slice(0, 1), slice(1, 4), slice(4, 6)], {}), ([slice(None)], full)):
        values, other = found(parts, **run)
        assert values == pytest.approx(expected, rel=1e-4)
        assert_close(other, gradient)


def test_without_coefficients_and_without_training_nothing_is_added() -> None:
    model = model_of(replace(SHAPE, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=None))
    [sums] = run_objective(model, [batch()], reinforce_objective, SHAPE.vocab_size, forward_only=False)
    plain = gradients(model)
    assert sums.keys() == {"loss", "count"}
    plain_loss(model, SHAPE, rewards=False).backward()
    assert_close(plain, gradients(model))
    trained = model_of(SHAPE).eval()
    [sums] = run_objective(trained, [batch()], reinforce_objective, SHAPE.vocab_size, forward_only=True)
    assert sums.keys() == {"loss", "count"}
