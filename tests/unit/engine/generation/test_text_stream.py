"""The pieces of a stream are the text, and nothing given out is taken back."""

from __future__ import annotations

import random

import pytest

from nemo_aligner.data.token_texts import added_text
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.generation.stopping import StopCondition
from nemo_aligner.engine.generation.text_stream import TextStream
from tests.fakes import EOS, ByteTokenizer
from tests.vocabularies import vocabulary

TEXTS = ["plain", "a film 🎬 of 東京, naïve", "ab</s>cd", "no end </", "x\n\nUser: y", "é" * 9, "\ufffd lone", ""]
ENDS = ["</s>", "\nUser:"]


def streamed(tokenizer: ByteTokenizer, tokens: list[int], ends: list[str], rng: random.Random) -> list[str]:
    """Pieces, with one to three tokens between two looks."""
    stream, pieces, at = TextStream(tokenizer, ends), [], 0
    while at < len(tokens):
        at += rng.randint(1, 3)
        pieces.append(stream.more(tokens[:at]))
    return [*pieces, stream.rest(StopCondition(tokenizer, ends).text_of(tokens))]


@pytest.mark.parametrize("ends", [[], ENDS])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text(text: str, ends: list[str]) -> None:
    tokenizer, tokens = ByteTokenizer(), [*text.encode(), EOS]
    for seed in range(5):
        pieces = streamed(tokenizer, tokens, ends, random.Random(seed))
        assert "".join(pieces) == StopCondition(tokenizer, ends).text_of(tokens)
        if text != "\ufffd lone":
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_broken_characters_come_out_as_the_decoder_has_them() -> None:
    tokenizer = ByteTokenizer()
    for seed in range(50):
        rng = random.Random(seed)
        tokens = [rng.choice([0xE6, 0x9D, 0xB1, 0xC3, 0xA9, 0x61, 0x20]) for _ in range(20)]
        pieces = streamed(tokenizer, tokens, [], rng)
        assert "".join(pieces) == StopCondition(tokenizer, []).text_of(tokens)


def test_what_may_begin_an_end_string_waits() -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, ENDS)
    given = [stream.more(list(b"ab</s"[: n + 1])) for n in range(5)]
    assert given == ["a", "b", "", "", ""]
    assert stream.more(list(b"ab</sx")) == "</sx"


def test_a_real_decoder_is_streamed_as_it_decodes_the_whole() -> None:
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        pieces = streamed(tokenizer, tokens, [], random.Random(0))  # type: ignore[arg-type]
        assert "".join(pieces) == tokenizer.decode(tokens)


def test_a_decoder_that_drops_a_leading_blank_keeps_those_inside() -> None:
    class Words(ByteTokenizer):
        """Each token but 0 a word with a blank before it, which the first one loses."""

        def decode(self, ids):  # type: ignore[no-untyped-def]
            return "".join(f" w{i}" for i in ids if i).removeprefix(" ")

    tokenizer = Words()
    assert "".join(streamed(tokenizer, [1, 2, 3, 4, 5], [], random.Random(0))) == "w1 w2 w3 w4 w5"
    stream = TextStream(tokenizer, [])
    tokens = [1, 0, 2, 0, 0, 3]
    assert [stream.more(tokens[: n + 1]) for n in range(6)] == ["w1", "", " w2", "", "", " w3"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "metaspace", "llama3", "wordpiece"])
def test_whatever_is_drawn_the_pieces_are_the_text_and_it_is_cut_where_drawing_stopped(kind: str) -> None:
    tokenizer, rng = vocabulary(kind), random.Random(3)
    every = range(tokenizer.vocab_size)
    parts = [t for t in every if "\ufffd" in tokenizer.decode([t]) or tokenizer.piece(t).startswith("<0x")] or every
    some = [*tokenizer.encode("the film, a日本é: 中文 100\n"), *parts[::9]]
    for _ in range(1500):
        pool = rng.choice([every, parts, some])
        prompt, drawn = ([rng.choice(pool) for _ in range(rng.randint(0, most))] for most in (12, 24))
        ends, least = rng.choice([[], ["a"], ["é", "\n"], ["the", " w"], ["R", "\0"]]), rng.choice([0, 0, 3])
        stop = StopCondition(tokenizer, ends, least)
        count = next((n for n in range(1, len(drawn) + 1) if stop.is_stop(drawn[:n], prompt)), None)
        tokens = drawn[:count]
        text = stop.text_of(tokens, prompt)
        stream, pieces = TextStream(tokenizer, ends, prompt, least), []
        for n in sorted(rng.sample(range(1, max(1, len(tokens))), rng.randint(0, max(0, len(tokens) - 1)))):
            pieces.append(stream.more(tokens[:n]))
        assert "".join(pieces) + stream.rest(text) == text
        by_text = count is not None and tokens[-1] not in stop.stop_ids
        if count is None or by_text:
            assert (text != added_text(tokenizer, prompt, tokens)) is by_text
