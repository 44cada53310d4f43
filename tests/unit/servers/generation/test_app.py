"""The generation server over HTTP, with OpenAI's own client, around a small real model."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.errors import ServerError
from nemo_aligner.ports import free_port
from nemo_aligner.servers.doors import Door, open_doors
from nemo_aligner.servers.generation.app import make_app
from nemo_aligner.servers.generation.clerk import Served
from nemo_aligner.servers.generation.desk import FrontDesk
from tests.fakes import ByteTokenizer
from tests.tiny import ARCH

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
CHAT = ChatTemplate(TEMPLATE, ByteTokenizer(), "chat_template")
LENGTH = ARCH.max_position_embeddings


@dataclass
class Shop:
    plain: torch.nn.Module  # the same model once more: the served one has lent out its weights
    client: openai.OpenAI
    http: httpx.Client
    port: int
    web_port: int

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Of every token but the first, by the plain forward pass."""
        found = self.logits(tokens)[:-1].log_softmax(-1)
        return found[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].tolist()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        positions = torch.arange(len(tokens))[None]
        return self.plain(torch.tensor([tokens]), positions, None)[0, :, : ARCH.vocab_size].float()


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        run = RunOptions.for_inference(torch.float32)
        torch.manual_seed(3)
        plain = build_model(ARCH, run).eval()
        torch.manual_seed(3)
        loaded = LoadedModel(build_model(ARCH, run), ARCH, ByteTokenizer(), run, Path("none"))  # type: ignore[arg-type]
        policy = MegatronPolicy(loaded, cluster)
        leave = threading.Event()
        desk = FrontDesk(leave.is_set)
        served = Served("tiny", ByteTokenizer(), LENGTH, ARCH.vocab_size, CHAT, (), False, seed=9)
        port, web_port = free_port(), free_port()
        doors = [Door("127.0.0.1", port, "port"), Door("127.0.0.1", web_port, "web_port", "me", "secret")]
        url = f"http://127.0.0.1:{port}"
        with open_doors(make_app(served, desk), doors), httpx.Client(base_url=url, timeout=20) as http:
            drawing = threading.Thread(target=policy.serve, args=(desk, 16))
            drawing.start()
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
            yield Shop(plain, client, http, port, web_port)
            leave.set()
            drawing.join(timeout=20)
            assert not drawing.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_models_are_listed_and_found_by_name(shop: Shop) -> None:
    assert [model.id for model in shop.client.models.list()] == ["tiny"]
    assert shop.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        shop.client.models.retrieve("other")


def test_a_completion_is_what_the_model_says(shop: Shop) -> None:
    found = shop.client.completions.create(
        model="tiny", prompt="A film", max_tokens=6, temperature=0, logprobs=2, extra_body={"min_tokens": 6}
    )
    [choice] = found.choices
    tokens = list(b"A film")
    for _ in range(6):
        logits = shop.logits(tokens)[-1]
        logits[ByteTokenizer.eos_id] = -torch.inf
        tokens.append(int(logits.argmax()))
    assert choice.text == ByteTokenizer().decode(tokens[6:])
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(shop.logprobs(tokens)[5:], abs=1e-4)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (6, 6, 12)


def test_an_end_string_before_the_least_tokens_is_text_whole_and_streamed(shop: Shop) -> None:
    ask = {"model": "tiny", "prompt": "A film", "max_tokens": 12, "temperature": 0, "extra_body": {"min_tokens": 12}}
    create = functools.partial(shop.client.completions.create, **ask)
    whole = create().choices[0].text
    early = next(c for c in whole if c.isascii() and c != whole[-1])
    found = create(stop=early).choices[0]
    assert (found.text, found.finish_reason) == (whole, "length")
    assert "".join(piece.choices[0].text for piece in create(stop=early, stream=True)) == whole


def test_a_seed_decides_the_text_and_none_gives_another_each_time(shop: Shop) -> None:
    def drawn(seed: int | None, prompt: str = "A film", n: int = 2) -> list[str]:
        found = shop.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=8, n=n, seed=seed, extra_body={"min_tokens": 8}
        )
        assert [choice.index for choice in found.choices] == list(range(n))
        return [choice.text for choice in found.choices]

    first = drawn(5)
    assert len(set(first)) == 2
    assert drawn(5) == first
    assert drawn(5, n=1) == first[:1]
    assert drawn(6) != first
    assert drawn(None) != drawn(None)


