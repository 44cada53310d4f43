"""Where a response ends, with a tokenizer of one token per byte and three special ones."""

from __future__ import annotations

import pytest

from nemo_aligner.engine.generation.stopping import StopCondition
from tests.fakes import END_OF_TURN, EOS, ByteTokenizer


def drawn_until_stop(text_ids: list[int], end_strings: list[str]) -> tuple[int, str]:
    """Feed tokens one by one; how many were needed, and the text kept."""
    stop = StopCondition(ByteTokenizer(), end_strings)
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


@pytest.mark.parametrize("end", ["\n\n", "User:", "é!"])
def test_an_end_string_over_several_tokens_stops_at_its_last_token(end: str) -> None:
    before = "some words "
    ids = [*(before + end + " more").encode()]
    assert drawn_until_stop(ids, [end]) == (len((before + end).encode()), before)


def test_the_earliest_end_string_cuts() -> None:
    assert drawn_until_stop([*b"one STOP two END"], ["END", "STOP"]) == (8, "one ")


def test_nothing_to_stop_at_keeps_all() -> None:
    assert drawn_until_stop([*b"plain"], ["zzz", ""]) == (5, "plain")
