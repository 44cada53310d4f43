"""Generation with a cache against the plain forward pass of the same model, and against the model's probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import KVCache
from nemo_aligner.engine.generation.scheduler import Generator
from nemo_aligner.engine.interfaces import GenerationRequest, Response
from nemo_aligner.engine.kernels.library import cpu_kernels
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.fakes import ByteTokenizer
from tests.tiny import ARCH

SHAPES = {
    "llama": ARCH,
    "qwen2": replace(ARCH, qkv_bias=True, share_embeddings_and_output_weights=True),
    "qwen3": replace(ARCH, qk_layernorm=True, kv_channels=16),
    "rotary positions past those of its training": replace(ARCH, max_position_embeddings=16),
    "mistral": replace(ARCH, window_size=5),
    "window above": replace(ARCH, window_size=5, window_layers=[1]),
    "biases of attention": replace(ARCH, qkv_bias=True, proj_bias=True),
    "biases of the feed-forward": replace(ARCH, mlp_bias=True),
    "geglu": replace(ARCH, activation="geglu"),
    "gpt2": replace(
        ARCH, position_embedding_type="learned_absolute", normalization="layernorm", activation="gelu", bias=True,
        num_query_groups=None,
    ),
}  # fmt: skip
PROMPTS = [tuple(b"A film"), tuple(b"It was a long evening"), tuple(b"x")]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[object]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def build(arch: Architecture, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_model(arch, RunOptions.for_inference(dtype)).eval()


def full_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """`[L, V]` float32 of the model's ordinary forward pass, no cache."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(ids, positions, None)[0, :, : ARCH.vocab_size].float()


def generate(
    model: torch.nn.Module, arch: Architecture, sampling: SamplingParams, slots: int, n: int = 1
) -> list[Response]:
    requests = [GenerationRequest(p, s, prompt) for p, prompt in enumerate(PROMPTS) for s in range(n)]
    generator = Generator(CachedForward(model, arch), ByteTokenizer(), sampling, slots, arch.encoder_seq_length)
    return sorted(generator.run(requests), key=lambda r: (r.prompt_index, r.sample_index))


@pytest.mark.parametrize("head_dim", [8, 16])  # the C kernels attend with multiples of 16
@pytest.mark.parametrize("name", SHAPES)
def test_greedy_with_cache_equals_argmax_of_the_plain_forward(name: str, head_dim: int) -> None:
    arch = replace(SHAPES[name], kv_channels=head_dim)
    model = build(arch)
    for prompt, response in zip(
        PROMPTS, generate(model, arch, SamplingParams(greedy=True, max_tokens=12), 2), strict=True
    ):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 12 and (len(tokens) == len(prompt) or tokens[-1] != ByteTokenizer.eos_id):
            tokens.append(int(full_logits(model, tokens)[-1].argmax()))
        assert response.tokens == tokens[len(prompt) :]


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_logprobs_of_drawn_tokens_equal_a_full_forward(name: str, head_dim: int) -> None:
    arch = replace(SHAPES[name], kv_channels=head_dim)
    model = build(arch)
    for response in generate(model, arch, SamplingParams(max_tokens=9, temperature=1.3), 7, n=3):
        prompt = list(PROMPTS[response.prompt_index])
        logits = full_logits(model, prompt + response.tokens)[len(prompt) - 1 : -1]
        for logprobs, temperature in ((response.logprobs, 1.0), (response.sampling_logprobs, 1.3)):
            expected = (logits / temperature).log_softmax(-1)[torch.arange(len(response.tokens)), response.tokens]
            torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", [8, 16])
def test_a_response_that_outgrows_the_room_it_began_with_keeps_what_it_saw(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(forward: CachedForward, slots: int) -> KVCache:
        return KVCache(slots, grain=4, block_rows=2, shares_prompts=forward._attends)

    monkeypatch.setattr(CachedForward, "new_cache", small)
    arch = replace(ARCH, kv_channels=head_dim)
    model = build(arch)
    for response in generate(model, arch, SamplingParams(max_tokens=40, min_tokens=40), 5, n=2):
        prompt = list(PROMPTS[response.prompt_index])
        logits = full_logits(model, prompt + response.tokens)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(40), response.tokens]
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_logprobs_in_bf16_are_near_those_of_a_full_forward(
    name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr("nemo_aligner.engine.generation.decode.cpu_kernels", lambda *_: None)
    arch = replace(SHAPES[name], kv_channels=16, init_method_std=0.1)
    model = build(arch, torch.bfloat16)
    forward = CachedForward(model, arch)
    assert (forward.kernels is not None) == kernels
    for response in generate(model, arch, SamplingParams(max_tokens=9), 7, n=3):
        prompt = list(PROMPTS[response.prompt_index])
        logits = full_logits(model, prompt + response.tokens)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(response.tokens)), response.tokens]
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_layers_in_two_calls_give_the_very_numbers_of_their_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = replace(SHAPES[name], kv_channels=16)
    model = build(arch, torch.bfloat16)
    forward = CachedForward(model, arch)
    with forward.ready():
        whole = [layer is not None for layer in forward._whole_layers]
    can = forward.kernels is not None and forward.kernels.has_products
    assert whole == [can and name not in ("qwen3", "gpt2", "geglu")] * arch.num_layers
    found = generate(model, arch, SamplingParams(max_tokens=9), 7, n=3)
    monkeypatch.setattr(CachedForward, "_whole_layer", lambda *_: None)
    assert found == generate(model, arch, SamplingParams(max_tokens=9), 7, n=3)


