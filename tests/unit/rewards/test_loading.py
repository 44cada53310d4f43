"""What a worker makes of a function and of its answer."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_aligner.rewards.loading import checked, describe, load


def test_a_function_is_found_in_a_file_with_what_lies_beside_it_and_in_a_module(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("WORTH = 7.0\n")
    path = tmp_path / "own_rewards.py"
    path.write_text("from beside_it import WORTH\ndef mine(responses):\n    return [WORTH] * len(responses)\n")
    mine = load(str(path), "mine")
    assert mine(["a", "b"]) == [7.0, 7.0]
    assert describe(mine, {})["sum"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load("nemo_aligner.rewards.text", "exact_match")(["a"], ["a"]) == [1.0]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.py: no such file"):
        load(str(tmp_path / "absent.py"), "f")
    with pytest.raises(AttributeError, match=r"has no function 'f'; it has .*exact_match, length_window"):
        load("nemo_aligner.rewards.text", "f")
    with pytest.raises(TypeError, match=r"'re' of nemo_aligner\.rewards\.text is module, not a function"):
        load("nemo_aligner.rewards.text", "re")


def test_a_function_is_described_by_its_parameters() -> None:
    def some(prompts: Any, responses: Any, answer: Any, *, low: int, strict: bool = False) -> None: ...
    def every(responses: Any, **rest: Any) -> None: ...
    def none(prompts: Any) -> None: ...
    def positional(responses: Any, /) -> None: ...

    about = describe(some, {"low": 3})
    assert (about["needs"], about["takes"], about["any"], about["prompts"]) == (["answer"], ["strict"], False, True)
    about = describe(every, {"anything": 1})
    assert (about["needs"], about["takes"], about["any"], about["prompts"]) == ([], [], True, True)
    with pytest.raises(TypeError, match="no parameter 'responses'; it has prompts"):
        describe(none, {})
    with pytest.raises(TypeError, match="no parameter 'high'; it has answer, low, prompts, responses, strict"):
        describe(some, {"high": 3})
    with pytest.raises(TypeError, match="positional-only"):
        describe(positional, {})


@pytest.mark.parametrize(
    "answer",
    [[1, 0.5, None], (True, 0.5, None), [np.float32(1), np.float64(0.5), None], [torch.ones(()), np.array(0.5), None]],
)  # fmt: skip
def test_numbers_of_any_kind_are_rewards(answer: Any) -> None:
    found = checked(answer, 3)
    assert found == [1.0, 0.5, None]
    assert all(type(value) in (float, type(None)) for value in found)
    assert checked(np.array([1, 2]), 2) == checked(torch.tensor([1.0, 2.0]), 2) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1.0], "it returned 1 rewards for 2 responses"),
        ([1.0, 2.0, 3.0], "it returned 3 rewards for 2 responses"),
        (1.0, "it returned float 1.0, not a list of 2 rewards"),
        (None, "it returned NoneType None, not a list of 2 rewards"),
        ("ab", "it returned str 'ab', not a list of 2 rewards"),
        ({0: 1.0, 1: 1.0}, "not a list of 2 rewards"),
        ([1.0, "2"], "it returned str '2' for a reward, not a number or None"),
        ([1.0, [2.0]], "it returned list"),
        ([1.0, math.nan], "it returned nan for a reward; None says that it cannot tell"),
        ([1.0, -math.inf], "it returned -inf for a reward"),
        ([1.0, 1 + 2j], "it returned complex"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_what_it_is(answer: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as fault:
        checked(answer, 2)
    assert says in str(fault.value)
