"""What a body asks for is what is drawn: every setting under its own name, with OpenAI's and NeMo's defaults."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.servers.generation.requests import MOST_RESPONSES, ChatBody, CompletionBody, GenerateBody

MESSAGES = [{"role": "user", "content": "x"}]


def completion(**body: Any) -> CompletionBody:
    return CompletionBody(**{"prompt": "x", **body})


def test_openais_settings_reach_the_engine_each_under_its_name() -> None:
    body = completion(temperature=0.5, top_k=7, top_p=0.8, repetition_penalty=1.2, min_tokens=3, seed=0, stop="a")
    found = body.sampling(seed=9, end_strings=("s",), max_tokens=11, top_logprobs=4)
    assert found == SamplingParams(
        temperature=0.5, top_k=7, top_p=0.8, repetition_penalty=1.2, min_tokens=3, max_tokens=11,
        end_strings=("s", "a"), seed=0, top_logprobs=4,
    )  # fmt: skip


def test_openais_defaults_draw_from_the_model_itself_and_temperature_0_is_the_likeliest() -> None:
    plain = completion().sampling(seed=9, end_strings=(), max_tokens=1, top_logprobs=0)
    assert plain == SamplingParams(max_tokens=1, seed=9)
    assert not plain.changes_distribution
    greedy = completion(temperature=0, stop=["a", "b"]).sampling(seed=9, end_strings=(), max_tokens=1, top_logprobs=0)
    assert greedy == SamplingParams(greedy=True, temperature=1.0, max_tokens=1, seed=9, end_strings=("a", "b"))


def test_a_top_p_of_0_is_openais_smallest_nucleus_and_nemos_off() -> None:
    params = completion(top_p=0, temperature=0.7).sampling(seed=9, end_strings=(), max_tokens=1, top_logprobs=0)
    assert params.greedy
    assert not GenerateBody(sentences=["x"], top_p=0).sampling(seed=9).filters


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"temperature": 0.9e-5}, {"top_p": 0}])
def test_a_penalty_that_would_do_nothing_is_refused(greedy: dict[str, float]) -> None:
    for made in (completion, lambda **body: ChatBody(messages=MESSAGES, **body)):
        with pytest.raises(ValidationError, match="repetition_penalty is not used where temperature or top_p is 0"):
            made(repetition_penalty=1.2, **greedy)
        made(repetition_penalty=1, **greedy)
        made(repetition_penalty=1.2, temperature=0.01)


@pytest.mark.parametrize(("form", "needed"), [(CompletionBody, {"prompt": "x"}), (ChatBody, {"messages": MESSAGES})])
def test_null_is_a_field_left_out(form: type[CompletionBody | ChatBody], needed: dict[str, Any]) -> None:
    nulls = dict.fromkeys(form.model_fields)
    found = form.model_validate({**nulls, **needed})
    assert found == form.model_validate(needed)
    assert found.model_fields_set == set(needed)
    for wrong in (nulls, {**needed, "max_token": None}):
        with pytest.raises(ValidationError):
            form.model_validate(wrong)


def test_nemos_settings_reach_the_engine_each_under_its_name() -> None:
    body = GenerateBody(
        sentences=["x"], tokens_to_generate=5, temperature=0.5, top_k=7, top_p=0.8, greedy=True,
        repetition_penalty=1.2, min_tokens_to_generate=2, end_strings=["a"], random_seed=0,
    )  # fmt: skip
    assert body.sampling(seed=9) == SamplingParams(
        greedy=True, temperature=0.5, top_k=7, top_p=0.8, repetition_penalty=1.2, min_tokens=2, max_tokens=5,
        end_strings=("a",), seed=0,
    )  # fmt: skip
    assert GenerateBody(sentences=["x"]).sampling(seed=9).seed == 9


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_is_one_or_several_texts_or_rows_of_ids(prompt: Any, found: list[Any]) -> None:
    assert completion(prompt=prompt).prompts() == found


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [[1], "a"], [True], [[1], []], 3, None, {"a": 1}, [1.5]])
def test_nothing_else_is_a_prompt(prompt: Any) -> None:
    with pytest.raises(ValidationError, match="neither a text nor a list"):
        completion(prompt=prompt)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"echo": True, "stream": True, "logprobs": 0}, "echo with logprobs cannot be streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for stream=true only"),
    ],
)
def test_what_does_not_go_together_is_refused(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        completion(**body)
    for fine in (
        {"max_tokens": 0, "echo": True},
        {"echo": True, "stream": True},
        {"echo": True, "logprobs": 0},
        {"stream": True, "logprobs": 0, "stream_options": {}},
    ):
        completion(**fine)


@pytest.mark.parametrize("half", ["\ud800", "end \udfff"])
def test_a_text_that_ends_a_response_and_that_no_tokenizer_takes_is_refused(half: str) -> None:
    for stop in (half, ["a", half]):
        with pytest.raises(ValidationError, match="one half of a character"):
            completion(stop=stop)
    with pytest.raises(ValidationError, match="one half of a character"):
        GenerateBody(sentences=["x"], end_strings=[half])
    assert completion(stop=["a", "\U0001f600"]).stop == ["a", "\U0001f600"]


@pytest.mark.parametrize("penalty", [0, 1e-300, 1e-39, 0.009, 101, 1e39, float("inf"), float("nan")])
def test_a_penalty_that_turns_logits_into_no_numbers_is_refused(penalty: float) -> None:
    for made in (completion, lambda **body: GenerateBody(sentences=["x"], **body)):
        with pytest.raises(ValidationError, match=r"repetition_penalty\n.*0\.01|repetition_penalty\n.*100"):
            made(repetition_penalty=penalty)
        for fine in (0.01, 1, 1.2, 100):
            assert made(repetition_penalty=fine).repetition_penalty == fine


def test_a_request_asks_for_no_more_responses_than_the_server_keeps_for_one() -> None:
    assert completion(prompt=["x", "y"], n=1024).n * 2 == MOST_RESPONSES
    GenerateBody(sentences=["x"] * MOST_RESPONSES)
    says = rf"3072 responses \(3 prompts, n=1024\) are more than one request may ask for, {MOST_RESPONSES}"
    for prompts in (["x"] * 3, [[1]] * 3):
        with pytest.raises(ValidationError, match=says):
            completion(prompt=prompts, n=1024)
    with pytest.raises(ValidationError, match=f"{MOST_RESPONSES + 1} responses"):
        GenerateBody(sentences=["x"] * (MOST_RESPONSES + 1))


@pytest.mark.parametrize(
    ("ends", "says"),
    [(["x"] * 17, "17 texts, at most 16 can end"), (["a", "x" * 257], "has 257 characters, at most 256")],
)
def test_texts_that_end_a_response_are_few_and_short(ends: list[str], says: str) -> None:
    for made in (lambda stop: completion(stop=stop), lambda ends: GenerateBody(sentences=["x"], end_strings=ends)):
        with pytest.raises(ValidationError, match=says):
            made(ends)
        made(["x" * 256] * 16)
    with pytest.raises(ValidationError, match="has 257 characters"):
        completion(stop="x" * 257)


def test_a_chats_length_has_two_names_and_its_likeliest_tokens_need_log_probabilities() -> None:
    def limit(**body: Any) -> int | None:
        return ChatBody(messages=MESSAGES, **body).limit

    assert limit() is None
    assert limit(max_tokens=3) == limit(max_completion_tokens=3) == limit(max_tokens=3, max_completion_tokens=3) == 3
    with pytest.raises(ValidationError, match="two names of one thing"):
        limit(max_tokens=3, max_completion_tokens=4)
    with pytest.raises(ValidationError, match="top_logprobs is for logprobs=true only"):
        limit(top_logprobs=1)
    limit(top_logprobs=1, logprobs=True)


def test_the_parts_of_a_message_are_one_text_and_a_name_goes_along() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatBody(messages=[{"role": "user", "content": parts, "name": "n"}, *MESSAGES])
    assert [message.plain() for message in body.messages] == [{"role": "user", "content": "ab", "name": "n"}, *MESSAGES]
