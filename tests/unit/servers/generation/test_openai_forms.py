"""What OpenAI's clients, and others that speak HTTP, may send besides the plain form."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.servers.generation.test_app import Shop, shop

__all__ = ["shop"]  # a fixture

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("logit_bias", {"5": 1}),
        ("logit_bias", [1]),
        ("presence_penalty", 0.5),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("service_tier", "flex"),
    ],
)
def test_what_is_not_offered_is_refused_as_that(shop: Shop, field: str, value: Any) -> None:
    answer = shop.http.post("/v1/chat/completions", json={**ASKED, field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["message"], error["param"]) == (f"{field}: not offered by this server; leave it out", field)


def test_what_changes_nothing_is_taken(shop: Shop) -> None:
    plain = shop.client.chat.completions.create(**ASKED).choices[0].message.content
    nothing: list[dict[str, Any]] = [
        {
            "tools": [],
            "tool_choice": "none",
            "logit_bias": {},
            "presence_penalty": 0,
            "response_format": {"type": "text"},
        },
        {"safety_identifier": "a", "prompt_cache_key": "b", "user": "c", "modalities": ["text"], "store": False},
        {"stream": False, "stop": [], "service_tier": "auto", "metadata": {}},
    ]
    for more in nothing:
        assert shop.client.chat.completions.create(**ASKED, **more).choices[0].message.content == plain
    options = {"include_usage": True, "include_obfuscation": False}
    pieces = shop.client.chat.completions.create(**ASKED, stream=True, stream_options=options)
    assert "".join(c.delta.content or "" for piece in pieces for c in piece.choices) == plain


def test_an_answer_may_come_back_as_it_was_given(shop: Shop) -> None:
    said = shop.client.chat.completions.create(**ASKED).choices[0].message
    more = {"role": "user", "content": "go on"}
    answers = [
        shop.client.chat.completions.create(**{**ASKED, "messages": [*ASKED["messages"], turn, more]})
        for turn in (said, said.model_dump(), {"role": "assistant", "content": said.content})
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    refused = {**said.model_dump(), "tool_calls": [{"id": "1"}]}
    told = shop.http.post("/v1/chat/completions", json={**ASKED, "messages": [refused]})
    assert "messages.0.tool_calls" in told.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "messages.0.content: neither a text nor a list"),
        (None, "messages.0.content: neither a text nor a list"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "messages.0.content.0.type: Input should be 'text'"),
        ([{"type": "text", "text": 3}], "messages.0.content.0.text: Input should be a valid string"),
    ],
)
def test_of_a_text_or_a_list_is_told_what_is_wrong_with_that_which_came(shop: Shop, value: Any, message: str) -> None:
    asked = {**ASKED, "messages": [{"role": "user", "content": value}]}
    assert shop.http.post("/v1/chat/completions", json=asked).json()["error"]["message"] == message


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"prompt": "\xe9"}', b'{"seed": ' + b"9" * 10_000 + b"}"])
def test_a_body_that_no_reader_of_json_takes_is_called_that(shop: Shop, body: bytes) -> None:
    answer = shop.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not valid JSON: ")


def test_what_may_be_read_may_be_asked_about_and_other_methods_are_named(shop: Shop) -> None:
    for path in ("/", "/health", "/v1/models", "/v1/models/tiny"):
        asked = shop.http.head(path)
        assert (asked.status_code, asked.content) == (200, b"")
        assert asked.headers["Content-Length"] == shop.http.get(path).headers["Content-Length"]
    for method in ("OPTIONS", "GET", "HEAD"):
        refused = shop.http.request(method, "/v1/completions")
        assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")


def test_where_a_prompt_ends_inside_a_character_a_stream_has_the_places_of_the_whole(shop: Shop) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": [0xE6, 0x97], "max_tokens": 20, "logprobs": 0}
    for seed in range(6):
        [choice] = shop.client.completions.create(**asked, seed=seed).choices
        places: list[int] = []
        for piece in shop.client.completions.create(**asked, seed=seed, stream=True):
            places += (piece.choices[0].logprobs and piece.choices[0].logprobs.text_offset) or []
        assert choice.logprobs is not None
        assert places == choice.logprobs.text_offset
