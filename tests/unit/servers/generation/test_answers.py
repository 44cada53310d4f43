"""What clients are answered: every token by its own text, every figure at its place."""

from __future__ import annotations

import itertools

import pytest

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.data.token_texts import added_text
from nemo_aligner.engine.interfaces import GenerationRequest, Progress, PromptScores, Response
from nemo_aligner.servers.generation.answers import (
    Head,
    Scored,
    chat_logprobs,
    completion_logprobs,
    nemo_answer,
    scored,
    token_text,
    usage,
    with_prompt,
)
from nemo_aligner.servers.generation.streaming import StreamedChoice
from tests.fakes import EOS
from tests.vocabularies import vocabulary


class Words:
    """Tokens 1 and 4 are one text, 2 is another, EOS has none; the vocabulary writes a space before a word as ▁."""

    texts = {1: " an", 2: "é", 3: "", 4: " an"}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        return [2]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts.get(token, "") for token in ids)

    def piece(self, token: int) -> str:
        return {EOS: "<eos>", 3: "<0xE2>"}.get(token) or f"▁{token}"


WORDS = Words()


def response(tokens: list[int], text: str, logprobs: list[float], scores: PromptScores | None = None) -> Response:
    return Response(0, 0, tokens, text, logprobs, logprobs, "stop", prompt_scores=scores)


def test_a_token_is_named_by_its_text_and_one_without_as_the_vocabulary_has_it() -> None:
    assert [token_text(WORDS, token) for token in (1, 2, 3, EOS)] == [" an", "é", "<0xE2>", "<eos>"]  # type: ignore[arg-type]


def test_an_answer_has_its_kind_model_choices_and_the_usage_where_it_is_given() -> None:
    head = Head("text_completion", "tiny", "cmpl-1", 7)
    own = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "tiny", "choices": [{"index": 0}]}
    assert head.with_choices(iter([{"index": 0}])) == own
    assert head.with_choices([{"index": 0}], {"total_tokens": 3}) == {**own, "usage": {"total_tokens": 3}}
    assert Head("k", "m").id != Head("k", "m").id
    assert Head("k", "m").id.startswith("cmpl-")


def test_usage_counts_the_tokens_of_all_prompts_and_responses() -> None:
    found = usage(iter([[1, 2], [3]]), iter([[4], [5, 6, 7]]))
    assert found == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_what_is_scored_is_each_token_with_its_own_value() -> None:
    top = [[(1, -0.5)], [(2, -0.25)]]
    drawn = scored(Progress(3, [1, 2], [-0.5, -1.0], top), [5])
    assert drawn == Scored([1, 2], [-0.5, -1.0], top, [5])
    assert drawn.after(1) == Scored([2], [-1.0], top[1:], [5, 1])
    plain = response([1, 2], "x", [-0.5, -1.0])
    assert scored(plain, []) == Scored([1, 2], [-0.5, -1.0], [None, None], [])
    assert with_prompt([7, 8], plain) == scored(plain, [7, 8])
    with_scores = response([1, 2], "x", [-0.5, -1.0], PromptScores([-2.0], [[(1, -2.0)]]))
    assert with_prompt([7, 8], with_scores) == Scored(
        [7, 8, 1, 2], [None, -2.0, -0.5, -1.0], [None, [(1, -2.0)], None, None]
    )


def test_log_probabilities_of_a_completion_say_where_in_the_text_each_token_begins() -> None:
    top = [None, [(2, -0.1), (1, -3.0)], [(4, -0.2), (1, -0.9)]]
    found = completion_logprobs(WORDS, Scored([1, 2, EOS], [None, -0.1, -4.0], top), 10)  # type: ignore[arg-type]
    assert found == {
        "tokens": [" an", "é", "<eos>"],
        "token_logprobs": [None, -0.1, -4.0],
        # of two tokens with one text the likelier
        "top_logprobs": [None, {"é": -0.1, " an": -3.0}, {" an": -0.2}],
        "text_offset": [10, 13, 14],
    }
    assert completion_logprobs(WORDS, Scored([1], [-1.0], [None]))["text_offset"] == [0]  # type: ignore[arg-type]
    assert completion_logprobs(WORDS, Scored([], [], []), 4)["text_offset"] == []  # type: ignore[arg-type]


