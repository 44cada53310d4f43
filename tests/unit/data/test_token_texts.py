"""Tokens and texts where one text goes on from another, in tokenizers that treat beginnings otherwise and not."""

from __future__ import annotations

import itertools
import random

import pytest

from nemo_aligner.data.token_texts import added_text, continuation, drawn_tokens, placed, spelling, token_bytes
from tests.vocabularies import vocabulary

KINDS = ("bytes", "sentencepiece", "metaspace", "llama3")
ALPHABET = [*"aegilmst thwx ,.!{|0~\n\t", " the", " film", "Größe", "é", "日本", "🙂", "  "]


def texts(seed: int, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_continuation_say_the_text_and_nothing_more(kind: str) -> None:
    tokenizer = vocabulary(kind)
    for first, second in zip(texts(1), texts(2), strict=True):
        before = tokenizer.encode(first)
        assert added_text(tokenizer, before, continuation(tokenizer, before, second)) == second, (first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_words_after_a_blank_have_the_tokens_of_the_whole_text(kind: str) -> None:
    tokenizer = vocabulary(kind)
    for text in ("the film was good", "a wonder of a plot, 100 more", "naïve café 中文"):
        for at in (i for i, letter in enumerate(text) if letter == " "):
            parts = list(tokenizer.encode(text[:at]))
            parts += continuation(tokenizer, parts, text[at:])
            assert parts == tokenizer.encode(text), text[at:]


def test_no_blank_is_made_up_within_a_text() -> None:
    for kind in ("sentencepiece", "metaspace"):
        tokenizer = vocabulary(kind)
        pieces = [
            tokenizer.piece(token) for token in continuation(tokenizer, tokenizer.encode("the film"), " was good")
        ]
        assert "".join(pieces) == "▁was▁good"
        assert "".join(map(tokenizer.piece, tokenizer.encode(" was"))) == "▁▁was"
        assert not tokenizer.piece(continuation(tokenizer, [5], "film")[0]).startswith("▁")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_begins_where_the_text_before_it_ends_and_a_part_of_a_character_where_that_does(kind: str) -> None:
    tokenizer, draw = vocabulary(kind), random.Random(5)
    for text in texts(3):
        ids = tokenizer.encode(text)
        ids.insert(draw.randint(0, len(ids)), tokenizer.eos_id)  # a special token has no text
        whole = tokenizer.decode(ids)
        prefixes = (tokenizer.decode(ids[:count]) for count in range(len(ids)))
        # a decoder may give up a whole run of bytes for the one at its end that is not all there
        ends = itertools.accumulate(
            (max(n for n in range(len(whole) + 1) if prefix.startswith(whole[:n])) for prefix in prefixes), max
        )
        assert [begins for begins, _ in placed(tokenizer, (), ids)] == list(ends), text
        alone = [(begins, added) for begins, added in placed(tokenizer, (), ids) if added]
        assert all(whole.startswith(added, begins) for begins, added in alone), text


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_make_up_the_text_also_where_characters_are_in_parts(kind: str) -> None:
    tokenizer = vocabulary(kind)
    before = tokenizer.encode("x")
    for text in texts(4):
        ids = [*continuation(tokenizer, before, text), tokenizer.eos_id]
        assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()


def test_the_letters_of_bytes_are_those_of_gpt2() -> None:
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = vocabulary("bytes")
    letters = bytes_to_unicode()
    for token in range(256):
        [byte] = [byte for byte, letter in letters.items() if letter == tokenizer.piece(token)]
        assert token_bytes(tokenizer, token) == bytes([byte])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_taken_as_drawn_where_they_say_the_text_and_else_not(kind: str) -> None:
    tokenizer = vocabulary(kind)
    before = tokenizer.encode("the film")
    letters = [
        token for letter in " was good" for token in continuation(tokenizer, before, letter)
    ]  # not how it would encode
    text = added_text(tokenizer, before, letters)
    assert drawn_tokens({"output_token_ids": letters}, "output", text, before, tokenizer) == letters
    for ids in (letters[:-1], [tokenizer.vocab_size + 5, *letters], [-1], [2**70], ["a"], "x", None):
        assert drawn_tokens({"output_token_ids": ids}, "output", text, before, tokenizer) is None
    assert drawn_tokens({}, "output", text, before, tokenizer) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_text_end_where_it_ends(kind: str) -> None:
    tokenizer = vocabulary(kind)
    before, said = tokenizer.encode("a film"), continuation(tokenizer, tokenizer.encode("a film"), " was good")
    assert spelling(tokenizer, before, [*said, tokenizer.eos_id], " was good") == said
    assert spelling(tokenizer, before, [*said, *continuation(tokenizer, before, "!!")], " was good") == said
    assert spelling(tokenizer, before, said, " was goo") in (None, said[:-1])
    assert spelling(tokenizer, before, [tokenizer.eos_id], "") == []
    assert spelling(tokenizer, before, said, " was bad") is None


@pytest.mark.parametrize("kind", KINDS)
def test_all_parts_of_a_character_that_was_not_finished_are_kept(kind: str) -> None:
    tokenizer = vocabulary(kind)
    smile = continuation(tokenizer, tokenizer.encode("|"), "\N{GRINNING FACE}")
    assert len(smile) == 4
    for parts in (smile[:2], smile[:3]):
        text = added_text(tokenizer, tokenizer.encode("a"), parts)
        assert spelling(tokenizer, tokenizer.encode("a"), parts, text) == parts


def test_behind_a_special_token_a_text_has_the_tokens_of_the_whole() -> None:
    tokenizer = vocabulary("metaspace")
    for text in ("was good", " was", "</s>was"):
        before = tokenizer.encode("the film</s>")
        assert [*before, *continuation(tokenizer, before, text)] == tokenizer.encode(f"the film</s>{text}")
