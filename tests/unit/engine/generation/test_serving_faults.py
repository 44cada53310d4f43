"""What fails costs those alone whom it concerns: the others get what they would have got without it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import CachedPrompt
from nemo_aligner.engine.generation.serving import Server
from nemo_aligner.engine.interfaces import GenerationRequest, Orders, Response
from nemo_aligner.errors import ServerError
from tests.fakes import ByteTokenizer
from tests.unit.engine.generation.test_serving import REQUESTS, Script, alone, cluster, model, same, serve

__all__ = ["cluster", "model"]  # fixtures

POISON = tuple(b"bad\xff")
ENDLESS = SamplingParams(max_tokens=30, min_tokens=30, seed=8)


def undisturbed(
    model: torch.nn.Module, desk: Script, lost: Sequence[int], requests: Sequence[GenerationRequest]
) -> None:
    """`lost` alone have no response, and nobody two; the others have what they have alone."""
    assert sorted(desk.lost) == sorted(lost)
    found = {response.uid: response for response in desk.responses}
    assert len(found) == len(desk.responses)
    assert found.keys() == {request.uid for request in requests} - set(lost)
    for request in requests:
        if request.uid in found:
            same(found[request.uid], alone(model, request))


def failing(monkeypatch: pytest.MonkeyPatch, name: str, fails: Callable[..., bool]) -> None:
    """Let CachedForward's `name` raise where `fails` says so of its arguments."""
    plain: Callable[..., Any] = getattr(CachedForward, name)

    def maybe(self: CachedForward, *arguments: Any) -> Any:
        if fails(*arguments):
            raise RuntimeError("out of\nmemory")
        return plain(self, *arguments)

    monkeypatch.setattr(CachedForward, name, maybe)


@pytest.mark.parametrize("slots", [2, 32])
def test_a_response_that_cannot_be_told_fails_alone(
    model: torch.nn.Module, slots: int, caplog: pytest.LogCaptureFixture
) -> None:
    responses = [alone(model, request) for request in REQUESTS]
    broken, lost = responses[2].tokens, [r.uid for r in responses if r.tokens == responses[2].tokens]

    class Breaks(ByteTokenizer):
        def decode(self, ids: Sequence[int]) -> str:
            if bytes(i for i in broken if i < 256) in bytes(i for i in ids if i < 256):
                raise ValueError("no such piece")
            return super().decode(ids)

    desk = serve(model, slots, [Orders(REQUESTS)], len(REQUESTS), Breaks())
    undisturbed(model, desk, lost, REQUESTS)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * len(lost)


def test_a_token_that_cannot_be_looked_at_fails_those_who_drew_it(model: torch.nn.Module) -> None:
    requests = [replace(r, sampling=replace(r.sampling, end_strings=("zz",), min_tokens=0)) for r in REQUESTS]  # type: ignore[type-var]
    drawn = [alone(model, request) for request in requests]
    token = next(t for t in drawn[0].tokens if 32 < t < 127)

    class Breaks(ByteTokenizer):
        def decode(self, ids: Sequence[int]) -> str:
            if list(ids) == [token]:
                raise ValueError("no such piece")
            return super().decode(ids)

    lost = [response.uid for response in drawn if token in response.tokens]
    assert 0 < len(lost) < len(requests)
    undisturbed(model, serve(model, 32, [Orders(requests)], len(requests), Breaks()), lost, requests)


def test_an_end_string_that_no_tokenizer_takes_fails_who_asked_for_it(model: torch.nn.Module) -> None:
    class Breaks(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            if text == "poison":
                raise ValueError("no such text")
            return super().encode(text)

    poisoned = replace(REQUESTS[0], uid=99, sampling=replace(ENDLESS, end_strings=("poison",)))
    requests = [*REQUESTS[:3], poisoned, *REQUESTS[3:]]
    undisturbed(model, serve(model, 4, [Orders(requests)], len(requests), Breaks()), [99], requests)


def test_a_prompt_that_cannot_be_prefilled_takes_none_of_its_batch_along(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poisoned = [GenerationRequest(7, s, POISON, sampling=ENDLESS, uid=90 + s) for s in range(2)]
    requests = [*REQUESTS[:5], *poisoned, *REQUESTS[5:]]
    with monkeypatch.context() as patched:
        failing(patched, "prefill", lambda prompts, scored=None: POISON in prompts)
        desk = serve(model, 32, [Orders(requests[:2]), Orders(requests[2:])], len(requests))
    undisturbed(model, desk, [90, 91], requests)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("slots", [3, 32])
def test_a_step_that_fails_costs_those_in_it_and_nobody_who_comes_after(
    model: torch.nn.Module, slots: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = [GenerationRequest(0, s, tuple(b"It"), sampling=ENDLESS, uid=90 + s) for s in range(3)]
    steps = 0

    def fails(tokens: Tensor, positions: Tensor, cache: object) -> bool:
        nonlocal steps
        steps += 1
        return steps == 4

    with monkeypatch.context() as patched:
        failing(patched, "step", fails)
        turns = [Orders(held), *[Orders()] * 2, Orders(REQUESTS[:6] if slots == 3 else []), *[Orders()] * 3]
        later = REQUESTS if slots == 32 else REQUESTS[6:]
        desk = serve(model, slots, [*turns, Orders(later)], len(held) + len(REQUESTS))
    undisturbed(model, desk, [90, 91, 92], [*held, *REQUESTS])
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None


def test_a_fault_where_a_prompt_joins_costs_those_who_join_and_who_are_drawn(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = GenerationRequest(0, 0, tuple(b"It"), sampling=ENDLESS, uid=90)
    joining = GenerationRequest(7, 0, POISON, sampling=ENDLESS, uid=91)
    plain = Server._take_slot

    def take_slot(self: Server, request: GenerationRequest, prompt: CachedPrompt) -> int:
        slot = plain(self, request, prompt)
        if request.uid == joining.uid:
            raise RuntimeError("no memory")
        return slot

    with monkeypatch.context() as patched:
        patched.setattr(Server, "_take_slot", take_slot)
        desk = serve(model, 8, [Orders([held]), Orders([joining]), Orders(REQUESTS)], 2 + len(REQUESTS))
    undisturbed(model, desk, [90, 91], [held, joining, *REQUESTS])


def test_where_nothing_can_be_drawn_any_more_the_server_ends_in_one_line(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "step", lambda *arguments: True)
    with pytest.raises(ServerError, match=r"^the model can draw no more: RuntimeError: out of memory$"):
        serve(model, 8, [Orders(REQUESTS)], len(REQUESTS))


@pytest.mark.parametrize("name", ["step", "prefill"])
def test_of_several_processes_a_step_that_fails_ends_all(
    model: torch.nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, name, lambda *arguments: True)
    with pytest.raises(ServerError, match=r"^the model can draw no more: RuntimeError: out of memory$"):
        serve(model, 8, [Orders(REQUESTS)], len(REQUESTS), alone=False)


def test_a_dropped_request_that_has_failed_already_is_passed_over(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = GenerationRequest(7, 0, POISON, sampling=ENDLESS, uid=90)
    with monkeypatch.context() as patched:
        failing(patched, "prefill", lambda prompts, scored=None: POISON in prompts)
        desk = serve(model, 8, [Orders([poisoned, *REQUESTS]), Orders(dropped=[90])], 1 + len(REQUESTS))
    undisturbed(model, desk, [90], [poisoned, *REQUESTS])
    assert all(isinstance(response, Response) for response in desk.responses)
