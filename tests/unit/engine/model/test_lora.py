"""An adapter against dense weights W + s·B A: forward pass, gradient, generation; and nothing else is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.interfaces import GenerationRequest
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.reward_model import MegatronRewardModel
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.stages.supervised.loop import ranking_objective, sft_objective
from tests.fakes import ByteTokenizer
from tests.tiny import ARCH, OPTIM, plain_sft_loss, rows

LORA = LoraTuning(adapter_dim=3, alpha=6.0, target_modules=["all"])
SHAPES: dict[str, tuple[Architecture, LoraTuning]] = {
    "all layers": (ARCH, LORA),
    "an A for each part": (ARCH, replace(LORA, variant="canonical")),
    "query, key and value": (ARCH, replace(LORA, target_modules=["attention_qkv"])),
    "biases, nothing gated": (replace(ARCH, bias=True, activation="gelu"), replace(LORA, variant="canonical")),
}
RUNS = [[5, 9, 77, 30, 2], [100, 3, 40, 41, 42, 43, 44, 9, 8, 7], [100, 3, 40, 41, 42, 43, 44, 9, 8, 1, 2]]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def made(cluster: MegatronCluster, kind: type = MegatronPolicy, arch: Architecture = ARCH, **run_options: Any) -> Any:
    torch.manual_seed(5)
    run = RunOptions(**run_options)
    return kind(LoadedModel(build_model(arch, run), arch, ByteTokenizer(), run, Path("none")), cluster)  # type: ignore[arg-type]


def fill(model: MegatronTrainable) -> None:
    """B as after some training: not 0 where the adapter has a place for it."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.module.named_parameters():
        if name.endswith("linear_out"):
            value = torch.empty(parameter.shape).normal_(std=0.2, generator=generator)
            parts = model.module.get_submodule(name.rpartition(".")[0]).parts
            parameter.data = (value if parts is None else value * parts).to(parameter.dtype)


