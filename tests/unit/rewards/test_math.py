r"""Answers in `\boxed{}` are compared as mathematics."""

from __future__ import annotations

import pytest

pytest.importorskip("math_verify", reason="the extra [math] is not installed")

from nemo_aligner.rewards.math import boxed_answer, last_boxed

pytestmark = pytest.mark.processes  # for its time: sympy takes a second or two to import


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("1/2", "0.5"), (r"\frac{1}{2}", "1/2"), (r"\frac12", 0.5), ("82", 82), ("082", "82"), ("1,000", "1000"),
        ("x^2 + 2x + 1", "(x+1)^2"), (r"\{1, 2\}", r"\{2, 1\}"), (r"\sqrt{8}", r"2\sqrt{2}"), ("4", r"so \boxed{4}"),
        ("2+2", "4"), (r"\text{ } 7", "7"),
    ],
)  # fmt: skip
def test_equal_answers_are_right_however_they_are_written(given: str, answer: object) -> None:
    assert boxed_answer([rf"so it is $\boxed{{{given}}}$."], [answer]) == [1.0]


@pytest.mark.parametrize(
    "response",
    [
        "82",
        r"\boxed{81}",
        r"\boxed{82",
        r"\boxed{}",
        r"\boxed{82} or rather \boxed{28}",
        r"\boxed{?!}",
        "",
        "boxed{82}",
    ],
)
def test_another_answer_and_none_in_a_box_are_wrong(response: str) -> None:
    assert boxed_answer([response], ["82"]) == [0.0]


def test_without_an_answer_that_can_be_read_nobody_can_tell() -> None:
    assert boxed_answer([r"\boxed{1}"] * 2, [None, "?!"]) == [None, None]


def test_the_last_box_that_closes_counts_with_all_its_braces() -> None:
    assert last_boxed(r"\boxed{1} \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} \fbox{2}") == "2"
    assert last_boxed(r"\boxed{1} \boxed{2") == "1"
    assert last_boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_boxed("1") is None
    assert last_boxed(r"\boxed{1") is None
