"""Where a response ends, with a tokenizer of one token per byte and three special ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_aligner.data.token_texts import added_text, continuation
from nemo_aligner.engine.checkpoints.tokenizer import ArchiveTokenizer, SentencePieceTokenizer
from nemo_aligner.engine.generation.stopping import StopCondition
from nemo_aligner.engine.generation.text_stream import TextStream
from tests.fakes import END_OF_TURN, EOS, ByteTokenizer
from tests.vocabularies import vocabulary


def drawn_until_stop(text_ids: list[int], end_strings: list[str], min_tokens: int = 0) -> tuple[int, str]:
    """Feed tokens one by one; how many were needed, and the text kept."""
    stop = StopCondition(ByteTokenizer(), end_strings, min_tokens)
    for count in range(1, len(text_ids) + 1):
        if stop.is_stop(text_ids[:count]):
            return count, stop.text_of(text_ids[:count])
    return len(text_ids), stop.text_of(text_ids)


def test_eos_always_stops_and_leaves_no_trace() -> None:
    assert drawn_until_stop([*b"good", EOS, *b"bye"], []) == (5, "good")


def test_endoftext_is_another_name_of_eos_and_not_a_text_to_look_for() -> None:
    assert drawn_until_stop([*b"a<|endoftext|>b"], ["<|endoftext|>"]) == (15, "a<|endoftext|>b")


def test_a_special_token_given_as_end_string_stops() -> None:
    assert drawn_until_stop([*b"hi", END_OF_TURN, *b"x"], ["<turn>"]) == (3, "hi")


@pytest.mark.parametrize("end", ["\n\n", "User:", "é!", "né"])
def test_an_end_string_over_several_tokens_stops_at_its_last_token(end: str) -> None:
    before = "some words "
    ids = [*(before + end + " more").encode()]
    assert drawn_until_stop(ids, [end]) == (len((before + end).encode()), before)


def test_the_earliest_end_string_cuts() -> None:
    assert drawn_until_stop([*b"one STOP two END"], ["END", "STOP"]) == (8, "one ")


def test_nothing_to_stop_at_keeps_all() -> None:
    assert drawn_until_stop([*b"plain"], ["zzz", ""]) == (5, "plain")


def test_endoftext_stops_too_where_it_is_a_special_token_beside_eos() -> None:
    class Chat(ByteTokenizer):
        def encode(self, text):  # type: ignore[no-untyped-def]
            return [END_OF_TURN] if text == "<|endoftext|>" else super().encode(text)

    stop = StopCondition(Chat(), ["<|endoftext|>"])
    assert stop.stop_ids == {EOS, END_OF_TURN}


@pytest.mark.parametrize("ends", [["aab"], ["abaab", "bb"], ["b"], ["aaaa", "", "ba"], []])
def test_what_may_be_the_beginning_of_an_end_string_is_held_back(ends: list[str]) -> None:
    stop = StopCondition(ByteTokenizer(), ends)
    for letters in itertools.chain(*(itertools.product("ab", repeat=n) for n in range(8))):
        text = "".join(letters)
        begun = [n for end in ends for n in range(1, len(end)) if text.endswith(end[:n])]
        assert stop.held_back(text) == max(begun, default=0), text


def test_any_of_several_eos_stops() -> None:
    class Several(ByteTokenizer):
        stop_ids = frozenset({EOS, END_OF_TURN})

    stop = StopCondition(Several(), [])
    assert stop.is_stop([5, END_OF_TURN])
    assert stop.is_stop([5, EOS])
    assert stop.text_of([*b"a", END_OF_TURN]) == "a"


def test_the_text_of_a_response_is_what_it_adds_to_its_prompt(tmp_path: Path) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the film was good and the plot was thin\n" * 50)
    options = {"vocab_size": 40, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(tmp_path / "m"), **options)
    tokenizer = SentencePieceTokenizer((tmp_path / "m.model").read_bytes(), {})
    prompt, response = tokenizer.encode("the film"), tokenizer.encode("was good")
    assert tokenizer.decode([*prompt, *response]) == "the film was good"
    assert tokenizer.decode(response) == "was good"
    assert StopCondition(tokenizer, []).text_of(response, prompt) == " was good"
    assert StopCondition(tokenizer, ["good"]).text_of(response, prompt) == " was "
    stream = TextStream(tokenizer, [], prompt)
    pieces = [stream.more(response[: n + 1]) for n in range(len(response))]
    assert "".join(pieces) + stream.rest(" was good") == " was good"


def test_an_end_string_at_the_very_beginning_leaves_nothing() -> None:
    assert StopCondition(ByteTokenizer(), ["ab"]).text_of(list(b"ab")) == ""


@pytest.mark.parametrize(
    ("min_tokens", "found"),
    [(0, (2, "")), (2, (2, "")), (3, (4, "xb")), (5, (5, "xba")), (6, (8, "xbabbx")), (9, (8, "xbabbxab"))],
)
def test_an_end_string_that_ends_before_the_least_tokens_is_text(min_tokens: int, found: tuple[int, str]) -> None:
    assert drawn_until_stop([*b"xbabbxab"], ["xb", "bb", "ab"], min_tokens) == found


def first_end(
    tokenizer: ArchiveTokenizer, prompt: list[int], response: list[int], ends: Sequence[str], min_tokens: int
) -> tuple[int, str]:
    """By definition: after how many tokens there is an end string behind what the early tokens say, and the text then.

    `response` says whole characters.
    """
    whole = added_text(tokenizer, prompt, response)
    said = [0]  # characters of it that are there after so many tokens
    for count in range(1, len(response) + 1):
        text = added_text(tokenizer, prompt, response[:count])
        said.append(max(said[-1], *(n for n in range(len(whole) + 1) if text.startswith(whole[:n]))))
    least = said[max(0, min(min_tokens - 1, len(response)))]
    for count in range(max(1, min_tokens), len(response) + 1):
        for at in range(said[count]):
            if any(whole.startswith(end, at) and least < at + len(end) <= said[count] for end in ends):
                return count, whole[:at]
    return len(response), whole


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "metaspace", "llama3"])
def test_who_draws_who_cuts_and_who_streams_agree_on_where_a_response_ends(kind: str) -> None:
    tokenizer, draw = vocabulary(kind), random.Random(1)
    for _ in range(300):
        pieces = draw.choice(
            [["the film", " was", " good", "日本", "\n", " ", "a"], ["ж", "ก", "🎬", "é", " was", "a"]]
        )
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        prompt = tokenizer.encode(draw.choice(["the film", "the film ", "日", ""]))
        response = continuation(tokenizer, prompt, text)
        if draw.random() < 0.3:  # with tokens that have no text
            response = [token for own in response for token in [tokenizer.bos_id or 0] * draw.randint(0, 3) + [own]]
        at, least = draw.randrange(len(text)), draw.choice([0, 1, 2, 5, 9])
        ends = text[at : at + draw.randint(1, 4)], draw.choice([" was", "d ", "é", "ก", " "])
        stop, stream = StopCondition(tokenizer, ends, least), TextStream(tokenizer, ends, prompt, least)
        looks = range(1, len(response) + 1)
        count = next((n for n in looks if stop.is_stop(response[:n], prompt)), len(response))
        found = count, stop.text_of(response[:count], prompt)
        assert found == first_end(tokenizer, prompt, response, ends, least), (response, ends, least)
        streamed = "".join(stream.more(response[:n]) for n in range(1, count))
        assert streamed + stream.rest(found[1]) == found[1], (response, ends, least)