def test_several_prompts_come_back_in_their_order_with_n_choices_each(shop: Shop) -> None:
    def greedy(prompt: object, n: int = 1) -> list[str]:
        found = shop.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=5, n=n, temperature=0,  # type: ignore[call-overload]
        )  # fmt: skip
        return [choice.text for choice in found.choices]

    prompts = ["x", "A film", "It was"]
    one_by_one = [greedy(prompt)[0] for prompt in prompts]
    assert greedy(prompts) == one_by_one
    assert greedy([list(p.encode()) for p in prompts]) == one_by_one
    assert greedy(prompts, n=2) == [text for text in one_by_one for _ in range(2)]


def test_scoring_with_echo_names_every_token_of_the_prompt(shop: Shop) -> None:
    for more in (0, 1):
        found = shop.client.completions.create(
            model="tiny", prompt=list(b"It was"), max_tokens=more, temperature=0, logprobs=1, echo=True
        )
        [choice] = found.choices
        assert choice.text.startswith("It was")
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 6 + more
        assert logprobs.tokens[:6] == list("It was")
        assert logprobs.text_offset == list(range(6 + more))
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1:6] == pytest.approx(shop.logprobs(list(b"It was")), abs=1e-4)
        assert found.usage is not None
        assert found.usage.completion_tokens == more
        if more:
            assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())


def test_a_prompt_that_fills_the_context_is_scored_whole(shop: Shop) -> None:
    prompt = [97 + place % 26 for place in range(LENGTH)]
    found = shop.client.completions.create(model="tiny", prompt=prompt, max_tokens=0, logprobs=0, echo=True)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[1:] == pytest.approx(shop.logprobs(prompt), abs=1e-4)


def test_a_stop_string_ends_the_text_before_it(shop: Shop) -> None:
    def text(stop: list[str] | None) -> tuple[str, str]:
        found = shop.client.completions.create(
            model="tiny", prompt="A film", max_tokens=20, seed=1, stop=stop, extra_body={"min_tokens": 1}
        )
        return found.choices[0].text, found.choices[0].finish_reason

    whole, _ = text(None)
    cut = whole[3:5]
    assert text([cut]) == (whole[: whole.index(cut)], "stop")


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_is_the_completion_in_pieces(shop: Shop, logprobs: int | None) -> None:
    arguments = {"model": "tiny", "prompt": ["A film", "x"], "max_tokens": 12, "seed": 3, "n": 2, "logprobs": logprobs}
    whole = shop.client.completions.create(**arguments)
    texts, reasons, tokens = ["", "", "", ""], [None] * 4, [[], [], [], []]  # type: ignore[var-annotated]
    usage = None
    for event in shop.client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = event.usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            assert reasons[choice.index] is None, "nothing comes after the end"
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs is not None:
                assert choice.logprobs.text_offset is not None
                tokens[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    if logprobs:
        assert tokens == [choice.logprobs.token_logprobs for choice in whole.choices]


def test_a_chat_goes_through_the_template(shop: Shop) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    arguments = {"model": "tiny", "messages": messages, "max_completion_tokens": 7, "temperature": 0}
    chat = shop.client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    assert chat.model == shop.client.models.list().data[0].id
    plain = shop.client.completions.create(model="tiny", prompt="s:be;u:hi;a:", max_tokens=7, temperature=0, logprobs=2)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].message.role == "assistant"
    found = chat.choices[0].logprobs.content
    assert [entry.logprob for entry in found] == plain.choices[0].logprobs.token_logprobs
    assert all(len(entry.top_logprobs) == 2 for entry in found)
    assert found[0].logprob == found[0].top_logprobs[0].logprob
    pieces = list(shop.client.chat.completions.create(**arguments, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == chat.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == chat.choices[0].finish_reason
    assert len({piece.id for piece in pieces}) == 1


def test_a_chat_has_as_many_answers_as_are_asked_for_each_drawn_for_itself(shop: Shop) -> None:
    def chat(n: int, seed: int | None = 5) -> list[str | None]:
        asked = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 8,
            "seed": seed,
            "n": n,
        }
        found = shop.client.chat.completions.create(**asked, extra_body={"min_tokens": 8})
        assert [choice.index for choice in found.choices] == list(range(n))
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len("u:hi;a:"), 8 * n)
        pieces = list(shop.client.chat.completions.create(**asked, extra_body={"min_tokens": 8}, stream=True))
        openings = [choice.index for piece in pieces for choice in piece.choices if choice.delta.role == "assistant"]
        assert openings == list(range(n))
        texts = [choice.message.content for choice in found.choices]
        if seed is not None:
            for index, text in enumerate(texts):
                parts = [c.delta.content or "" for piece in pieces for c in piece.choices if c.index == index]
                assert "".join(parts) == text
        return texts

    three = chat(3)
    assert len(set(three)) == 3
    assert chat(1) == three[:1]
    assert chat(1, None) != chat(1, None)
    same = shop.client.completions.create(
        model="tiny", prompt="u:hi;a:", max_tokens=8, seed=5, n=3, extra_body={"min_tokens": 8}
    )
    assert [choice.text for choice in same.choices] == three


