"""A stream gives what plain rows give: outputs, loss, and the gradient of every parameter."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_aligner.algorithms.batching import pad_rows
from nemo_aligner.algorithms.shared_prefix import lay_out
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.interfaces import Microbatch, Objective
from nemo_aligner.engine.model import forward
from nemo_aligner.engine.model.attention import stream_attention
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.model.forward import forward_outputs, run_objective
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from nemo_aligner.stages.supervised.loop import ranking_objective
from tests.tiny import ARCH, EXPERTS, OPTIM, trainable

SHAPES = {
    "grouped queries": ARCH,
    "window": replace(ARCH, window_size=5),
    "window in one layer": replace(ARCH, window_size=5, window_layers=[1]),
    "norms of queries and keys": replace(ARCH, qk_layernorm=True),
    "biases": replace(ARCH, bias=True, normalization="layernorm", activation="gelu"),
    "tied embeddings": replace(ARCH, share_embeddings_and_output_weights=True),
    "learned positions": replace(ARCH, position_embedding_type="learned_absolute"),
    "half rotary": replace(ARCH, rotary_percentage=0.5),
    "experts": EXPERTS,
    "experts in every layer": replace(EXPERTS, moe_layer_freq=1, moe_router_pre_softmax=False),
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def random_rows(seed: int) -> list[list[int]]:
    """Prompts of one response and of several, a response of one token, none at all, and rows that share nothing."""
    rng = random.Random(seed)
    long, short = rng.choices(range(250), k=30), rng.choices(range(250), k=9)
    rows = [[*long, *rng.choices(range(250), k=k)] for k in (1, 12, 5, 0)]
    rows += [[*short, *rng.choices(range(250), k=k)] for k in (20, 7)]
    rows += [rng.choices(range(250), k=k) for k in (1, 17, 40)]
    rng.shuffle(rows)
    return rows


def microbatch(seed: int) -> Microbatch:
    tokens, lengths = pad_rows(random_rows(seed), 0)
    mask = (torch.rand(tokens.shape) < 0.6) & (torch.arange(tokens.size(1)) < lengths[:, None])
    mask[:, 0] = False
    return Microbatch(tokens, lengths, {"loss_mask": mask.float(), "weights": torch.randn(len(lengths))})


def plain_logprobs(model: Any, batch: Microbatch, arch: Architecture) -> Tensor:
    """Every row by itself through the same modules, without a layout; the rest is plain torch."""
    found = torch.zeros(batch.tokens.shape)
    for i, length in enumerate(batch.lengths.tolist()):
        row = batch.tokens[i : i + 1, :length]
        logits = model(row, torch.arange(length)[None], None)[0, :, : arch.vocab_size].float().log_softmax(-1)
        found[i, 1:length] = logits[:-1].gather(-1, row[0, 1:, None]).squeeze(-1)
    return found


def plain_rewards(model: Any, batch: Microbatch, arch: Architecture) -> Tensor:
    rows = [batch.tokens[i : i + 1, :length] for i, length in enumerate(batch.lengths.tolist())]
    return torch.stack([model(row, torch.arange(row.size(1))[None], None)[0, -1] for row in rows])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        gap = (found[name] - value).norm() / value.norm().clamp(min=1e-2)
        assert gap < 1e-5, f"{name}: {gap}"


def check(
    model: Any, batch: Microbatch, objective: Objective, plain: Callable[..., Tensor], arch: Architecture
) -> None:
    """Output, loss and gradients of the stream are those of the `plain` output."""
    [sums] = run_objective(model, [batch], objective, arch.vocab_size, forward_only=False)
    found = gradients(model)
    outputs = plain(model, batch, arch)
    terms = objective(outputs, batch)
    terms.loss_sum.backward()
    assert sums["loss"] == pytest.approx(terms.loss_sum.item(), rel=1e-5)
    assert sums["count"] == terms.count.item()
    assert_same(found, gradients(model))
    [everywhere] = forward_outputs(model, [Microbatch(batch.tokens, batch.lengths)], arch.vocab_size)
    assert torch.allclose(everywhere, outputs, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_of_a_policy_are_those_of_plain_rows(shape: str, seed: int) -> None:
    arch = SHAPES[shape]
    torch.manual_seed(seed)
    model, batch = build_model(arch, RunOptions()), microbatch(seed)
    check(model, batch, reinforce_objective, plain_logprobs, arch)


@pytest.mark.parametrize("shape", SHAPES)
def test_rewards_and_gradients_of_a_reward_model_are_those_of_plain_rows(shape: str) -> None:
    arch = replace(SHAPES[shape], reward_model_type="binary_ranking", share_embeddings_and_output_weights=False)
    torch.manual_seed(0)
    model, batch = build_model(arch, RunOptions()), microbatch(3)
    batch = Microbatch(batch.tokens[:8], batch.lengths[:8], {"weights": torch.rand(4).repeat_interleave(2)})
    check(model, batch, ranking_objective, plain_rewards, arch)


@pytest.mark.parametrize("shape", ["grouped queries", "biases"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(recompute: str, shape: str) -> None:
    batch, arch = microbatch(0), SHAPES[shape]

    def found(**more: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = build_model(arch, RunOptions(**more))
        run_objective(model, [batch], reinforce_objective, arch.vocab_size, forward_only=False)
        [outputs] = forward_outputs(model, [batch], arch.vocab_size)
        return {**gradients(model), "outputs without a gradient": outputs}

    assert_same(found(activations_checkpoint_granularity=recompute, activations_checkpoint_method="uniform"), found())


def test_fifty_steps_with_and_without_sharing_lie_on_each_other(
    cluster: MegatronCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses() -> list[float]:
        # with Adam's own eps a gradient that is 0 but for rounding makes whole steps
        model = trainable(cluster, optim=replace(OPTIM, eps=1e-3))
        return [model.train_step([microbatch(step)], reinforce_objective).loss for step in range(50)]

    torch.manual_seed(1)
    shared = losses()
    monkeypatch.setattr(forward, "MIN_SHARED", sys.maxsize)
    torch.manual_seed(1)
    alone = losses()
    assert max(shared) - min(shared) > 1.0, "it is no flat line"
    assert alone == pytest.approx(shared, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_sees_its_own_row_up_to_itself_and_nothing_else(
    window: int | None, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    rows = random_rows(7)
    layout = lay_out(rows, multiple=8)
    n, g, d = *heads, 8
    query, key, value = (torch.randn(len(layout.tokens), h, d).to(dtype) for h in (n, g, g))
    found = stream_attention(query, key, value, layout.groups, window=window, scale=0.3)
    assert found.dtype == dtype
    for i, row in enumerate(rows):
        places = layout.places[i, : len(row)]
        q, k, v = (t[places].double() for t in (query, key, value))
        for t in range(len(row)):
            first = 0 if window is None else max(0, t + 1 - window)
            for head in range(n):
                scores = 0.3 * k[first : t + 1, head * g // n] @ q[t, head]
                expected = scores.softmax(0) @ v[first : t + 1, head * g // n]
                gap = (found[places[t], head * d : (head + 1) * d].double() - expected).abs().max()
                assert gap < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("more", [{}, {"hidden_dropout": 0.1}, {"attention_dropout": 0.1}])
def test_training_with_dropout_says_that_nothing_is_shared(
    cluster: MegatronCluster, more: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainable(cluster, replace(ARCH, **more))
    assert ("with dropout every row is computed by itself" in caplog.text) == bool(more)


def test_with_dropout_every_row_has_a_draw_of_its_own() -> None:
    """Equal rows, which would be one if they were shared, get different outputs while training, equal ones after."""
    arch = replace(ARCH, hidden_dropout=0.5)
    torch.manual_seed(0)
    model = build_model(arch, RunOptions())
    row = list(range(20))
    batch = Microbatch(*pad_rows([row, row], 0))
    [drawn] = forward_outputs(model.train(), [batch], arch.vocab_size)
    assert not torch.allclose(drawn[0], drawn[1])
    [same] = forward_outputs(model.eval(), [batch], arch.vocab_size)
    assert torch.equal(same[0], same[1])
