"""Whole servers on small real models: they answer as their config says, until they are told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from nemo_aligner.config.cut import Sizes
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.config.serving import ServerConfig
from nemo_aligner.errors import CheckpointError
from nemo_aligner.ports import free_port
from nemo_aligner.stages.serving import generation, rewards
from tests.fakes import FakeTriton
from tests.unit.stages.conftest import MEAN, STD, Archives
from tests.unit.stages.plain import opened
from tests.unit.stages.refusals import check_refused

TOKEN = "0123456789abcdef"
TEXTS = ["A film", "It was", "x"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"


def config(archives: Archives, **given: Any) -> GenerationConfig:
    cfg = GenerationConfig(gpt_model_file=str(archives.policy), seed=41, server=True, port=free_port(), **given)
    cfg.trainer.accelerator, cfg.trainer.precision = "cpu", "32"
    return cfg


def while_running(run: Callable[[], None], is_up: Callable[[], bool], talk: Callable[[], Any]) -> Any:
    """What `talk` returns beside `run`, a server on the main thread; SIGTERM comes when it is done."""
    over, found = threading.Event(), Future[Any]()

    def client() -> None:
        while not over.is_set() and not is_up():
            time.sleep(0.02)
        if not over.is_set():
            try:
                found.set_result(talk())
            except BaseException as fault:
                found.set_exception(fault)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        run()
    finally:
        over.set()
        thread.join()
    return found.result(0)


def serving(cfg: GenerationConfig, talk: Callable[[openai.OpenAI], Any]) -> Any:
    """What `talk` finds out from the server of `cfg`."""
    url = f"http://127.0.0.1:{cfg.port}"

    def is_up() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=20)
    return while_running(lambda: generation.run(cfg), is_up, lambda: talk(client))


def test_the_server_answers_as_its_config_says_until_it_is_told_to_stop(archives: Archives, alone: None) -> None:
    with opened(archives.policy) as plain:
        tokenizer, bos = plain.tokenizer, plain.tokenizer.bos_id
        drawn = {text: plain.likeliest([bos, *tokenizer.encode(text)], 6) for text in TEXTS}
        chat = tokenizer.decode(plain.likeliest([bos, *tokenizer.encode("u:hi;")], 6))
    # a response with a letter that its tokens before do not have: there it is made to end
    pieces = {text: [tokenizer.decode([token]) for token in tokens] for text, tokens in drawn.items()}
    prompt, place = next((t, i) for t, row in pieces.items() for i, c in enumerate(row) if i and c.isascii() and c)
    assert pieces[prompt].index(pieces[prompt][place]) == place
    cfg = config(archives, chat_template=TEMPLATE)
    cfg.web_server, cfg.web_port, cfg.username, cfg.password = True, free_port(), "me", "secret"
    cfg.inference.add_BOS, cfg.inference.end_strings = True, [pieces[prompt][place]]

    def talk(client: openai.OpenAI) -> dict[str, Any]:
        page = f"http://127.0.0.1:{cfg.web_port}/"
        greedy: Any = {"model": "policy", "max_tokens": 6, "temperature": 0}
        with pytest.raises(openai.BadRequestError, match=r"maximum context length is 64 tokens; the prompt has 61"):
            client.completions.create(prompt="x" * 60, **greedy)  # with BOS
        with pytest.raises(openai.BadRequestError, match="259 is not a token id, 0 to 258"):
            client.completions.create(prompt=[259], **greedy)
        for add in (True, False):  # NeMo's form says it itself
            body = {"sentences": ["ab"], "tokens_to_generate": 1, "greedy": True, "add_BOS": add}
            answer = httpx.put(f"http://127.0.0.1:{cfg.port}/generate", json=body).json()
            assert answer["token_ids"][0][:-1] == [bos] * add + tokenizer.encode("ab")
        said = client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **greedy)
        return {
            "models": [model.id for model in client.models.list()],
            "ended": client.completions.create(prompt=prompt, **greedy).choices[0],
            "chat": said.choices[0].message.content,
            "page": [httpx.get(page, auth=auth).status_code for auth in (None, ("me", "secret"), ("me", "no"))],
        }

    found = serving(cfg, talk)
    assert found["models"] == ["policy"]
    assert (found["ended"].finish_reason, found["ended"].text) == ("stop", tokenizer.decode(drawn[prompt][:place]))
    assert found["chat"] == chat.partition(pieces[prompt][place])[0]
    assert found["page"] == [401, 200, 401]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", cfg.port)) != 0, "nobody is there any more"


def test_without_a_seed_of_their_own_requests_are_drawn_with_the_servers(
    archives: Archives, alone: None, tmp_path: Path
) -> None:
    cfg = config(archives, model_name="mine")
    cfg.inference.auth_token_file = str(tmp_path / "token")
    (tmp_path / "token").write_text(TOKEN)

    def talk(client: openai.OpenAI) -> list[str]:
        with pytest.raises(openai.BadRequestError, match="the model has no chat template"):
            client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "hi"}])
        asked: Any = {"model": "mine", "prompt": TEXTS[0], "max_tokens": 6}
        with pytest.raises(openai.AuthenticationError, match="bearer token needed"):
            client.with_options(api_key="none").completions.create(**asked)
        return [client.completions.create(seed=seed, **asked).choices[0].text for seed in (None, 41, 42)]

    [unseeded, same, other] = serving(cfg, talk)
    assert unseeded == same != other


def test_more_requests_than_the_config_says_wait_until_others_are_done_or_gone(archives: Archives, alone: None) -> None:
    cfg = config(archives)
    cfg.inference.max_concurrent_requests = 1

    def talk(client: openai.OpenAI) -> None:
        asked: Any = {"model": "policy", "prompt": TEXTS[0]}
        for _ in range(3):
            with client.completions.create(**asked, max_tokens=50, stream=True, n=8) as stream:
                next(iter(stream))
                with pytest.raises(openai.RateLimitError, match="more than 1 requests at once; send it again") as full:
                    client.completions.create(**asked, max_tokens=1)
                assert full.value.code == "rate_limit_exceeded"
                assert full.value.response.headers["Retry-After"] == "1"
            # it waits as long as the server says, and the place of who went away is free by then
            assert client.with_options(max_retries=2).completions.create(**asked, max_tokens=1).choices
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.01).completions.create(**asked, max_tokens=50, n=512)
        assert client.with_options(max_retries=3).completions.create(**asked, max_tokens=1).choices

    serving(cfg, talk)


def reward_config(archives: Archives) -> ServerConfig:
    cfg = ServerConfig(rm_model_file=str(archives.judge))
    cfg.trainer.accelerator, cfg.trainer.precision, cfg.inference.port = "cpu", "32", free_port()
    cfg.inference.inference_micro_batch_size = 2
    return cfg


@pytest.mark.parametrize("standardised", [False, True])
def test_the_reward_server_answers_with_its_models_rewards_until_it_is_told_to_stop(
    archives: Archives, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, standardised: bool
) -> None:
    tritons, beat = FakeTriton.put_in_place(monkeypatch), threading.Event()
    monkeypatch.setattr(rewards, "_HEARTBEAT_S", 0.0)
    monkeypatch.setattr(rewards.SharedScorer, "beat", lambda scorer: beat.set())
    cfg = reward_config(archives)
    cfg.model.reward_standardization.enable, cfg.inference.max_text_bytes = standardised, 100
    texts = ["good film", "bad", "so", "x" * 64, "x" * 101]

    def talk() -> dict[str, np.ndarray]:
        assert beat.wait(10), "the ranks that follow are told that there is nothing to do"
        [answer] = tritons[0].ask({"sentences": np.array([[text.encode()] for text in texts], dtype=object)})
        return answer

    found = while_running(lambda: rewards.run(cfg), lambda: bool(tritons and tritons[0].runs), talk)
    with opened(archives.judge) as plain:
        eos = plain.tokenizer.eos_id
        rows = [[*plain.tokenizer.encode(text)[:63], eos] for text in texts[:4]]
        expected = [plain.reward(row).item() for row in rows]
    if standardised:
        expected = [(reward - MEAN) / STD for reward in expected]
    assert found["rewards"][:4, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert found["exceeded"][:, 0].tolist() == [0, 0, 0, 1, -1]
    assert b"101 bytes" in found["error"][4, 0]
    assert (tritons[0].runs, tritons[0].stopped) == (False, 1)
    own = {"key": "rm_model_file", "sizes": Sizes(prefix="model.")}
    assert started == [{"devices": 1, "path": str(archives.judge), **own}]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.tensor_model_parallel_size", 2, "model.tensor_model_parallel_size: 2 does not divide"),
        ("model.pipeline_model_parallel_size", 2, "model.pipeline_model_parallel_size: 2 does not divide"),
        ("rm_model_file", "/no.nemo", "rm_model_file=/no.nemo: no such file"),
        ("rm_model_file", "POLICY", "rm_model_file=POLICY is a language model, not a reward model"),
    ],
)
def test_what_is_wrong_with_a_reward_server_is_said_before_it_starts(
    archives: Archives, never_starts: None, key: str, value: Any, says: str
) -> None:
    cfg = reward_config(archives)
    check_refused(rewards.run, cfg, key, value, says, POLICY=str(archives.policy))


def test_a_reward_model_that_was_replaced_meanwhile_is_refused_by_its_key_too(
    archives: Archives, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "check_is_reward_model", lambda *args: None)
    cfg = reward_config(archives)
    cfg.rm_model_file = str(archives.policy)
    with pytest.raises(CheckpointError, match=r"^rm_model_file=.* is a language model"):
        rewards.run(cfg)
