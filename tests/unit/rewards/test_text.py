"""Rewards of texts, against their definitions written out another way."""

from __future__ import annotations

import itertools
import random

import pytest

from nemo_aligner.rewards.text import exact_match, length_window, regular_expression, repetition_penalty


def test_an_exact_match_is_the_answer_but_for_spaces_around_it() -> None:
    answers = ["Paris", "Paris", "Paris", 42, ["a", "b"], ["a", "b"], None]
    responses = [" Paris\n", "paris", "Paris.", "42", "b", "c", "anything"]
    assert exact_match(responses, answers) == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, None]
    assert exact_match(["paris", "STRASSE"], ["PARIS", "straße"], ignore_case=True) == [1.0, 1.0]


def test_a_pattern_is_found_anywhere_or_is_the_whole_response() -> None:
    responses = ["<a>x</a>", "say <a>x</a>", "<a>x\ny</a>", ""]
    assert regular_expression(responses, r"<a>.*</a>") == [1.0, 1.0, 0.0, 0.0]
    assert regular_expression(responses, r"<a>.*</a>", whole=True) == [1.0, 0.0, 0.0, 0.0]
    assert regular_expression(responses, r"(?s)<a>.*</a>", whole=True) == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("unit", ["words", "characters"])
@pytest.mark.parametrize(("low", "high", "margin"), [(2, 4, 0), (2, 4, 3), (0, None, 5), (3, None, 2), (3, 3, 1)])
def test_a_length_is_worth_one_inside_its_window_and_falls_in_a_line_outside(
    unit: str, low: int, high: int | None, margin: int
) -> None:
    for length in range(12):
        text = " ".join("w" * length) if unit == "words" else "w" * length
        inside = range(low, 100 if high is None else high + 1)
        distance = 0 if length in inside else min(abs(length - i) for i in inside)
        expected = 1.0 if distance == 0 else 0.0 if margin == 0 or distance > margin else 1 - distance / margin
        assert length_window([text], low, high, margin, unit) == [pytest.approx(expected)]
    with pytest.raises(ValueError, match="neither words nor characters"):
        length_window(["a"], unit="tokens")


def test_repetition_costs_the_part_of_the_grams_that_were_there_before() -> None:
    rng = random.Random(3)
    texts = [" ".join(rng.choices("aAbc", k=rng.randint(0, 12))) for _ in range(60)]
    for n, text in itertools.product((1, 2, 3), texts):
        words = text.lower().split(" ") if text else []
        places = range(len(words) - n + 1)
        before = sum(any(words[j : j + n] == words[i : i + n] for j in range(i)) for i in places)
        expected = -0.5 * before / len(places) if places else 0.0
        assert repetition_penalty([text], n=n, penalty=-0.5) == [pytest.approx(expected)]
