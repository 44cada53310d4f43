"""What the planner says is what is measured: the bytes of live tensors of small models, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nemo_aligner.algorithms.terms import LossTerms
from nemo_aligner.algorithms.vocabulary import rows_together
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model import attention, fused, logprobs
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.planning.memory import Work, training
from nemo_aligner.planning.parameters import Layout
from tests.distributed.helpers import Cut, Job, run_jobs
from tests.fakes import ByteTokenizer
from tests.live_bytes import LiveBytes

LLAMA = Architecture(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=448,
    num_attention_heads=8,
    num_query_groups=2,
    vocab_size=512,
    encoder_seq_length=512,
    max_position_embeddings=512,
)
WIDE = replace(LLAMA, num_layers=2, ffn_hidden_size=320, vocab_size=8192)
QWEN3 = replace(LLAMA, qk_layernorm=True, kv_channels=32, share_embeddings_and_output_weights=True)
GPT2 = replace(
    LLAMA,
    normalization="layernorm",
    bias=True,
    activation="gelu",
    num_query_groups=None,
    position_embedding_type="learned_absolute",
)
JUDGE = replace(LLAMA, reward_model_type="binary_ranking")
EXPERTS = replace(
    LLAMA, num_moe_experts=8, moe_ffn_hidden_size=192, moe_aux_loss_coeff=0.1, moe_layer_freq=[0, 1, 1, 1]
)
FINE = replace(EXPERTS, num_moe_experts=32, moe_router_topk=4, moe_ffn_hidden_size=64, moe_layer_freq=1)
FP32, BF16 = torch.float32, torch.bfloat16


def full(method: str, layers: int) -> Layout:
    return Layout(granularity="full", method=method, num_layers=layers)


CASES = {
    "llama": (LLAMA, BF16, Layout()),
    "llama, 32": (LLAMA, FP32, Layout()),
    "llama, attention recomputed": (LLAMA, BF16, Layout(granularity="selective")),
    "llama, one layer after another recomputed": (LLAMA, BF16, full("uniform", 1)),
    "llama, two layers at a time recomputed": (LLAMA, FP32, full("uniform", 2)),
    "llama, half of the layers recomputed": (LLAMA, BF16, full("block", 2)),
    "large vocabulary": (WIDE, BF16, Layout()),
    "large vocabulary, recomputed": (WIDE, FP32, full("uniform", 1)),
    "norms of heads, tied": (QWEN3, BF16, Layout()),
    "norms of heads, recomputed": (QWEN3, FP32, full("block", 3)),
    "gpt2": (GPT2, FP32, Layout()),
    "gpt2, attention recomputed": (GPT2, BF16, Layout(granularity="selective")),
    "reward model": (JUDGE, BF16, Layout()),
    "reward model, recomputed": (JUDGE, BF16, full("uniform", 1)),
    "experts": (EXPERTS, BF16, Layout()),
    "experts, 32": (EXPERTS, FP32, Layout(granularity="selective")),
    "experts, recomputed": (EXPERTS, BF16, full("uniform", 1)),
    "many experts": (FINE, BF16, Layout()),
    "many experts, half of the layers recomputed": (FINE, FP32, full("block", 2)),
}
TOKENS, ANSWERS = 384, 256


class Measured(NamedTuple):
    resident: int  # bytes of weights, gradients and optimizer
    peak: int  # the most while it trained


def within(estimate: int, measured: int, part: float = 0.15) -> bool:
    return abs(estimate - measured) <= part * measured


def objective(output: torch.Tensor, rows: Microbatch) -> LossTerms:
    return LossTerms(-(output * rows.fields["loss_mask"][:, -output.size(1) :]).sum(), torch.tensor(1.0), {})


def batch(tokens: int, answers: int) -> Microbatch:
    """A row whose last tokens are trained."""
    mask = torch.arange(tokens)[None] >= tokens - answers
    return Microbatch(torch.randint(0, 250, (1, tokens)), torch.tensor([tokens]), {"loss_mask": mask.float()})


def measured(
    cluster: MegatronCluster,
    arch: Architecture,
    dtype: torch.dtype,
    layout: Layout,
    *,
    work: Work,
    at_once: bool = False,
) -> Measured:
    """Of optimizer steps; `at_once` has Adam update all tensors at once, as torch does on a GPU."""
    run = RunOptions(
        dtype=dtype,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        ep=layout.ep,
        etp=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        activations_checkpoint_granularity=layout.granularity,
        activations_checkpoint_method=layout.method if layout.granularity == "full" else None,
        activations_checkpoint_num_layers=layout.num_layers if layout.granularity == "full" else None,
    )
    batches = [batch(work.seq_length, work.response_length) for _ in range(work.microbatches)]
    optim = OptimConfig(name="mcore_distributed_optim" if work.sharded else "adamw")
    live = LiveBytes()
    with live:
        loaded = LoadedModel(build_model(arch, run), arch, ByteTokenizer(), run, Path("none"))  # type: ignore[arg-type]
        model = MegatronTrainable(loaded, cluster)
        model.add_optimizer(optim, clip_grad=1.0, max_steps=10)
        for group in model._optimizer.param_groups if at_once else []:
            group.update(fused=False, foreach=True)
        model.train_step(batches, objective)  # Adam's state is made by the first step
        live.restart()
        resident = live.now
        model.train_step(batches, objective)
    return Measured(resident, live.peak)


@pytest.fixture
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1) as cluster:
        yield cluster


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_takes_what_is_planned(case: str, cluster: MegatronCluster) -> None:
    arch, dtype, layout = CASES[case]
    work = Work(TOKENS, ANSWERS, microbatches=2, item=dtype.itemsize, sharded=False, on_cpu=True)
    found, plan = measured(cluster, arch, dtype, layout, work=work), training(arch, layout, work)
    assert within(plan.resident, found.resident, 0.02)
    assert within(plan.peak - plan.resident, found.peak - found.resident), plan.phases


@pytest.mark.parametrize(("arch", "dtype"), [(LLAMA, BF16), (GPT2, FP32)], ids=["llama", "gpt2"])
def test_what_is_recomputed_is_not_kept(arch: Architecture, dtype: torch.dtype, cluster: MegatronCluster) -> None:
    """Of a step's peak: with our kernels of attention, norm and gate, and with torch's norm and activation."""
    work = Work(TOKENS, ANSWERS, microbatches=2, item=dtype.itemsize, sharded=False, on_cpu=True)
    ways = (Layout(), Layout(granularity="selective"), full("uniform", 1))
    found = (measured(cluster, arch, dtype, layout, work=work) for layout in ways)
    nothing, selective, whole = (each.peak - each.resident for each in found)
    assert selective < 0.85 * nothing
    assert whole < 0.4 * nothing


@pytest.mark.parametrize("tokens", [TOKENS, 32], ids=["activations", "update"])
def test_without_what_a_cpu_adds_it_takes_what_is_planned_for_a_gpu(
    tokens: int, cluster: MegatronCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU attends in bf16, has norms of one operation as torch's layer norm is, and updates all weights at once."""
    monkeypatch.setattr(attention, "_computed", lambda tensor: tensor)
    monkeypatch.setattr(fused, "kernels_for", lambda tensor: None)
    monkeypatch.setattr(logprobs, "cpu_kernels", lambda dtype, device: None)
    monkeypatch.setattr(logprobs, "rows_together", lambda vocabulary, on_cpu: rows_together(vocabulary, on_cpu=False))
    arch = replace(LLAMA, normalization="layernorm")
    work = Work(tokens, tokens, item=2, sharded=False)
    found = measured(cluster, arch, BF16, Layout(), work=work, at_once=True)
    plan = training(arch, Layout(), work)
    assert within(plan.peak - plan.resident, found.peak - found.resident), plan.phases


