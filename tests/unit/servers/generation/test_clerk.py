"""From a body to what is drawn, and from what was drawn to the whole answer, field by field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from fastapi.responses import StreamingResponse

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.engine.interfaces import GenerationRequest, Progress, PromptScores, Response
from nemo_aligner.servers.generation.clerk import Clerk, Served
from nemo_aligner.servers.generation.desk import FrontDesk, Job
from nemo_aligner.servers.generation.requests import ChatBody, CompletionBody, GenerateBody, RequestFault
from tests.fakes import ByteTokenizer

BOS, SEED = 7, 9
CHAT = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}", ByteTokenizer(), "t")
MESSAGES = [{"role": "user", "content": "hi"}]
Draw = Callable[[Clerk], Awaitable[Any]]


class WithBos(ByteTokenizer):
    bos_id = BOS  # type: ignore[assignment]


class Drawing(FrontDesk):
    """Answers request (p, s) with the letters "pqr"[p] and "abc"[s] at once, in two steps where it streams."""

    def __init__(self) -> None:
        super().__init__(lambda: False)
        self.asked: list[GenerationRequest] = []

    def submit(self, requests: Sequence[GenerationRequest]) -> Job:
        job = super().submit(requests)
        self.asked += job.requests.values()
        self._telling = asyncio.create_task(self._tell(job))
        return job

    async def _tell(self, job: Job) -> None:
        for request in reversed(job.requests.values()):
            for event in drawn(request):
                while job.untaken:
                    await asyncio.sleep(0)
                job.tell(request.uid, event)


def drawn(request: GenerationRequest) -> list[Progress | Response]:
    text = "pqr"[request.prompt_index % 3] + "abc"[request.sample_index]
    tokens, logprobs = list(text.encode()), [-0.5, -0.25]
    count = 0 if request.sampling is None else request.sampling.top_logprobs
    top = [[(token, value)][:count] for token, value in zip(tokens, logprobs, strict=True)]
    scores = None
    if request.scores_prompt:
        later = request.prompt_tokens[1:]
        scores = PromptScores([-1.0] * len(later), [[(token, -1.0)][:count] for token in later])
    own = (request.prompt_index, request.sample_index)
    whole = Response(*own, tokens, text, logprobs, logprobs, "stop", top, scores, request.uid)
    first = Progress(request.uid, tokens[:1], logprobs[:1], top[:1])
    return [first, whole] if request.streams else [whole]


class Client:
    """Stays until it goes away."""

    def __init__(self, gone: bool = False) -> None:
        self._gone = gone

    async def receive(self) -> dict[str, str]:
        if not self._gone:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}


def answered(
    ask: Callable[[Clerk], Any], desk: FrontDesk | None = None, chat: ChatTemplate | None = CHAT, bos: bool = False
) -> tuple[Any, list[GenerationRequest]]:
    """What a clerk answers, a stream as the list of its events, and what was asked of the desk."""
    desk = desk or Drawing()
    served = Served("tiny", WithBos(), 20, 258, chat, ("end",), bos, SEED, created=5)

    async def talk() -> Any:
        found = await ask(Clerk(served, desk))
        if isinstance(found, StreamingResponse):
            assert found.media_type == "text/event-stream"
            lines = [str(line) async for line in found.body_iterator]
            assert all(line.startswith("data: ") and line.endswith("\n\n") for line in lines)
            found = [line.removeprefix("data: ").strip() for line in lines]
        assert desk.unfinished == 0, "nothing is left behind"
        return found

    return asyncio.run(talk()), desk.asked if isinstance(desk, Drawing) else []


def complete(**body: Any) -> Callable[[Clerk], Any]:
    return lambda clerk: clerk.complete(CompletionBody(**body), Client())  # type: ignore[arg-type]


def chat(**body: Any) -> Callable[[Clerk], Any]:
    return lambda clerk: clerk.chat(ChatBody(**{"messages": MESSAGES, **body}), Client())  # type: ignore[arg-type]


def generate(**body: Any) -> Callable[[Clerk], Any]:
    return lambda clerk: clerk.generate(GenerateBody(**body), Client())  # type: ignore[arg-type]


def without_id(answer: dict[str, Any]) -> dict[str, Any]:
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_000_000_000
    return answer


def test_a_completion_has_n_choices_for_each_prompt_and_counts_all_tokens() -> None:
    answer, asked = answered(complete(prompt=["xy", "z"], n=2, max_tokens=4, seed=3))
    assert without_id(answer) == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": i, "text": text, "logprobs": None, "finish_reason": "stop"}
            for i, text in enumerate(["pa", "pb", "qa", "qb"])
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11},
    }
    params = SamplingParams(max_tokens=4, end_strings=("end",), seed=3)
    assert asked == [
        GenerationRequest(p, s, tuple(text.encode()), sampling=params, uid=2 * p + s + 1)
        for p, text in enumerate(["xy", "z"])
        for s in range(2)
    ]


def test_an_echo_is_the_prompt_with_its_log_probabilities_before_the_response() -> None:
    for prompt in ("xy", [[120, 121]]):
        answer, asked = answered(complete(prompt=prompt, echo=True, logprobs=1))
        [choice] = answer["choices"]
        assert choice["text"] == "xypa"
        assert choice["logprobs"] == {
            "tokens": ["x", "y", "p", "a"],
            "token_logprobs": [None, -1.0, -0.5, -0.25],
            "top_logprobs": [None, {"y": -1.0}, {"p": -0.5}, {"a": -0.25}],
            "text_offset": [0, 1, 2, 3],
        }
        assert (asked[0].scores_prompt, asked[0].streams) == (True, False)
        assert asked[0].sampling is not None
        assert asked[0].sampling.top_logprobs == 1
    for body in ({"echo": True}, {"logprobs": 1}):
        _, asked = answered(complete(prompt="xy", **body))
        assert not asked[0].scores_prompt, "a prompt is scored where both are wanted"


def test_of_a_prompt_that_is_only_scored_nothing_is_answered_but_itself() -> None:
    answer, asked = answered(complete(prompt="xy", echo=True, logprobs=0, max_tokens=0))
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("xy", "length", ["x", "y"])
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    assert asked[0].sampling is not None
    assert asked[0].sampling.max_tokens == 1
    answered(complete(prompt="x" * 20, echo=True, max_tokens=0))


def test_a_stream_of_a_prompt_that_is_only_told_again_ends_with_no_token_and_counts_none() -> None:
    body = {"prompt": ["xy", "z"], "n": 2, "stream": True, "echo": True, "max_tokens": 0}
    events, _ = answered(complete(**body, stream_options={"include_usage": True}))
    *pieces, usage = map(json.loads, events[:-1])
    choices = [piece["choices"][0] for piece in pieces]
    for index, text in enumerate(["xy", "xy", "z", "z"]):
        own = [(choice["text"], choice["finish_reason"]) for choice in choices if choice["index"] == index]
        assert own == [(text, None), ("", "length")]
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


def test_a_stream_of_completions_gives_each_choice_in_pieces_and_the_usage_at_the_end() -> None:
    body = {"prompt": ["xy", "z"], "n": 2, "stream": True, "seed": 3, "logprobs": 1}
    events, asked = answered(complete(**body, stream_options={"include_usage": True}))
    assert all(request.streams for request in asked)
    assert events[-1] == "[DONE]"
    *pieces, usage = map(json.loads, events[:-1])
    assert len({piece["id"] for piece in pieces}) == 1
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 11)
    texts = {index: [c for p in pieces for c in p["choices"] if c["index"] == index] for index in range(4)}
    for index, text in enumerate(["pa", "pb", "qa", "qb"]):
        first, last = texts[index]
        logprobs = {
            "tokens": [text[0]],
            "token_logprobs": [-0.5],
            "top_logprobs": [{text[0]: -0.5}],
            "text_offset": [0],
        }
        assert first == {"index": index, "text": text[0], "logprobs": logprobs, "finish_reason": None}
        assert (last["text"], last["finish_reason"], last["logprobs"]["text_offset"]) == (text[1], "stop", [1])
    assert all("usage" not in piece for piece in pieces)
    for more in ({}, {"stream_options": {"include_usage": False}}):
        events, _ = answered(complete(**body, **more))
        assert all("usage" not in json.loads(event) for event in events[:-1])


def test_a_stream_with_echo_opens_with_the_prompt_of_each_choice() -> None:
    events, _ = answered(complete(prompt=["xy", "z"], n=2, stream=True, echo=True))
    opening = [json.loads(event)["choices"] for event in events[:4]]
    assert opening == [
        [{"index": i, "text": text, "logprobs": None, "finish_reason": None}]
        for i, text in enumerate(["xy", "xy", "z", "z"])
    ]


def test_a_chat_has_n_answers_to_the_rendered_conversation() -> None:
    answer, asked = answered(chat(n=2, seed=3, max_tokens=4, logprobs=True, top_logprobs=1))
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    for index, (choice, text) in enumerate(zip(answer["choices"], ["pa", "pb"], strict=True)):
        assert choice["index"] == index
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == "stop"
        content = choice["logprobs"]["content"]
        assert [(entry["token"], entry["logprob"]) for entry in content] == [(text[0], -0.5), (text[1], -0.25)]
        assert [len(entry["top_logprobs"]) for entry in content] == [1, 1]
    params = SamplingParams(max_tokens=4, end_strings=("end",), seed=3, top_logprobs=1)
    tokens = tuple(b"u:hi;")
    assert asked == [GenerationRequest(0, s, tokens, sampling=params, uid=s + 1) for s in range(2)]
    answer, asked = answered(chat())
    assert answer["choices"][0]["logprobs"] is None
    assert asked[0].sampling == SamplingParams(max_tokens=20, end_strings=("end",), seed=SEED), (
        "as long as there is room"
    )


def test_a_stream_of_a_chat_opens_with_the_assistants_part_and_then_has_content_alone() -> None:
    events, asked = answered(chat(n=2, stream=True, stream_options={"include_usage": True}))
    assert all(request.streams for request in asked)
    *pieces, usage = map(json.loads, events[:-1])
    assert {piece["object"] for piece in [*pieces, usage]} == {"chat.completion.chunk"}
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    choices = [piece["choices"][0] for piece in pieces]
    role = {"role": "assistant", "content": ""}
    assert choices[:2] == [
        {"index": i, "delta": role, "logprobs": None, "finish_reason": None} for i in range(2)
    ]  # fmt: skip
    for index, text in enumerate(["pa", "pb"]):
        own = [choice for choice in choices[2:] if choice["index"] == index]
        assert [(choice["delta"], choice["finish_reason"]) for choice in own] == [
            ({"content": text[0]}, None),
            ({"content": text[1]}, "stop"),
        ]


def test_nemos_form_draws_one_response_to_each_sentence_and_scores_where_it_is_asked() -> None:
    answer, asked = answered(generate(sentences=["xy", "z"], tokens_to_generate=4, random_seed=3, greedy=True))
    assert answer["sentences"] == ["xypa", "zqa"]
    assert answer["logprob"] is None
    params = SamplingParams(greedy=True, top_p=0.9, max_tokens=4, end_strings=("<|endoftext|>",), seed=3)
    assert asked == [
        GenerationRequest(p, 0, tuple(text.encode()), sampling=params, uid=p + 1) for p, text in enumerate(["xy", "z"])
    ]
    for name in ("compute_logprob", "logprob"):
        answer, asked = answered(generate(sentences=["xy"], tokens_to_generate=4, **{name: True}))
        assert answer["logprob"] == [[-1.0, -0.5, -0.25]]
        assert asked[0].scores_prompt


@pytest.mark.parametrize("bos", [False, True])
def test_bos_comes_first_where_the_server_or_nemos_form_says_so(bos: bool) -> None:
    for ask, text in ((complete(prompt="xy"), b"xy"), (chat(), b"u:hi;")):
        _, asked = answered(ask, bos=bos)
        assert asked[0].prompt_tokens == (*[BOS] * bos, *text)
    for add in (False, True):
        _, asked = answered(generate(sentences=["xy"], tokens_to_generate=1, add_BOS=add), bos=bos)
        assert asked[0].prompt_tokens == (*[BOS] * add, *b"xy")
    _, asked = answered(complete(prompt=[5, 6]), bos=bos)
    assert asked[0].prompt_tokens == (5, 6), "token ids are taken as they are"


def test_without_a_seed_every_prompt_has_noise_of_its_own_and_with_one_its_place_alone_decides() -> None:
    desk = Drawing()
    served = Served("tiny", WithBos(), 20, 258, CHAT, (), False, SEED)

    async def talk() -> None:
        clerk = Clerk(served, desk)
        for seed in (None, 3, None):
            await complete(prompt=["x", "y"], seed=seed)(clerk)

    asyncio.run(talk())
    assert [request.prompt_index for request in desk.asked] == [0, 1, 0, 1, 2, 3]
    assert [request.sampling.seed for request in desk.asked if request.sampling] == [9, 9, 3, 3, 9, 9]


LONG = "This model's maximum context length is 20 tokens; the prompt has"


@pytest.mark.parametrize(
    ("ask", "message", "param", "code", "status"),
    [
        (complete(prompt="x", model="gpt"), "The model 'gpt' does not exist; this server has 'tiny'", "model",
         "model_not_found", 404),
        (chat(model="gpt"), "The model 'gpt' does not exist; this server has 'tiny'", "model", "model_not_found", 404),
        (complete(prompt="x" * 18, max_tokens=3), f"{LONG} 18, and 3 more were asked for", "prompt",
         "context_length_exceeded", 400),
        (complete(prompt="x" * 21, max_tokens=0, echo=True), f"{LONG} 21, and 0 more were asked for", "prompt",
         "context_length_exceeded", 400),
        (chat(messages=[{"role": "user", "content": "x" * 17}]), f"{LONG} 20, and some more were asked for", "messages",
         "context_length_exceeded", 400),
        (chat(max_tokens=16), f"{LONG} 5, and 16 more were asked for", "messages", "context_length_exceeded", 400),
        (generate(sentences=["xy"], tokens_to_generate=19), f"{LONG} 2, and 19 more were asked for", "sentences",
         "context_length_exceeded", 400),
        (complete(prompt=[3, 258]), "258 is not a token id, 0 to 257", "prompt", None, 400),
        (complete(prompt=[-1]), "-1 is not a token id, 0 to 257", "prompt", None, 400),
        (complete(prompt=""), "the prompt is empty, there is nothing to go on from", "prompt", None, 400),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_with_the_name_of_its_field(
    ask: Callable[[Clerk], Any], message: str, param: str, code: str | None, status: int
) -> None:
    with pytest.raises(RequestFault) as caught:
        answered(ask)
    fault = caught.value
    assert (fault.message, fault.param, fault.code, fault.status) == (message, param, code, status)


def test_what_just_fits_is_drawn() -> None:
    for ask in (
        complete(prompt="x" * 18, max_tokens=2),
        complete(prompt=[0, 257], model="tiny"),
        chat(max_tokens=15, model="tiny"),
        generate(sentences=["xy"], tokens_to_generate=18),
    ):
        _, asked = answered(ask)
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "the model has no chat template; start the server with chat_template=..."),
        ("{{ messages[3].content }}", "the chat template refuses the conversation: "),
    ],
)
def test_a_conversation_without_a_text_is_refused(template: str | None, says: str) -> None:
    made = None if template is None else ChatTemplate(template, ByteTokenizer(), "t")
    with pytest.raises(RequestFault) as caught:
        answered(chat(), chat=made)
    assert caught.value.message.startswith(says)
    assert (caught.value.param, caught.value.status) == ("messages", 400)


def test_of_a_client_that_went_away_nothing_is_drawn_any_more() -> None:
    desk = FrontDesk(lambda: False)  # nobody draws
    with pytest.raises(RequestFault, match="the client went away") as caught:
        answered(lambda clerk: clerk.complete(CompletionBody(prompt="x"), Client(gone=True)), desk)  # type: ignore[arg-type]
    assert caught.value.status == 499
    assert desk.unfinished == 0
    orders = desk.orders(idle=False)
    assert orders is not None
    assert orders.dropped == [request.uid for request in orders.new]


def test_a_stream_ends_with_an_error_where_the_server_closes() -> None:
    class ClosesAtOnce(FrontDesk):
        def submit(self, requests: Sequence[GenerationRequest]) -> Job:
            job = super().submit(requests)
            self._close()
            return job

    events, _ = answered(complete(prompt="x", stream=True), ClosesAtOnce(lambda: False))
    assert [json.loads(event) for event in events] == [
        {"error": {"message": "the server is closing", "type": "server_error", "param": None, "code": None}}
    ]


def test_a_model_is_described_as_openai_does() -> None:
    clerk = Clerk(Served("tiny", WithBos(), 20, 258, None, (), False, SEED, created=5), FrontDesk(lambda: False))
    assert clerk.model() == {"id": "tiny", "object": "model", "created": 5, "owned_by": "nemo_aligner"}
