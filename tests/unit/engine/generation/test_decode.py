"""The parts of the forward pass that ranks share out, put together by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation import decode
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.tiny import ARCH


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[object]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def test_the_rows_of_an_embedding_that_is_cut_over_ranks_add_up_to_those_of_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_model(ARCH, RunOptions.for_inference(torch.float32)).eval()
    table, size = model.embedding.word_embeddings, 100
    whole = table.weight.detach().clone()
    tokens = torch.tensor([0, 99, 100, 199, 200, 257])
    summed: list[torch.Tensor] = []
    monkeypatch.setattr(decode, "reduce_from_tensor_model_parallel_region", lambda part: summed.append(part) or part)
    forward = decode.CachedForward(model, ARCH)
    forward._tp = 3
    for start in range(0, len(whole), size):
        end = min(start + size, len(whole))
        table.vocab_start_index, table.vocab_end_index = start, end
        table.weight.data = whole[start:end]
        found = forward._embed(tokens, torch.arange(len(tokens)))
        assert found is summed[-1]
    assert torch.equal(sum(summed), whole[tokens])