def check_every_rank(cluster: MegatronCluster, arch: Architecture, layout: Layout, work: Work) -> None:
    found = measured(cluster, arch, FP32, layout, work=work)
    everyone: list[Measured | None] = [None] * cluster.world_size
    torch.distributed.all_gather_object(everyone, found)
    most = max((one for one in everyone if one is not None), key=lambda one: one.peak)
    plan = training(arch, layout, work)
    assert within(plan.peak, most.peak), (plan, everyone)
    assert within(plan.resident, most.resident), (plan, everyone)


@pytest.mark.parametrize(
    ("arch", "layout"),
    [
        (LLAMA, Layout(tp=2, pp=2, sequence_parallel=True)),
        (LLAMA, Layout(pp=2, vpp=2)),
        (LLAMA, Layout(dp=2, granularity="full")),
        (EXPERTS, Layout(dp=2, ep=2)),
        (EXPERTS, Layout(tp=2, sequence_parallel=True, ep=2, etp=1)),
    ],
    ids=["TP 2, PP 2, sequence parallel", "PP 2 × 2", "DP 2 sharded, recomputed", "EP 2 sharded", "TP 2, EP 2"],
)
def test_the_process_that_takes_most_takes_what_is_planned(arch: Architecture, layout: Layout) -> None:
    work = Work(TOKENS, ANSWERS, microbatches=2 * layout.vpp, item=4, sharded=layout.dp > 1, on_cpu=True)
    cut = Cut(tensor=layout.tp, pipeline=layout.pp, expert=layout.ep, expert_tensor=layout.expert_tp)
    run_jobs(layout.tp * layout.pp * layout.dp, [Job(cut, check_every_rank, (arch, layout, work))])
