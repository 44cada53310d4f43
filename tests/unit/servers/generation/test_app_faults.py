"""What clients of the generation server are told of a fault of its own, and that those after it notice nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.servers.generation import answers
from nemo_aligner.servers.generation.clerk import Clerk
from nemo_aligner.servers.generation.streaming import StreamedChoice
from tests.fakes import ByteTokenizer
from tests.unit.servers.generation.test_app import Shop, shop, unfinished, wait_until

__all__ = ["shop"]  # a fixture

POISON = [98, 255]
TOLD = {
    "message": "the server failed; its log says why",
    "type": "server_error",
    "param": None,
    "code": None,
}


def drawn(shop: Shop) -> list[str]:
    asked: dict[str, Any] = {"prompt": ["A film", "x"], "max_tokens": 12, "seed": 3, "n": 2}
    return [choice.text for choice in shop.client.completions.create(model="tiny", **asked).choices]


def test_a_request_that_fails_is_answered_and_no_other_is_disturbed(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = drawn(shop), CachedForward.prefill

    def prefill(self: CachedForward, prompts: Sequence[Sequence[int]], scored: int | None = None) -> Any:
        if tuple(POISON) in prompts:
            raise RuntimeError("/home/somebody/secret.py")
        return plain(self, prompts, scored)

    monkeypatch.setattr(CachedForward, "prefill", prefill)
    for prompt in (POISON, [[120], POISON]):
        answer = shop.http.post("/v1/completions", json={"prompt": prompt, "n": 2, "max_tokens": 40})
        assert (answer.status_code, answer.json()) == (500, {"error": TOLD})
    with pytest.raises(openai.InternalServerError):
        shop.client.completions.create(model="tiny", prompt=POISON)
    wait_until(lambda: unfinished(shop) == 0)
    assert drawn(shop) == before


def test_a_fault_amidst_a_stream_ends_it_with_an_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain, steps = drawn(shop), CachedForward.step, 0

    def step(self: CachedForward, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise RuntimeError("no memory")
        return plain(self, *arguments)

    pieces: list[str] = []

    def listen() -> None:
        asked: dict[str, Any] = {"prompt": "A film", "max_tokens": 40, "extra_body": {"min_tokens": 40}}
        for piece in shop.client.completions.create(model="tiny", stream=True, **asked):
            pieces.extend(choice.text for choice in piece.choices)

    with monkeypatch.context() as patched:
        patched.setattr(CachedForward, "step", step)
        with pytest.raises(openai.APIError, match=str(TOLD["message"])) as told:
            listen()
    assert told.value.body == TOLD
    assert "".join(pieces)
    assert unfinished(shop) == 0
    assert drawn(shop) == before


def test_a_fault_outside_of_drawing_has_the_same_form(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise KeyError("secret")

    before = drawn(shop)
    with monkeypatch.context() as patched:
        patched.setattr(StreamedChoice, "piece", fails)
        with pytest.raises(openai.APIError) as told:
            list(shop.client.completions.create(model="tiny", prompt="x", max_tokens=40, stream=True))
        assert told.value.body == TOLD
        patched.setattr(Clerk, "model", fails)
        answer: httpx.Response = shop.http.get("/v1/models")
        assert (answer.status_code, answer.json()) == (500, {"error": TOLD})
    wait_until(lambda: unfinished(shop) == 0)
    assert drawn(shop) == before


@pytest.mark.parametrize("slow", ["completion_logprobs", "encode"])
def test_what_takes_long_for_one_keeps_nobody_else_waiting(
    shop: Shop, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, began = (answers if slow == "completion_logprobs" else ByteTokenizer), threading.Event()
    plain = getattr(of, slow)

    def slowly(*arguments: Any) -> Any:
        began.set()
        time.sleep(1.5)
        return plain(*arguments)

    monkeypatch.setattr(of, slow, slowly)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(shop.client.completions.create, model="tiny", prompt="x", max_tokens=2, logprobs=1)
        assert began.wait(20)
        begin = time.monotonic()
        assert shop.http.get("/health").status_code == 200
        assert time.monotonic() - begin < 1
        assert not asked.done()
        assert asked.result().choices
