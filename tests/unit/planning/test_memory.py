"""Counts of parameters, sizes of caches; training is measured in tests/distributed/test_planned_memory.py."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation.kv_cache import CachedPrompt, KVCache
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.model.kept_weights import KeptWeights
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.planning.memory import Work, inference, kv_cache, training, under_way
from nemo_aligner.planning.parameters import Layout, gathered_experts, stage_parameters
from tests.live_bytes import LiveBytes
from tests.tiny import ARCH, EXPERTS

SHAPES = {
    "llama": ARCH,
    "tied": replace(ARCH, share_embeddings_and_output_weights=True),
    "qwen2": replace(ARCH, qkv_bias=True),
    "qwen3": replace(ARCH, qk_layernorm=True, kv_channels=16),
    "gpt2": replace(
        ARCH, bias=True, activation="gelu", normalization="layernorm", position_embedding_type="learned_absolute"
    ),
    "reward model": replace(ARCH, reward_model_type="binary_ranking"),
    "experts": replace(EXPERTS, qk_layernorm=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_to_the_last(shape: str) -> None:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1):
        model = build_model(SHAPES[shape], RunOptions())
    assert stage_parameters(SHAPES[shape], Layout(), 0).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_together_have_every_parameter_once(tp: int, pp: int) -> None:
    """Norms are on every tensor-parallel rank, everything else of this shape on one."""
    arch = replace(ARCH, vocab_size=512)
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    together = sum(stage_parameters(arch, Layout(tp=tp, pp=pp), stage).total for stage in range(pp)) * tp
    assert together == stage_parameters(arch, Layout(), 0).total + (tp - 1) * norms


@pytest.mark.parametrize(("ep", "etp", "vpp"), [(2, 2, 1), (4, 1, 2), (4, 2, 1)])
def test_experts_are_cut_over_the_ranks_that_share_them(ep: int, etp: int, vpp: int) -> None:
    """Every rank of a stage has all of the rest, of which tensor-parallel ranks have half each."""
    arch = replace(EXPERTS, num_layers=8, moe_layer_freq=[0, 1, 1, 0, 1, 1, 1, 1])
    layout = Layout(tp=2, pp=2, vpp=vpp, dp=4, ep=ep, etp=etp)
    one = Layout(tp=2)
    whole = stage_parameters(arch, one, 0)
    parts = [stage_parameters(arch, layout, stage) for stage in range(2)]
    assert sum(part.shared for part in parts) == whole.shared
    assert sum(part.experts for part in parts) * ep * etp == whole.experts * 2
    assert layout.expert_dp * ep * etp == 8
    assert parts[0].of_optimizer(layout, sharded=True) == parts[0].shared // 4 + parts[0].experts // layout.expert_dp
    gathered = sum(gathered_experts(arch, layout, stage) for stage in range(2))
    assert gathered == whole.experts
    assert gathered_experts(arch, one, 0) == 0


@pytest.mark.parametrize("slots", [3, 8, 13])
def test_the_cache_takes_what_is_planned_at_its_worst(slots: int) -> None:
    """Rows at every width on the way, and as many as there are at the widest; no prompt is shared, as on a GPU."""
    grain, block_rows, prompt, longest = 8, 4, 5, 60
    cache = KVCache(slots, grain, block_rows, shares_prompts=False)
    live = LiveBytes()
    with live:
        keys_values = torch.zeros(ARCH.num_layers, 2, ARCH.query_groups, prompt, ARCH.head_dim)
        for slot in range(slots):
            cache.add(slot, CachedPrompt(keys_values, None))
        *narrower, widest = [8, 16, 24, 32, 48, 64][-slots:]
        for slot, width in enumerate([widest] * (slots - len(narrower)) + narrower):
            cache.ensure(torch.tensor([slot]).numpy(), torch.tensor([width - 3]).numpy())
        taken = live.now - keys_values.nbytes
    work = Work(seq_length=longest, response_length=longest - prompt, slots=slots, item=4)
    planned = kv_cache(ARCH, Layout(), work, grain, block_rows)
    assert 0.85 * planned <= taken <= 1.15 * planned


def test_the_initial_policy_takes_its_weights_once_more_on_a_cpu() -> None:
    live = LiveBytes()
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1), live:
        model = build_model(ARCH, RunOptions())
        before = live.now
        kept = KeptWeights(model)
        taken = live.now - before
        with kept.swapped_in():
            assert live.now == before + taken
    work = Work(32, 16, item=4, keeps_initial=True, on_cpu=True)
    assert training(ARCH, Layout(), work).initial_policy == taken
    beside = training(ARCH, Layout(), replace(work, on_cpu=False))
    assert (beside.initial_policy, beside.host) == (0, 2 * taken)


def test_generation_and_scoring_keep_neither_gradients_nor_optimizer() -> None:
    for slots in (0, 4):
        found = inference(ARCH, Layout(), Work(32, 16, slots=slots))
        assert found.resident == stage_parameters(ARCH, Layout(), 0).total * 2
        assert found.peak > found.resident


@pytest.mark.parametrize(
    ("pp", "vpp", "microbatches"), [(2, 1, 4), (4, 1, 2), (2, 2, 4), (2, 4, 2), (4, 2, 8), (4, 3, 4)]
)
def test_as_many_micro_batches_are_under_way_as_megatron_begins(pp: int, vpp: int, microbatches: int) -> None:
    for stage in range(pp):
        group = SimpleNamespace(size=lambda: pp, rank=lambda stage=stage: stage)
        talk = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None)
        every, all_first, first, _ = get_pp_rank_microbatches(microbatches, vpp, pp, p2p_communicator=talk)
        work = Work(8, 8, microbatches=microbatches)
        assert under_way(Layout(pp=pp, vpp=vpp), work, stage) == (every if all_first else first + 1)


def test_more_of_anything_takes_more() -> None:
    arch = Architecture(32, 4096, 14336, 32, 128256, num_query_groups=8)
    work = Work(4096, 1024, microbatches=4, rows=16)
    peak = training(arch, Layout(), work).peak
    for less in (Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(granularity="full")):
        assert training(arch, less, work).peak < peak
    for more in ({"rows": 32}, {"seq_length": 8192}, {"response_length": 4096}, {"item": 4}):
        assert training(arch, Layout(), replace(work, **more)).peak > peak
