"""Requests that come while others are drawn get what they would get alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import CachedPrompt
from nemo_aligner.engine.generation.scheduler import Generator
from nemo_aligner.engine.generation.serving import Server
from nemo_aligner.engine.interfaces import GenerationRequest, Orders, Progress, Response
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.fakes import EOS, ByteTokenizer
from tests.tiny import ARCH

LENGTH = ARCH.max_position_embeddings
KINDS = [
    SamplingParams(greedy=True, max_tokens=14),
    SamplingParams(max_tokens=20, seed=3, top_logprobs=3),
    SamplingParams(max_tokens=9, temperature=0.7, top_k=9, seed=4, min_tokens=9),
    SamplingParams(max_tokens=20, repetition_penalty=1.7, seed=5),
    SamplingParams(max_tokens=20, repetition_penalty=1.7, seed=6, end_strings=("e",)),
]
PROMPTS = [tuple(b"A film"), tuple(b"It was a long evening"), tuple(b"x")]
REQUESTS = [
    GenerationRequest(p, s, prompt, sampling=KINDS[(p + s) % len(KINDS)], uid=10 * p + s + 1)
    for p, prompt in enumerate(PROMPTS)
    for s in range(4)
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[object]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(cluster: object) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_model(ARCH, RunOptions.for_inference(torch.float32)).eval()


class Script:
    """A desk that gives out its orders turn by turn, and leaves when all is drawn that it waits for."""

    def __init__(self, turns: Sequence[Orders], expected: int) -> None:
        self._turns, self._expected = list(turns), expected
        self.responses: list[Response] = []
        self.progress: list[Progress] = []
        self.lost: list[int] = []
        self.turn = 0
        self.idle_turns = 0

    def orders(self, *, idle: bool) -> Orders | None:
        self.turn += 1
        self.idle_turns += idle
        if self._turns:
            return self._turns.pop(0)
        return None if len(self.responses) + len(self.lost) == self._expected else Orders()

    def drawn(self, progress: Sequence[Progress]) -> None:
        self.progress += progress

    def finished(self, response: Response) -> None:
        self.responses.append(response)

    def failed(self, uids: Sequence[int]) -> None:
        self.lost += uids


def generator(model: torch.nn.Module, slots: int, sampling: SamplingParams | None = None) -> Generator:
    sampling = sampling or SamplingParams(max_tokens=LENGTH)
    return Generator(CachedForward(model, ARCH), ByteTokenizer(), sampling, slots, LENGTH)


def serve(
    model: torch.nn.Module,
    slots: int,
    turns: Sequence[Orders],
    expected: int,
    tokenizer: ByteTokenizer | None = None,
    alone: bool = True,
) -> Script:
    desk, unbounded = Script(turns, expected), SamplingParams(max_tokens=LENGTH)
    server = Server(CachedForward(model, ARCH), tokenizer or ByteTokenizer(), unbounded, slots, LENGTH)
    server.serve(desk, lambda orders: orders, alone=alone)
    return desk


def alone(model: torch.nn.Module, request: GenerationRequest) -> Response:
    assert request.sampling is not None
    [response] = generator(model, 1, request.sampling).run([replace(request, sampling=None)])
    return response


def same(a: Response, b: Response) -> None:
    assert (a.uid, a.tokens, a.text, a.finish_reason) == (b.uid, b.tokens, b.text, b.finish_reason)
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.sampling_logprobs, b.sampling_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("slots", [1, 3, 32])
@pytest.mark.parametrize("together", [1, 5, 12])
def test_each_request_gets_what_it_gets_alone_whenever_it_comes(
    model: torch.nn.Module, slots: int, together: int
) -> None:
    turns = [Orders(REQUESTS[i : i + together]) for i in range(0, len(REQUESTS), together)]
    desk = serve(model, slots, turns, len(REQUESTS))
    found = {response.uid: response for response in desk.responses}
    assert sorted(found) == sorted(request.uid for request in REQUESTS)
    for request in REQUESTS:
        same(found[request.uid], alone(model, request))


def test_a_request_joins_at_the_next_step(model: torch.nn.Module) -> None:
    endless = SamplingParams(max_tokens=40, min_tokens=40)
    first, second = (GenerationRequest(i, 0, PROMPTS[i], sampling=endless, uid=i + 1) for i in range(2))
    desk = serve(model, 4, [Orders([first]), *[Orders()] * 4, Orders([second])], 2)
    # each turn draws a token for everybody; the prefill before the first one gives the first token
    assert [response.uid for response in desk.responses] == [1, 2]
    assert desk.turn - 1 == 5 + 39


def test_waiting_is_allowed_only_while_nothing_is_drawn(model: torch.nn.Module) -> None:
    short = SamplingParams(max_tokens=3, min_tokens=3)
    request = GenerationRequest(0, 0, PROMPTS[0], sampling=short, uid=1)
    desk = serve(model, 4, [Orders(), Orders([request]), Orders(), Orders()], 1)
    assert desk.turn == 5
    assert desk.idle_turns == 4  # the turn of the prompt gives two tokens, the next one the third


def test_who_is_dropped_makes_room_and_disturbs_nobody(model: torch.nn.Module) -> None:
    endless = SamplingParams(max_tokens=40, min_tokens=40)
    held = GenerationRequest(0, 0, PROMPTS[0], sampling=endless, uid=1)
    queued = GenerationRequest(1, 0, PROMPTS[1], sampling=endless, uid=2)
    staying = replace(REQUESTS[5], uid=3)
    turns = [Orders([held, queued, staying]), Orders(), Orders(dropped=[1, 2])]
    desk = serve(model, 1, turns, 1)
    [response] = desk.responses
    same(response, alone(model, staying))
    assert desk.turn <= 3 + 20  # it did not wait for the forty tokens of those who left


def test_progress_is_told_of_streams_alone_and_grows_to_the_response(model: torch.nn.Module) -> None:
    told = replace(REQUESTS[1], streams=True)
    desk = serve(model, 8, [Orders([told, *REQUESTS[2:]])], len(REQUESTS) - 1)
    assert {progress.uid for progress in desk.progress} == {told.uid}
    [response] = [r for r in desk.responses if r.uid == told.uid]
    lengths = [len(progress.tokens) for progress in desk.progress]
    assert lengths == sorted(set(lengths))
    for progress in desk.progress:
        assert progress.tokens == response.tokens[: len(progress.tokens)]
        assert progress.logprobs == response.logprobs[: len(progress.tokens)]
        assert progress.top_logprobs == response.top_logprobs[: len(progress.tokens)]


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([4, 6, 1, 9, 2], [[4, 6], [1, 9], [2]]),  # ten tokens together, not more
        ([3, 12, 3, 3], [[3], [12], [3, 3]]),
        ([12, 11], [[12], [11]]),
        ([1] * 12, [[1] * 10, [1] * 2]),
    ],
)
def test_a_prefill_has_at_most_its_tokens_or_one_prompt_and_no_prompt_twice(
    model: torch.nn.Module, lengths: list[int], groups: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_aligner.engine.generation.scheduler.PREFILL_TOKENS", 10)
    prefilled: list[list[int]] = []
    plain = CachedForward.prefill

    def prefill(self: CachedForward, prompts: Sequence[Sequence[int]], scored: int | None = None) -> list[CachedPrompt]:
        prefilled.append([len(prompt) for prompt in prompts])
        return plain(self, prompts, scored)

    monkeypatch.setattr(CachedForward, "prefill", prefill)
    prompts = [(65 + p, *range(1, length)) for p, length in enumerate(lengths)]
    requests = [GenerationRequest(p, s, prompt) for p, prompt in enumerate(prompts) for s in range(2)]
    sampling = SamplingParams(greedy=True, max_tokens=1)
    assert len(list(generator(model, len(requests), sampling).run(requests))) == len(requests)
    assert prefilled == groups


def full_logprobs(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """`[L, V]` log-probabilities of what comes after each token, by the plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, :, : ARCH.vocab_size]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_of_the_prompt_and_likeliest_tokens_are_those_of_a_full_forward(
    model: torch.nn.Module, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_aligner.engine.generation.decode.SCORED_TOGETHER", 4)
    params = SamplingParams(max_tokens=6, top_logprobs=3, seed=2)
    plain = GenerationRequest(0, 1, prompt, sampling=replace(params, top_logprobs=0), uid=2)
    scored = GenerationRequest(0, 0, prompt, sampling=params, scores_prompt=True, uid=1)
    found = {r.uid: r for r in serve(model, 4, [Orders([plain, scored])], 2).responses}
    assert found[2].prompt_scores is None
    assert found[2].top_logprobs == []
    response = found[1]
    scores = response.prompt_scores
    assert scores is not None
    everything = [*prompt, *response.tokens]
    expected = full_logprobs(model, everything)
    values = [*scores.logprobs, *response.logprobs]
    wanted = [float(expected[i, token]) for i, token in enumerate(everything[1:])]
    assert values == pytest.approx(wanted, abs=1e-4)
    tops = [*scores.top, *response.top_logprobs]
    assert len(tops) == len(everything) - 1
    for at, top in enumerate(tops):
        best = expected[at].topk(3)
        assert [token for token, _ in top] == best.indices.tolist()
        assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_greedy_token_has_the_very_figure_of_the_likeliest(model: torch.nn.Module) -> None:
    params = SamplingParams(greedy=True, max_tokens=12, top_logprobs=2)
    request = GenerationRequest(0, 0, PROMPTS[1], sampling=params, uid=1)
    [response] = serve(model, 2, [Orders([request])], 1).responses
    assert [top[0] for top in response.top_logprobs] == list(zip(response.tokens, response.logprobs, strict=True))


def test_a_prompt_that_fills_the_context_can_be_scored(model: torch.nn.Module) -> None:
    prompt = tuple(range(LENGTH - 1))
    params = SamplingParams(max_tokens=5)
    request = GenerationRequest(0, 0, prompt, sampling=params, scores_prompt=True, uid=1)
    [response] = serve(model, 2, [Orders([request])], 1).responses
    assert len(response.tokens) == 1
    assert response.finish_reason == ("stop" if response.tokens == [EOS] else "length")
    assert response.prompt_scores is not None
    wanted = full_logprobs(model, prompt)[torch.arange(LENGTH - 2), torch.tensor(prompt[1:])]
    assert response.prompt_scores.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
