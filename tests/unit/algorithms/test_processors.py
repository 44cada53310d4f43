"""Processors against their definitions: enumeration for rejection sampling, literal strings for the reward prompt."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest

from nemo_aligner.algorithms.processors import apply_processor
from nemo_aligner.algorithms.statistics import mean_and_std, standardised
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.records import Keys, Sample, ScoredSample

KEYS = Keys()


def process(name: str | None, samples: list[ScoredSample], threshold: float = 0.0) -> list[ScoredSample]:
    template = "{input} <rm_score>: {reward} "
    return list(apply_processor(name, samples, threshold=threshold, reward_template=template, keys=KEYS))


def sample(prompt: str, output: str, reward: float) -> ScoredSample:
    return ScoredSample(prompt, output, {}, reward)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rs_draws_from_the_best_of_n_distribution(n: int) -> None:
    """P(best of n is y) = F(y)^n − F⁻(y)^n, by enumerating every n-tuple of outcomes of a small policy."""
    policy = {"a": (0.2, 1.0), "b": (0.5, 3.0), "c": (0.3, 2.0)}
    found = dict.fromkeys(policy, 0.0)
    for outcome in itertools.product(policy, repeat=n):
        [best] = process("rs", [sample("p", y, policy[y][1]) for y in outcome])
        found[best.output] += math.prod(policy[y][0] for y in outcome)
    for y, (_, reward) in policy.items():
        up_to = sum(p for p, r in policy.values() if r <= reward)
        below = sum(p for p, r in policy.values() if r < reward)
        assert found[y] == pytest.approx(up_to**n - below**n)


def test_rs_groups_by_input_over_the_whole_file_and_keeps_first_of_ties() -> None:
    samples = [sample("p", "1", 1.0), sample("q", "2", 5.0), sample("p", "3", 2.0), sample("p", "4", 2.0)]
    assert [s.output for s in process("rs", samples)] == ["3", "2"]


def test_rs_never_keeps_nan() -> None:
    samples = [sample("p", "1", math.nan), sample("p", "2", -9.0), sample("q", "3", math.nan)]
    assert [s.output for s in process("rs", samples)] == ["2"]
    with pytest.raises(DataError, match="every reward is NaN"):
        process("rs", samples[:1])


def test_rest_keeps_strictly_above_and_shrinks_as_the_threshold_rises() -> None:
    samples = [sample("p", str(i), float(i)) for i in range(5)] + [sample("p", "nan", math.nan)]
    kept = [[s.output for s in process("rest", samples, threshold)] for threshold in (-1.0, 1.0, 3.5)]
    assert kept == [["0", "1", "2", "3", "4"], ["2", "3", "4"], ["4"]]


def test_rest_with_nothing_left_names_threshold_and_range() -> None:
    with pytest.raises(DataError, match=r"threshold=9 leaves no sample: the 2 rewards are between 1 and 3"):
        process("rest", [sample("p", "a", 1.0), sample("p", "b", 3.0)], 9.0)


@pytest.mark.parametrize(
    ("prompt", "reward", "expected"),
    [
        ("Hi", 4.96, "Hi <rm_score>: 5.0 "),
        ("Hi", -0.04, "Hi <rm_score>: -0.0 "),
        ("a {reward} b {input}", 1.0, "a {reward} b {input} <rm_score>: 1.0 "),
        ("100% {} {0}", 2.25, "100% {} {0} <rm_score>: 2.2 "),
    ],
)
def test_dt_writes_one_decimal_and_leaves_the_users_braces_alone(prompt: str, reward: float, expected: str) -> None:
    [done] = process("dt", [sample(prompt, "out", reward)])
    assert (done.input, done.output) == (expected, "out")


def test_null_changes_nothing() -> None:
    samples = [sample("p", "a", math.nan), sample("p", "b", 1.0)]
    assert process(None, samples) == samples


def test_unknown_processor_and_template_without_places_are_refused() -> None:
    with pytest.raises(ConfigError, match="processor: 'best' is not one of rs, rest, dt, null"):
        process("best", [])
    with pytest.raises(ConfigError, match=r"reward_template: '{input}' lacks {reward}"):
        apply_processor("dt", [], threshold=0, reward_template="{input}", keys=KEYS)


def test_standardised_threshold_equals_raw_threshold_moved_and_scaled() -> None:
    rewards, mean, std = [0.3, 1.7, 2.2, -4.0], 0.9, 1.6
    for tau in (-1.0, 0.0, 0.4):
        above = [z > tau for z in standardised(rewards, mean, std)]
        assert above == [r > mean + tau * std for r in rewards]


@pytest.mark.parametrize("rewards", [[1.0], [2.0, 2.0], [math.nan, 3.0]])
def test_too_little_spread_cannot_standardise(rewards: list[float]) -> None:
    with pytest.raises(DataError, match="reward_standardization"):
        standardised(rewards, *mean_and_std(rewards))


def test_mean_and_std_are_unbiased_and_skip_nan() -> None:
    assert mean_and_std([1.0, math.nan, 3.0]) == (2.0, pytest.approx(math.sqrt(2.0)))


def test_a_users_reward_field_is_not_passed_off_as_ours() -> None:
    row = ScoredSample("p", "o", {"reward": "old", "id": 3}, 1.5)
    assert row.to_row(KEYS) == {"id": 3, "input": "p", "output": "o", "reward": 1.5}
    assert row.to_row(KEYS, export_reward=False) == {"id": 3, "input": "p", "output": "o"}


def test_rising_thresholds_keep_nested_sets_of_rising_mean_and_of_the_parts_a_normal_reward_has() -> None:
    """Of a standard normal, Φ(−τ) is above τ, with mean φ(τ)/Φ(−τ); here at the quantiles of 20,000 equal parts."""
    normal, parts = NormalDist(), 20_000
    samples = [sample("p", str(i), normal.inv_cdf((i + 0.5) / parts)) for i in range(parts)]
    before: set[str] | None = None
    for threshold, part, mean in [(-1.0, 0.841, 0.288), (0.0, 0.5, 0.798), (1.0, 0.159, 1.525), (2.0, 0.023, 2.373)]:
        kept = process("rest", samples, threshold)
        outputs = {s.output for s in kept}
        assert before is None or outputs < before
        assert len(kept) / parts == pytest.approx(part, abs=1e-3)
        assert mean_and_std([s.reward for s in kept])[0] == pytest.approx(mean, abs=2e-3)
        before = outputs


def chat(text: str, output: str, reward: float, **extra: object) -> ScoredSample:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]
    sample = Sample.of({"messages": turns, "output": output, **extra}, KEYS)
    return ScoredSample(sample.input, sample.output, sample.extra, reward, turns=sample.turns)


def test_of_a_conversation_the_best_answer_is_kept_and_its_row_stays_what_it_was() -> None:
    samples = [chat("q", "a", 1.0, id=1), chat("q", "b", 3.0, id=1), chat("q", "c", 2.0, tools=[{"name": "look"}])]
    kept = [sample.to_row(KEYS, export_reward=False) for sample in process("rs", [*samples, chat("r", "d", 0.0)])]
    assert [row["output"] for row in kept] == ["b", "c", "d"], "with other tools it is another prompt"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    assert kept[0] == {"id": 1, "messages": turns, "output": "b"}


def test_a_decision_transformer_asks_for_the_reward_in_the_turn_that_is_answered() -> None:
    [asked] = process("dt", [chat("q {reward}", "a", 1.25)])
    assert asked.turns is not None
    assert [turn["content"] for turn in asked.turns.given] == ["be brief", "q {reward} <rm_score>: 1.2 "]
    said = {"conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}], "system": "s"}
    sample = Sample.of(said, KEYS)
    assert (sample.input, sample.output) == ("q", "a"), "its answer is its last turn"
    row = sample.with_input("q!").to_row(KEYS)
    assert row == {**said, "conversations": [{"from": "User", "value": "q!"}, said["conversations"][1]]}
