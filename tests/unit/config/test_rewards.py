"""The sources of rewards, as configs may write them."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_aligner.config.rewards import RewardFunction, RewardPlan, RewardSources, split_target
from nemo_aligner.errors import ConfigError

F = "package.module:function"


def plan(given: Any, **more: Any) -> RewardPlan:
    return RewardSources(given, **more).reward_plan


def test_nothing_is_the_reward_model_and_a_target_is_one_function_called_by_its_name() -> None:
    assert plan(None) == RewardPlan((), 1.0)
    assert plan(F) == RewardPlan((RewardFunction("function", F),), None)
    assert plan("a/b c.py:f", reward_time_limit_s=2.0).functions == (
        RewardFunction("f", "a/b c.py:f", time_limit_s=2.0),
    )
    assert split_target("a/b:c.py:f") == ("a/b:c.py", "f")


def test_several_have_names_weights_and_settings_of_their_own() -> None:
    block = {"function": F, "weight": -0.5, "arguments": {"high": 3}, "fields": {"answer": "target"}, "batch_size": 8}
    found = plan({"right": F, "short": {**block, "time_limit_s": 1}, "reward_model": 0.25}, reward_time_limit_s=4.0)
    assert found.functions == (
        RewardFunction("right", F, time_limit_s=4.0),
        RewardFunction("short", F, -0.5, {"high": 3}, {"answer": "target"}, 1, 8),
    )
    assert found.weights == {"right": 1.0, "short": -0.5, "reward_model": 0.25}
    assert plan({"reward_model": {"weight": 2}, "f": F}).weights == {"f": 1.0, "reward_model": 2.0}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("module", "reward_function: 'module' is neither package.module:function nor path/to/file.py:function"),
        ("a:b-c", "reward_function: 'a:b-c' is neither"),
        (3, "reward_function: 3 is neither package.module:function nor {name: ..., name: ...}"),
        ({}, "reward_function: {} is neither"),
        ({"a b": F}, "reward_function: 'a b' is no name"),
        ({"a": 3}, "reward_function.a: 3 is neither package.module:function nor {function: ..., weight: ...}"),
        ({"a": {"weight": 1}}, "reward_function.a: {'weight': 1} is neither"),
        ({"a": "b"}, "reward_function.a: 'b' is neither package.module:function nor path"),
        ({"a": {"function": F, "weigth": 1}}, "reward_function.a.weigth: no such key; there are arguments, batch_size"),
        ({"a": {"function": F, "weight": "x"}}, "reward_function.a.weight: 'x' is not a number"),
        ({"a": {"function": F, "weight": float("nan")}}, "reward_function.a.weight: nan is not a number"),
        ({"a": {"function": F, "time_limit_s": 0}}, "reward_function.a.time_limit_s: 0 is not a number above 0"),
        ({"a": {"function": F, "batch_size": 0}}, "reward_function.a.batch_size: 0 is not a whole number"),
        ({"a": {"function": F, "arguments": 3}}, "reward_function.a.arguments: 3 is not {parameter: ...}"),
        ({"a": F, "reward_a": F}, "reward_function: a and reward_a would both be logged as reward_a"),
        ({"reward_model": "rm.nemo"}, "reward_function.reward_model: 'rm.nemo' is not a number"),
        ({"reward_model": {"file": 1}}, "reward_function.reward_model.file: no such key"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_its_key(given: Any, says: str) -> None:
    with pytest.raises(ConfigError) as fault:
        _ = plan(given)
    assert str(fault.value).startswith(says)


def test_limits_are_above_zero() -> None:
    for setting in ({"reward_time_limit_s": 0.0}, {"reward_workers": 0}):
        with pytest.raises(ConfigError, match=f"^{next(iter(setting))}: "):
            _ = plan(None, **setting)


def test_a_reward_model_is_given_where_it_is_asked_for_and_nowhere_else() -> None:
    RewardPlan().check_model("rm.nemo", "gpt_model_file")
    plan(F).check_model(None, "gpt_model_file")
    with pytest.raises(ConfigError, match="gpt_model_file: required, but not given; reward_function gives rewards"):
        plan({"f": F, "reward_model": 1.0}).check_model(None, "gpt_model_file")
    with pytest.raises(ConfigError, match=r"gpt_model_file: rm.nemo would give no reward.*add reward_model: <weight>"):
        plan({"f": F}).check_model("rm.nemo", "gpt_model_file")