def test_nemos_generate_gives_sentences_tokens_and_log_probabilities(shop: Shop) -> None:
    body = {"sentences": ["A film", "x"], "tokens_to_generate": 4, "greedy": True, "min_tokens_to_generate": 4}
    found = shop.http.put("/generate", json={**body, "compute_logprob": True}).json()
    for sentence, prompt, ids, pieces, values, offsets in zip(
        found["sentences"], body["sentences"], found["token_ids"], found["tokens"], found["logprob"], found["offsets"],
        strict=True,
    ):  # fmt: skip
        assert ids[: len(prompt)] == list(prompt.encode())
        assert len(ids) == len(prompt) + 4 == len(pieces) == len(offsets)
        assert sentence == ByteTokenizer().decode(ids)
        assert values == pytest.approx(shop.logprobs(ids), abs=1e-4)
    assert shop.http.put("/generate", json=body).json()["logprob"] is None
    assert shop.http.put("/generate", json={**body, "logprob": True}).json()["logprob"] == found["logprob"]
    seeded = {**body, "greedy": False, "random_seed": 4}
    assert shop.http.put("/generate", json=seeded).json() == shop.http.put("/generate", json=seeded).json()


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code", "says"),
    [
        ("completions", '{"prompt": "x"', 400, None, None, "not valid JSON"),
        ("completions", '{"prompt": "x", "max_token": 3}', 400, "max_token", None, "Unrecognized request argument"),
        ("completions", '{"prompt": 3}', 400, "prompt", None, "neither a text nor"),
        ("completions", '{"prompt": []}', 400, "prompt", None, "neither a text nor"),
        ("completions", '{"prompt": ""}', 400, "prompt", None, "empty"),
        ("completions", '{"prompt": [5, 258]}', 400, "prompt", None, "258 is not a token id, 0 to 257"),
        ("completions", '{"prompt": "x", "temperature": -1}', 400, "temperature", None, "greater than or equal to 0"),
        ("completions", '{"prompt": "x", "n": 0}', 400, "n", None, "greater than or equal to 1"),
        ("completions", '{"prompt": "x", "max_tokens": "7"}', 400, "max_tokens", None, "valid integer"),
        ("completions", '{"prompt": "x", "best_of": 2}', 400, "best_of", None, "not offered"),
        ("completions", '{"prompt": "x", "stream_options": {}}', 400, None, None, "stream=true"),
        ("completions", '{"prompt": "x", "model": "gpt-4"}', 404, "model", "model_not_found", "does not exist"),
        ("completions", '{"prompt": "x", "max_tokens": 64}', 400, "prompt", "context_length_exceeded", "64 tokens"),
        ("chat/completions", '{"messages": []}', 400, "messages", None, "at least 1"),
        ("chat/completions", '{"messages": [{"role": "user"}]}', 400, "messages", None, "required"),
        ("chat/completions", '{"messages": [{"role": "u", "content": "x"}], "tools": [1]}', 400, "tools", None, "out"),
        ("chat/completions", '{"messages": [{"role": "user", "content": "%s"}]}' % ("x" * 60), 400, "messages",
         "context_length_exceeded", "64 tokens"),
        ("other", "{}", 404, None, None, "Not Found"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_as_openai_does(
    shop: Shop, path: str, body: str, status: int, param: str | None, code: str | None, says: str
) -> None:
    answer = shop.http.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert says in error["message"]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ('{"prompt": 3}',
         "prompt: neither a text nor a list of texts, of token ids, or of lists of token ids", "prompt"),
        ('{"prompt": "x", "stream_options": {}}', "stream_options is for stream=true only", None),
        ('{"prompt": "x", "n": 0}', "n: Input should be greater than or equal to 1", "n"),
        ("{}", "prompt: Field required", "prompt"),
        ('{"prompt": "x", "stream": true, "stream_options": {"a": 1}}',
         "Unrecognized request argument supplied: stream_options.a", "stream_options.a"),
        ('{"prompt": "x", "b": 1}', "Unrecognized request argument supplied: b", "b"),
        ('{"prompt": "x", "stream": true, "stream_options": {"include_usage": 1}}',
         "stream_options.include_usage: Input should be a valid boolean", "stream_options"),
        ('{"prompt"', "the body is not valid JSON: Expecting ':' delimiter", None),
        ("", "the body is not a JSON object; is the Content-Type application/json?", None),
    ],
)  # fmt: skip
def test_a_fault_of_a_body_is_named_by_its_field(shop: Shop, body: str, message: str, param: str | None) -> None:
    answer = shop.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.json() == {
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    }


