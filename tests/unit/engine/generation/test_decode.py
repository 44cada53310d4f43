"""What ranks share out, put together by hand: rows of an embedding, layers of a pipeline, parts of a product."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from nemo_aligner.algorithms.sampling import Drawn
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation import decode, scheduler
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.tiny import ARCH

PROMPTS = [tuple(b"A film"), tuple(b"It was a long evening"), tuple(b"x")]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[object]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return build_model(ARCH, RunOptions.for_inference(torch.float32)).eval()


def test_the_rows_of_an_embedding_that_is_cut_over_ranks_add_up_to_those_of_the_table(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, size = model.embedding.word_embeddings, 100
    whole = table.weight.detach().clone()
    tokens = torch.tensor([0, 99, 100, 199, 200, 257])
    summed: list[torch.Tensor] = []
    monkeypatch.setattr(decode, "reduce_from_tensor_model_parallel_region", lambda part: summed.append(part) or part)
    forward = CachedForward(model, ARCH)
    forward._tp = 3
    for start in range(0, len(whole), size):
        table.vocab_start_index, table.vocab_end_index = start, min(start + size, len(whole))
        table.weight.data = whole[start : table.vocab_end_index]
        found = forward._embed(tokens, torch.arange(len(tokens)))
        assert found is summed[-1]
    assert torch.equal(sum(summed), whole[tokens])


def test_products_that_are_cut_over_ranks_are_summed_and_logits_gathered(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "reduce_from_tensor_model_parallel_region", lambda part: 2 * part)
    monkeypatch.setattr(decode, "gather_from_tensor_model_parallel_region", lambda part: part.flip(-1))
    forward = CachedForward(model, ARCH)
    rows, bias = torch.randn(3, ARCH.hidden_size), torch.nn.Parameter(torch.randn(ARCH.hidden_size))
    projection = forward.layers[0].projection
    logits = torch.nn.functional.linear(model.decoder.final_layernorm(rows), model.output_layer.weight)
    for ranks, summed, gathered in ((1, rows, logits), (2, 2 * rows, logits.flip(-1))):
        forward._tp = ranks
        assert torch.equal(forward._summed(rows, projection), summed)
        assert torch.equal(forward._summed(rows, projection._replace(bias=bias)), summed + bias)
        torch.testing.assert_close(forward.logits(rows), gathered[:, : ARCH.vocab_size])


def test_what_the_last_stage_drew_is_the_same_on_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(torch.tensor([3, 2**40 + 1]), torch.tensor([-0.5, -1.25]), torch.tensor([-2.0, -0.1]))
    said: list[torch.Tensor] = []

    def broadcast(packed: torch.Tensor, source: int, group: object) -> None:
        assert (source, group) == (7, "the pipeline's")
        if said:
            packed.copy_(said[0])
        said.append(packed)

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_last_rank", lambda: 7)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda: "the pipeline's")
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    for mine in (drawn, None):
        found = scheduler._from_last_stage(mine, 2, torch.device("cpu"))
        for ours, wanted in zip(found, drawn, strict=True):
            assert ours.dtype == wanted.dtype
            assert torch.equal(ours, wanted)
    assert len(said) == 2


def test_two_stages_that_hand_on_hidden_states_are_the_whole_model(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way: deque[torch.Tensor] = deque()

    def send(hidden: torch.Tensor, to: int) -> None:
        assert to == 1
        under_way.append(hidden.clone())

    def receive(hidden: torch.Tensor, source: int) -> None:
        assert source == 0
        hidden.copy_(under_way.popleft())

    monkeypatch.setattr(torch.distributed, "send", send)
    monkeypatch.setattr(torch.distributed, "recv", receive)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_next_rank", lambda: 1)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_prev_rank", lambda: 0)
    whole, first, last = (CachedForward(model, ARCH) for _ in range(3))
    first.layers, last.layers = whole.layers[:1], whole.layers[1:]
    first._chunks = last._chunks = [range(1)]
    first._last = last._first = False
    stages = (whole, first, last)
    prefilled = [stage.prefill(PROMPTS) for stage in stages]
    caches = [stage.new_cache(len(PROMPTS)) for stage in stages]
    for slot, (one, lower, upper) in enumerate(zip(*prefilled, strict=True)):
        torch.testing.assert_close(torch.cat((lower.keys_values, upper.keys_values)), one.keys_values)
        torch.testing.assert_close(upper.logits, one.logits)
        assert lower.logits is None
        for cache, prompt in zip(caches, (one, lower, upper), strict=True):
            cache.add(slot, prompt)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    found = []
    for stage, cache in zip(stages, caches, strict=True):
        cache.ensure(np.arange(len(PROMPTS)), lengths + 1)
        order = np.array(cache.slots)
        found.append(stage.step(torch.from_numpy(order + 65), torch.from_numpy(lengths[order]), cache))
    assert found[1] is None
    torch.testing.assert_close(found[2], found[0])
    assert not under_way
