"""What a row gets is a function of the row alone, to the last bit, and what a full forward pass gives it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nemo_aligner.algorithms.batching import pad_rows
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation import decode, rows
from nemo_aligner.engine.generation.rows import RowForward
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.model.forward import forward_outputs
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from tests.tiny import ARCH

WIDE = replace(ARCH, kv_channels=16, init_method_std=0.1)
SHAPES = {
    "ours": WIDE,
    "heads that our kernels do not take": ARCH,
    "window": replace(WIDE, window_size=5),
    "norms of heads": replace(WIDE, qk_layernorm=True),
    "layernorm and biases": replace(WIDE, bias=True, normalization="layernorm", activation="gelu"),
    "tied": replace(WIDE, share_embeddings_and_output_weights=True),
    "experts": replace(WIDE, num_moe_experts=4, moe_ffn_hidden_size=20),
}
ALL = [pytest.param(name, marks=pytest.mark.processes if name == "experts" else ()) for name in SHAPES]  # takes seconds


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture(params=["compiled", "without a compiler"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "compiled":
        monkeypatch.setattr(decode, "cpu_kernels", lambda dtype, device: None)


def texts(seed: int = 0) -> list[list[int]]:
    """Some alike at first, some equal, one that others begin with, some of one token."""
    rng = random.Random(seed)
    long, short = rng.choices(range(250), k=31), rng.choices(range(250), k=10)
    found = [[*long, *rng.choices(range(250), k=k)] for k in (1, 12, 5, 0, 0)]
    found += [[*short, *rng.choices(range(250), k=k)] for k in (20, 7)]
    found += [rng.choices(range(250), k=k) for k in (1, 1, 17, 40, 3)]
    rng.shuffle(found)
    return found


def model_of(arch: Architecture, dtype: torch.dtype = torch.float32) -> RowForward:
    torch.manual_seed(3)
    return RowForward(build_model(arch, RunOptions(dtype=dtype)).eval(), arch)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ALL)
def test_rewards_and_logprobs_do_not_depend_on_the_other_rows(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, asked = SHAPES[shape], texts()
    judge = model_of(replace(arch, reward_model_type="binary_ranking"), dtype)
    policy, starts = model_of(arch, dtype), [len(row) // 2 for row in asked]
    with judge.ready(), policy.ready():
        alone = [judge.rewards([row])[0] for row in asked]
        alone_logprobs = [policy.logprobs([row], [start])[0] for row, start in zip(asked, starts, strict=True)]
        for together in (2, 5, len(asked)):
            parts = [slice(i, i + together) for i in range(0, len(asked), together)]
            assert [reward for part in parts for reward in judge.rewards(asked[part])] == alone
            found = [row for part in parts for row in policy.logprobs(asked[part], starts[part])]
            assert all(torch.equal(a, b) for a, b in zip(found, alone_logprobs, strict=True))
        monkeypatch.setattr(rows, "TOKENS_TOGETHER", 30)
        monkeypatch.setattr(rows, "SCORED_TOGETHER", 7)
        assert judge.rewards(asked) == alone
        found = policy.logprobs(asked, starts)
        assert all(torch.equal(a, b) for a, b in zip(found, alone_logprobs, strict=True))
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        assert judge.rewards(asked) == alone
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("shape", ALL)
def test_they_are_those_of_a_full_forward_pass(shape: str) -> None:
    arch, asked = SHAPES[shape], texts(1)
    judge, policy = model_of(replace(arch, reward_model_type="binary_ranking")), model_of(arch)
    batch = Microbatch(*pad_rows(asked, 0))
    starts = [min(i, len(row)) for i, row in enumerate(asked)]
    with judge.ready(), policy.ready():
        rewards, logprobs = judge.rewards(asked), policy.logprobs(asked, starts)
    [expected] = forward_outputs(judge._model, [batch], arch.vocab_size)
    assert torch.allclose(torch.tensor(rewards), expected, atol=1e-4)
    [full] = forward_outputs(policy._model, [batch], arch.vocab_size)
    for found, row, start in zip(logprobs, full, starts, strict=True):
        assert found.shape == (len(found),)
        assert torch.allclose(found[max(1, start) :], row[max(1, start) : len(found)], atol=1e-4)
        assert not found[: max(1, start)].any()


def test_a_common_beginning_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model_of(WIDE)
    ran: list[int] = []
    layers = policy._forward._layers

    def spy(tokens: torch.Tensor, *more: object) -> torch.Tensor:
        ran.append(len(tokens))
        return layers(tokens, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(policy._forward, "_layers", spy)
    prompt = list(range(20))
    with policy.ready():
        policy.logprobs([[*prompt, 1, 2], [*prompt, 3], [7, 8, 9]], [20, 20, 0])
    assert sum(ran) == 20 + 2 + 1 + 3


def test_short_rows_have_their_logits_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model_of(WIDE)
    made: list[int] = []
    logits = policy._forward.logits

    def spy(hidden: torch.Tensor) -> torch.Tensor | None:
        made.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(policy._forward, "logits", spy)
    with policy.ready():
        policy.logprobs([[1, 2, 3, 4], [5, 6], [7]], [2, 0, 0])
    assert made == [2 + 1]