TEXT = "the film was good 日本語 and  thin\n x"
KINDS = ["sentencepiece", "metaspace", "llama3", "bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_completion_are_where_they_are_said_to_be_and_make_up_its_text(kind: str) -> None:
    tokenizer = vocabulary(kind)
    ids = tokenizer.encode(TEXT)
    starts = [at for at in range(len(ids)) if not tokenizer.decode(ids[:at]).endswith("\ufffd")]
    for start in starts:
        text = added_text(tokenizer, ids[:start], ids[start:])
        nothing = [None] * (len(ids) - start)
        found = completion_logprobs(tokenizer, Scored(ids[start:], nothing, nothing, ids[:start]), 5)
        whole = [
            (at - 5, token)
            for at, token in zip(found["text_offset"], found["tokens"], strict=True)
            if not token.startswith("bytes:")
        ]
        assert [text[at : at + len(token)] for at, token in whole] == [token for _, token in whole]
        if len(whole) == len(ids) - start:
            assert "".join(token for _, token in whole) == text
    assert kind in ("bytes", "llama3") or len(whole) == len(ids) - start, "no character is in parts"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_its_tokens_where_the_whole_answer_has_them(kind: str) -> None:
    tokenizer = vocabulary(kind)
    prompt, ids = tokenizer.encode("it"), tokenizer.encode("it" + TEXT)[1:]
    sampling = SamplingParams(end_strings=("good night", "\n\n"))  # what may begin them is held back
    choice = StreamedChoice(0, tokenizer, GenerationRequest(0, 0, tuple(prompt), sampling=sampling, uid=1))
    drawn = [Progress(1, ids[: n + 1], [-1.0] * (n + 1), []) for n in range(len(ids) - 1)]
    last = response(ids, added_text(tokenizer, prompt, ids), [-1.0] * len(ids))
    pieces = [piece for piece in map(choice.piece, [*drawn, last]) if piece is not None]
    assert "".join(text for _, text, *_ in pieces) == last.text
    found = [completion_logprobs(tokenizer, new, begins) for _, _, new, _, begins in pieces]
    whole = completion_logprobs(tokenizer, scored(last, prompt))
    for name in ("tokens", "text_offset"):
        assert [one for piece in found for one in piece[name]] == whole[name]


def test_two_tokens_that_differ_in_their_blank_are_two_of_the_likeliest() -> None:
    tokenizer = vocabulary("sentencepiece")
    [blank], [none] = ([i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == piece] for piece in ("▁x", "x"))
    found = completion_logprobs(
        tokenizer, Scored([none], [-0.5], [[(none, -0.5), (blank, -1.0)]], tokenizer.encode("the"))
    )
    assert found["top_logprobs"] == [{"x": -0.5, " x": -1.0}]
    assert found["tokens"] == ["x"]


def test_parts_of_a_character_are_told_by_their_bytes_and_each_by_its_own() -> None:
    tokenizer = vocabulary("llama3")
    parts = tokenizer.encode("🎬")
    assert len(parts) > 1
    nothing = [None] * len(parts)
    top = [[(token, -1.0 - token) for token in parts], *nothing[1:]]
    found = completion_logprobs(tokenizer, Scored(parts, nothing, top, tokenizer.encode("x")))
    assert found["tokens"] == [f"bytes:\\x{byte:02x}" for byte in "🎬".encode()]
    assert found["text_offset"] == [0] * len(parts)
    assert list(found["top_logprobs"][0]) == sorted(set(found["tokens"]), key=found["tokens"].index, reverse=True)
    chat = chat_logprobs(tokenizer, Scored(parts, nothing, nothing))["content"]
    assert bytes(itertools.chain(*(entry["bytes"] for entry in chat))) == "🎬".encode()


def test_log_probabilities_of_a_chat_have_the_bytes_of_every_token() -> None:
    found = chat_logprobs(WORDS, Scored([2, 1], [-0.1, -0.5], [[(2, -0.1), (1, -3.0)], None]))  # type: ignore[arg-type]
    an, e = {"token": " an", "bytes": [32, 97, 110]}, {"token": "é", "bytes": [0xC3, 0xA9]}
    assert found == {
        "content": [
            {**e, "logprob": -0.1, "top_logprobs": [{**e, "logprob": -0.1}, {**an, "logprob": -3.0}]},
            {**an, "logprob": -0.5, "top_logprobs": []},
        ]
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_the_tokens_of_a_chat_together_are_its_text(kind: str) -> None:
    tokenizer = vocabulary(kind)
    before, special = tokenizer.encode("the"), tokenizer.eos_id
    tokens = [*tokenizer.encode(" film"), special, *tokenizer.encode(" 日 é"), special]
    nothing = [None] * len(tokens)
    found = chat_logprobs(tokenizer, Scored(tokens, nothing, nothing, before))["content"]
    assert bytes(itertools.chain(*(entry["bytes"] for entry in found))).decode() == added_text(
        tokenizer, before, tokens
    )
    assert found[-1]["token"] == tokenizer.piece(special)


def test_nemos_answer_goes_over_prompt_and_response_of_each_sentence() -> None:
    prompts = [(" an", [1]), ("é an", [2, 4])]
    drawn = [response([2], "é", [-0.1], PromptScores([], [])), response([1, EOS], " an", [-1.0, -2.0])]
    found = nemo_answer(WORDS, prompts, drawn, True)  # type: ignore[arg-type]
    assert found == {
        "sentences": [" ané", "é an an"],
        "tokens": [["▁1", "▁2"], ["▁2", "▁4", "▁1", "<eos>"]],
        "logprob": [[-0.1], [-1.0, -2.0]],
        "token_ids": [[1, 2], [2, 4, 1, EOS]],
        "offsets": [[0, 3], [0, 1, 4, 7]],
    }
    assert nemo_answer(WORDS, prompts, drawn, False)["logprob"] is None  # type: ignore[arg-type]
    with_scores = [drawn[0], response([1], " an", [-1.0], PromptScores([-7.0], [[]]))]
    assert nemo_answer(WORDS, prompts, with_scores, True)["logprob"][1] == [-7.0, -1.0]  # type: ignore[arg-type]