def test_weights_are_what_they_were_after_generation_however_it_ends() -> None:
    model = build(replace(ARCH, kv_channels=16), torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    requests = [GenerationRequest(0, s, PROMPTS[0]) for s in range(5)]
    forward = CachedForward(model, replace(ARCH, kv_channels=16))
    responses = Generator(forward, ByteTokenizer(), SamplingParams(max_tokens=5), 2, 64).run(requests)
    next(responses)
    assert model.decoder.layers[0].mlp.linear_fc1.weight.numel() == 0, "packed meanwhile"
    responses.close()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_do_not_depend_on_the_number_of_slots(dtype: torch.dtype) -> None:
    kernels = cpu_kernels(dtype, torch.device("cpu"))
    if dtype == torch.bfloat16 and not (kernels and kernels.has_products):
        pytest.skip("in bf16 only our own products round every row alike")
    arch = replace(ARCH, kv_channels=16)
    model = build(arch, dtype)
    by_slots = [generate(model, arch, SamplingParams(max_tokens=10, seed=5), slots, n=8) for slots in (1, 7, 64)]
    assert [r.tokens for r in by_slots[0]] == [r.tokens for r in by_slots[1]] == [r.tokens for r in by_slots[2]]


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_sampled_pairs_of_tokens_follow_the_model_by_chi_square(slots: int) -> None:
    arch = replace(ARCH, vocab_size=258, init_method_std=0.6)
    model = build(arch)
    draws = 400 if slots == 1 else 3000
    requests = [GenerationRequest(0, s, PROMPTS[0]) for s in range(draws)]
    generator = Generator(CachedForward(model, arch), ByteTokenizer(), SamplingParams(max_tokens=2), slots, 64)
    seen = [tuple(response.tokens) for response in generator.run(requests)]
    first = full_logits(model, list(PROMPTS[0]))[-1].softmax(-1)
    likely = first.topk(6).indices.tolist()
    expected: dict[tuple[int, ...], float] = {}
    for token in likely:
        second = full_logits(model, [*PROMPTS[0], token])[-1].softmax(-1)
        for other in second.topk(4).indices.tolist():
            expected[token, other] = float(first[token] * second[other])
    kept = [pair for pair, p in expected.items() if p * draws >= 5 and pair[0] != ByteTokenizer.eos_id]
    assert len(kept) >= 3, "the model must have pairs frequent enough to test"
    probabilities = [expected[pair] for pair in kept]
    counts = [seen.count(pair) for pair in kept]
    rest_p, rest_n = 1 - sum(probabilities), draws - sum(counts)
    assert stats.chisquare([*counts, rest_n], np.array([*probabilities, rest_p]) * draws).pvalue > 1e-3


def test_every_request_is_answered_once_with_at_most_its_limit() -> None:
    model = build(ARCH)
    responses = generate(model, ARCH, SamplingParams(max_tokens=6), 4, n=5)
    assert [(r.prompt_index, r.sample_index) for r in responses] == list(itertools.product(range(3), range(5)))
    for response in responses:
        assert len(response.tokens) == len(response.logprobs) == len(response.sampling_logprobs)
        assert response.finish_reason == ("stop" if response.tokens[-1] == ByteTokenizer.eos_id else "length")
        assert len(response.tokens) == 6 or response.finish_reason == "stop"


def test_no_stop_token_before_min_tokens() -> None:
    model = build(replace(ARCH, init_method_std=0.02))  # nearly uniform: EOS comes up often
    early = [r for r in generate(model, ARCH, SamplingParams(max_tokens=20, seed=2), 64, n=60) if len(r.tokens) <= 8]
    late = generate(model, ARCH, SamplingParams(max_tokens=20, min_tokens=8, seed=2), 64, n=60)
    assert early, "without a minimum some responses are short"
    assert all(len(r.tokens) >= 8 and ByteTokenizer.eos_id not in r.tokens[:7] for r in late)


def test_an_end_string_is_looked_for_behind_the_prompt() -> None:
    class Words(ByteTokenizer):
        """Each token a word with a blank before it, which the first word of a text loses."""

        def decode(self, ids):  # type: ignore[no-untyped-def]
            return "".join(f" w{i}" for i in ids if i < 256).removeprefix(" ")

    ends, request = SamplingParams(max_tokens=5, end_strings=(" w",), min_tokens=1), GenerationRequest(0, 0, (1, 2))
    [response] = Generator(CachedForward(build(ARCH), ARCH), Words(), ends, 1, 64).run([request])
    assert (len(response.tokens), response.text, response.finish_reason) == (1, "", "stop")


def test_repetition_penalty_is_applied_to_prompt_and_response_tokens() -> None:
    model, penalty = build(ARCH), 3.0
    sampling = SamplingParams(max_tokens=8, repetition_penalty=penalty, seed=4)
    for response in generate(model, ARCH, sampling, 2, n=2):
        prompt = list(PROMPTS[response.prompt_index])
        for at, token in enumerate(response.tokens):
            row = prompt + response.tokens[:at]
            logits = full_logits(model, row)[-1]
            seen = torch.tensor(sorted(set(row)))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            expected = float(logits.log_softmax(-1)[token])
            assert response.sampling_logprobs[at] == pytest.approx(expected, abs=1e-4)


def test_a_response_never_passes_the_context_of_the_model() -> None:
    model = build(ARCH)
    request = GenerationRequest(0, 0, tuple([65] * 60))
    generator = Generator(
        CachedForward(model, ARCH), ByteTokenizer(), SamplingParams(greedy=True, max_tokens=50), 2, 64
    )
    [response] = generator.run([request])
    assert len(response.tokens) <= 4