def test_another_path_or_method_is_refused_in_the_same_form(shop: Shop) -> None:
    for method, path, status, said in (
        ("GET", "/v2", 404, "Not Found"),
        ("GET", "/generate", 405, "Method Not Allowed"),
        ("POST", "/v1/models", 405, "Method Not Allowed"),
    ):
        answer = shop.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"] == {
            "message": f"{method} {path}: {said}", "type": "invalid_request_error", "param": None, "code": None,
        }  # fmt: skip


def test_openais_client_knows_the_faults(shop: Shop) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        shop.client.completions.create(model="tiny", prompt="x", max_tokens=1000)
    assert refused.value.code == "context_length_exceeded"


def unfinished(shop: Shop) -> int:
    return int(shop.http.get("/health").json()["unfinished"])


def test_a_client_that_goes_away_is_drawn_no_more(shop: Shop) -> None:
    endless = {"min_tokens": 50}
    with shop.client.completions.create(
        model="tiny", prompt="A film", max_tokens=50, n=40, stream=True, extra_body=endless
    ) as stream:
        next(iter(stream))
        assert unfinished(shop) > 0
    wait_until(lambda: unfinished(shop) == 0)
    hasty = openai.OpenAI(base_url=str(shop.client.base_url), api_key="none", max_retries=0, timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model="tiny", prompt="A film", max_tokens=50, n=400, extra_body=endless)
    wait_until(lambda: unfinished(shop) == 0, seconds=2)
    assert shop.client.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text is not None


def test_the_page_asks_for_its_password(shop: Shop) -> None:
    url = f"http://127.0.0.1:{shop.web_port}"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, auth=("me", "wrong")).status_code == 401
    assert httpx.get(f"{url}/v1/models").status_code == 401
    page = httpx.get(url, auth=("me", "secret"))
    assert page.status_code == 200
    assert "<title>NeMo-Aligner</title>" in page.text
    assert shop.http.get("/").status_code == 200


def test_a_port_that_is_taken_is_one_clear_fault(shop: Shop) -> None:
    desk = FrontDesk(lambda: False)
    served = Served("tiny", ByteTokenizer(), LENGTH, ARCH.vocab_size, None, (), False, seed=9)
    with (
        pytest.raises(ServerError, match=rf"port={shop.port}: Address already in use"),
        open_doors(make_app(served, desk), [Door("127.0.0.1", shop.port, "port")]),
    ):
        pass


def test_clients_are_told_when_the_server_closes() -> None:
    desk, port = FrontDesk(lambda: False), free_port()
    served = Served("tiny", ByteTokenizer(), LENGTH, ARCH.vocab_size, None, (), False, seed=9)
    url = f"http://127.0.0.1:{port}"
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=20))

    with open_doors(make_app(served, desk), [Door("127.0.0.1", port, "port")]):
        waiting = threading.Thread(target=ask)
        waiting.start()
        wait_until(lambda: desk.unfinished == 1)
        desk.close()
        waiting.join(timeout=20)
        ask()
    assert [answer.status_code for answer in answers] == [503, 503]
    told = {"message": "the server is closing", "type": "server_error", "param": None, "code": None}
    assert [answer.json()["error"] for answer in answers] == [told, told]
