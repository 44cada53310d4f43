"""Generation on a GPU: a decode step waits for the device once, and draws what a CPU draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation import graphs
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import KVCache
from nemo_aligner.engine.generation.scheduler import Generator
from nemo_aligner.engine.interfaces import GenerationRequest, Response
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.fakes import ByteTokenizer
from tests.pretend_gpu import PretendGPU, pretend_gpu
from tests.tiny import ARCH

pytestmark = pytest.mark.processes  # none is started, but they take as long
PROMPTS = [tuple(b"A film"), tuple(b"It was a long evening"), tuple(b"x")]
WAYS = {
    "plain": [SamplingParams(max_tokens=12)],
    "greedy": [SamplingParams(max_tokens=12, greedy=True)],
    "filtered": [SamplingParams(max_tokens=12, temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.3)],
    "no early end": [SamplingParams(max_tokens=12, min_tokens=12)],
}
WAYS["side by side"] = [way for [way] in WAYS.values()]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1):
        torch.manual_seed(3)
        return build_model(ARCH, RunOptions.for_inference(torch.float32)).state_dict()


def responses(
    weights: dict[str, Any], accelerator: str, ways: list[SamplingParams], steps: list[Any]
) -> list[Response]:
    """Of every prompt in every way, four at once; what `steps` holds after each step is noted there."""
    with start_cluster(TrainerConfig(accelerator=accelerator), tensor=1, pipeline=1):
        model = build_model(ARCH, RunOptions.for_inference(torch.float32)).eval()
        model.load_state_dict(weights)
        generator = Generator(CachedForward(model, ARCH), ByteTokenizer(), SamplingParams(max_tokens=64), 4, 64)
        requests = [
            GenerationRequest(p, s, prompt, sampling=way)
            for p, prompt in enumerate(PROMPTS)
            for s, way in enumerate(ways)
        ]
        step = generator._decode

        def noted() -> Any:
            counters = steps[0] if steps else ()
            for counter in counters:
                counter.clear()
            found = step()
            steps.append([Counter(counter) for counter in counters])
            return found

        generator._decode = noted  # type: ignore[method-assign]
        found = sorted(generator.run(requests), key=lambda r: (r.prompt_index, r.sample_index))
        recordings = generator._forward._graphed
        assert recordings is None or not recordings._recorded, "their memory is given back"
        return found


@pytest.fixture
def gpu(weights: object) -> Iterator[PretendGPU]:
    with pretend_gpu() as gpu:
        yield gpu


def assert_same(found: list[Response], expected: list[Response]) -> None:
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_decode_step_waits_for_the_device_once(way: str, weights: dict[str, Any], gpu: PretendGPU) -> None:
    steps: list[Any] = [(gpu.waits, gpu.uploads)]
    responses(weights, "gpu", WAYS[way], steps)
    assert len(steps) > 10
    recordings = sum(waits.pop("synchronize", 0) for waits, _ in steps[1:])
    assert 0 < recordings < 4
    assert gpu.replays > 0
    assert all(sum(waits.values()) == 1 and not uploads for waits, uploads in steps[1:])


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_draws_what_a_cpu_draws(way: str, weights: dict[str, Any]) -> None:
    with pretend_gpu():
        found = responses(weights, "gpu", WAYS[way], [])
    assert_same(found, responses(weights, "cpu", WAYS[way], []))


@pytest.mark.parametrize("kept", [1, 8])
def test_graphs_follow_blocks_that_come_and_go(
    kept: int, weights: dict[str, Any], gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses of different lengths move from bucket to bucket, of two rows a block, and end in between."""
    monkeypatch.setattr(graphs, "MIN_STEPS", 0)
    monkeypatch.setattr(graphs, "_KEPT", kept)
    monkeypatch.setattr(
        CachedForward, "new_cache", lambda forward, slots: KVCache(slots, grain=4, block_rows=2, shares_prompts=False)
    )
    ways = [SamplingParams(max_tokens=length, min_tokens=length, seed=length) for length in (3, 25, 9, 14)]
    steps: list[Any] = [(gpu.waits, gpu.uploads)]
    found = responses(weights, "gpu", ways, steps)
    assert sum(waits["synchronize"] for waits, _ in steps[1:]) > 5
    assert gpu.replays > 15
    monkeypatch.setattr(graphs, "MIN_STEPS", 10**6)
    replays = gpu.replays
    assert_same(found, responses(weights, "gpu", ways, []))
    assert gpu.replays == replays


def test_without_graphs_steps_go_on_kernel_by_kernel_with_one_line(
    weights: dict[str, Any], gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*args: Any, **how: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    found = responses(weights, "gpu", WAYS["plain"], [])
    assert [record.getMessage() for record in caplog.records].count(
        "decode steps are launched kernel by kernel, slower: no CUDA graph of them "
        "(operation not permitted when stream is capturing)"
    ) == 1
    monkeypatch.setattr(graphs, "MIN_STEPS", 10**6)
    assert_same(found, responses(weights, "gpu", WAYS["plain"], []))