def dense(model: MegatronTrainable, lora: LoraTuning, own: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of the same model without adapters: W + s·B A, where `own` gives A and B if not the model."""
    state = {name: value for name, value in model.module.state_dict().items() if isinstance(value, Tensor)}
    own = state if own is None else own
    whole = {name: value for name, value in state.items() if not name.startswith("adapters.")}
    for name in own:
        if name.endswith("linear_out"):
            _, layer, linear, _ = name.split(".")
            block = "mlp" if "fc" in linear else "self_attention"
            product = own[name] @ own[name.replace("linear_out", "linear_in")]
            whole[f"decoder.layers.{layer}.{block}.{linear}.weight"] = (
                state[f"decoder.layers.{layer}.{block}.{linear}.weight"] + product * lora.alpha / lora.adapter_dim
            )
    return whole


def logits(module: torch.nn.Module) -> Tensor:
    tokens = rows().tokens
    return module(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_forward_pass_is_that_of_the_merged_weights(shape: str, cluster: MegatronCluster) -> None:
    arch, lora = SHAPES[shape]
    model, plain = made(cluster, arch=arch, lora=lora), made(cluster, arch=arch)
    assert torch.equal(logits(model.module), logits(plain.module)), "B is 0 at first"
    assert torch.equal(torch.stack(model.logprobs([RUNS[0]], 1)), torch.stack(plain.logprobs([RUNS[0]], 1)))
    fill(model)
    base = logits(plain.module)
    plain.module.load_state_dict(dense(model, lora), strict=False)
    torch.testing.assert_close(logits(model.module), logits(plain.module), atol=1e-4, rtol=1e-4)
    assert (logits(plain.module) - base).abs().max() > 0.1
    with model.module.adapters.off():
        assert torch.equal(logits(model.module), base)


@pytest.mark.parametrize("recomputed", [None, "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_that_of_the_dense_model(shape: str, recomputed: str | None, cluster: MegatronCluster) -> None:
    arch, lora = SHAPES[shape]
    more = {"activations_checkpoint_granularity": recomputed, "activations_checkpoint_method": "uniform"}
    model, plain = made(cluster, arch=arch, lora=lora, **more), made(cluster, arch=arch)
    fill(model)
    model.add_optimizer(OPTIM, clip_grad=0.0, max_steps=10)
    trained = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    own = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    weights = dense(model, lora, own)

    def reference(*inputs: Any) -> Tensor:
        return torch.func.functional_call(plain.module, weights, inputs, strict=False)

    loss = plain_sft_loss(reference, rows())  # type: ignore[arg-type]
    gradients = torch.autograd.grad(loss, [*own.values()])
    metrics = model.train_step([rows()], sft_objective)
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-5)
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        parts = model.module.get_submodule(name.rpartition(".")[0]).parts
        if name.endswith("linear_out") and parts is not None:
            gradient = gradient * parts  # elsewhere B is 0 and no parameter
        torch.testing.assert_close(
            parameter.main_grad, gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_changes_the_adapter_alone_and_the_initial_policy_is_the_base(
    dtype: torch.dtype, cluster: MegatronCluster
) -> None:
    model, plain = made(cluster, lora=LORA, dtype=dtype), made(cluster, dtype=dtype)
    model.keep_initial_weights()
    model.add_optimizer(OPTIM, clip_grad=0.0, max_steps=10)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    for step in range(3):
        model.train_step([rows(seed=step)], sft_objective)
    for name, value in model.module.named_parameters():
        assert torch.equal(value, before[name]) != name.startswith("adapters."), name
    base = plain.logprobs(RUNS, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.initial_logprobs(RUNS, 2), base, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.logprobs(RUNS, 2), base, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_and_scoring_are_those_of_the_merged_weights_to_the_last_bit(
    dtype: torch.dtype, cluster: MegatronCluster
) -> None:
    model, merged = made(cluster, lora=LORA, dtype=dtype), made(cluster, lora=LORA, dtype=dtype)
    fill(model)
    fill(merged)
    merged.module.adapters.dissolve(merged.module)
    assert merged.module.adapters is None
    weights = {name: value.clone() for name, value in model.module.named_parameters()}
    requests = [GenerationRequest(p, s, tuple(row)) for p, row in enumerate(RUNS) for s in range(2)]

    def drawn(policy: MegatronPolicy) -> list[Any]:
        found = policy.generate(requests, SamplingParams(max_tokens=6), 4)
        return sorted((r.prompt_index, r.sample_index, r.tokens, r.logprobs) for r in found)

    assert drawn(model) == drawn(merged)
    for a, b in zip(model.logprobs(RUNS, 2), merged.logprobs(RUNS, 2), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.cat(model.logprobs(RUNS[1:2], 2)), model.logprobs(RUNS, 2)[1])
    assert all(torch.equal(value, weights[name]) for name, value in model.module.named_parameters())


def test_a_reward_model_trains_its_head_and_the_adapter(cluster: MegatronCluster) -> None:
    arch = replace(ARCH, reward_model_type="binary_ranking")
    model = made(cluster, MegatronRewardModel, arch, lora=LORA)
    model.add_optimizer(OPTIM, clip_grad=0.0, max_steps=10)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    accuracy = [model.train_step([rows()], ranking_objective).terms["accuracy"] for _ in range(10)]
    assert accuracy[-1] == 1.0
    changed = {n.partition(".")[0] for n, v in model.module.named_parameters() if not torch.equal(v, before[n])}
    assert changed == {"adapters", "rm_head"}
    rewards = model.score(RUNS, 2)
    model.module.adapters.dissolve(model.module)
    assert model.score(RUNS, 2) == rewards


@pytest.mark.processes  # takes a second
def test_a_killed_run_goes_on_and_its_checkpoint_holds_the_adapter_alone(
    cluster: MegatronCluster, tmp_path: Path
) -> None:
    def begun() -> Any:
        model = made(cluster, lora=replace(LORA, adapter_dropout=0.2))
        model.add_optimizer(OPTIM, clip_grad=0.0, max_steps=10)
        return model

    straight, first, second = begun(), begun(), begun()
    torch.manual_seed(1)
    for step in range(4):
        straight.train_step([rows(seed=step)], sft_objective)
    torch.manual_seed(1)
    for step in range(2):
        first.train_step([rows(seed=step)], sft_objective)
    first.save_training_state(tmp_path / "a", {"step": 2})
    torch.manual_seed(99)
    second.load_training_state(tmp_path / "a")
    for step in range(2, 4):
        second.train_step([rows(seed=step)], sft_objective)
    for (name, ours), theirs in zip(straight.module.named_parameters(), second.module.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    from torch.distributed.checkpoint import FileSystemReader

    saved = {*FileSystemReader(tmp_path / "a" / "shards").read_metadata().state_dict_metadata}
    assert any("adapters" in name for name in saved)
    assert not [name for name in saved if name.startswith("model.") and "adapters" not in name]


def test_dropout_is_of_what_the_adapter_reads_and_in_training_alone(cluster: MegatronCluster) -> None:
    model = made(cluster, lora=replace(LORA, adapter_dropout=0.5))
    fill(model)
    model.module.eval()
    assert torch.equal(logits(model.module), logits(model.module))
    model.module.train()
    assert not torch.equal(logits(model.module), logits(model.module))
    with model.module.adapters.off():
        assert torch.equal(logits(model.module), logits(model.module))


class Products(TorchDispatchMode):
    """Shapes of the batches of products that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.batches.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_no_frozen_weight_is_copied_for_each_token(cluster: MegatronCluster) -> None:
    model = made(cluster, lora=LORA)
    model.add_optimizer(OPTIM, clip_grad=0.0, max_steps=10)
    with Products() as seen:
        model.train_step([rows()], sft_objective)
    assert not [shape for shape in seen.batches if shape[0] > ARCH.num_attention_heads]


def test_where_an_adapter_begins_depends_on_the_seed_alone(cluster: MegatronCluster) -> None:
    def begins(seed: int) -> Tensor:
        return made(cluster, lora=LORA, lora_seed=seed).module.adapters.get_submodule("1.linear_qkv").linear_in

    torch.rand(3)
    assert torch.equal(begins(1), begins(1))
    assert not torch.equal(begins(1), begins(2))
