"""Generation on a GPU: a decode step waits for the device once, and draws what a CPU draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.scheduler import Generator
from nemo_aligner.engine.interfaces import GenerationRequest, Response
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.fakes import ByteTokenizer
from tests.pretend_gpu import PretendGPU, pretend_gpu
from tests.tiny import ARCH

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
        return sorted(generator.run(requests), key=lambda r: (r.prompt_index, r.sample_index))


@pytest.fixture
def gpu(weights: object) -> Iterator[PretendGPU]:
    with pretend_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("way", WAYS)
def test_a_decode_step_waits_for_the_device_once(way: str, weights: dict[str, Any], gpu: PretendGPU) -> None:
    steps: list[Any] = [(gpu.waits, gpu.uploads)]
    responses(weights, "gpu", WAYS[way], steps)
    assert len(steps) > 10
    assert all(sum(waits.values()) == 1 and not uploads for waits, uploads in steps[1:])


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_draws_what_a_cpu_draws(way: str, weights: dict[str, Any]) -> None:
    with pretend_gpu():
        found = responses(weights, "gpu", WAYS[way], [])
    expected = responses(weights, "cpu", WAYS[way], [])
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4)
