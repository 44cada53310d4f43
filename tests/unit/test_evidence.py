"""scripts/evidence: its intervals and its best-of-n are what they are defined as, and its words follow the figures."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from scripts.evidence import commands
from scripts.evidence.estimates import chosen, difference, over, points_of, reference_of
from scripts.evidence.methods import SCALES, Method, Scale, contrasts, methods
from scripts.evidence.words import sections

REWARDS = ["reward", "gold", "vader"]


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_every_method_draws_the_same_number_of_responses(scale: Scale) -> None:
    for method in methods(scale):
        if method.family == "reinforce":
            assert scale.step // method.drawn * method.drawn * scale.steps == scale.responses
            assert scale.steps // scale.validations * scale.validations == scale.steps
        else:
            prompts = scale.responses // method.n // method.iterations
            assert prompts * method.n * method.iterations == scale.responses
            assert prompts * method.iterations <= scale.prompts


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_every_question_is_about_methods_that_are_trained(scale: Scale) -> None:
    names = {method.name for method in methods(scale)}
    assert all({own, other} <= names and own != other for _, own, other in contrasts(scale))


def test_several_seeds_have_the_interval_of_students_paired_test() -> None:
    rng = random.Random(0)
    own, other = ([{p: rng.gauss(mean, 1) for p in "abcde"} for _ in range(4)] for mean in (1.0, 0.0))
    found = difference(own, other)
    means = [[statistics.fmean(seed.values()) for seed in method] for method in (own, other)]
    low, high = stats.ttest_rel(*means).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_has_the_normal_interval_over_prompts() -> None:
    values = [0.5, -1.0, 2.0, 0.25]
    found = over([dict(zip("abcd", values, strict=True))])
    low, high = stats.norm.interval(0.95, statistics.fmean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_another_reward_of_the_best_of_n_is_the_mean_over_all_choices_of_n(n: int) -> None:
    rng = random.Random(n)
    group = [{"reward": rng.random(), "gold": rng.random()} for _ in range(5)]
    every = [max(subset, key=lambda row: row["reward"])["gold"] for subset in itertools.combinations(group, n)]
    assert chosen(group, n, "gold") == pytest.approx(statistics.fmean(every))


def rows_of(gains: dict[tuple[str, int], dict[str, float]], seeds: int, prompts: int = 40) -> list[dict[str, Any]]:
    """Samples of a start model, and of methods that give so much more at their points, all with a little noise."""
    rng = random.Random(7)
    found = []
    for method, at in [("start", 0), *gains]:
        for seed in range(1 if method == "start" else seeds):
            for prompt, _ in itertools.product(range(prompts), range(4)):
                rewards = {
                    name: prompt / prompts + gains.get((method, at), {}).get(name, 0.0) + rng.gauss(0, 0.1)
                    for name in REWARDS
                }
                counts = {"responses": 10 * at, "generated_tokens": 120 * at, "kl": 0.1 * at, "input": str(prompt)}
                found.append({"method": method, "seed": seed, "at": at, **counts, **rewards})
    return found


def said(gains: dict[tuple[str, int], dict[str, float]], seeds: int) -> dict[str, list[str]]:
    rows = rows_of(gains, seeds)
    names = list(dict.fromkeys(method for method, _ in gains))
    own = [Method(name, f"<{name}>", "rs", 4) for name in names]
    return dict(sections(own, points_of(rows, REWARDS), reference_of(rows, REWARDS), SCALES["tiny"], seeds))


def test_what_rises_by_the_reward_of_training_and_falls_by_others_is_called_over_optimised() -> None:
    honest = {(name, at): dict.fromkeys(REWARDS, 0.5 * at) for name in ("honest",) for at in (1, 2)}
    gamed = {("gamed", 1): {"reward": 1.0, "gold": 0.5, "vader": 0.5}, ("gamed", 2): {"reward": 2.0, "gold": -0.5}}
    for seeds in (1, 3):
        found = said(honest | gamed, seeds)["Over-optimisation"]
        fell = [sentence for sentence in found if " falls: " in sentence or "is over-optimised" in sentence]
        assert fell
        assert all("<gamed>" in sentence and "<honest>" not in sentence for sentence in fell)
        assert any("<gamed> is over-optimised from point 1 to 2" in sentence for sentence in found)
        assert any(" rises too: <honest>" in sentence for sentence in found)


def test_methods_are_told_apart_only_where_their_intervals_do_not_overlap() -> None:
    gains = {("large", 1): {"reward": 1.0}, ("nearly", 1): {"reward": 0.99}, ("small", 1): {"reward": 0.3}}
    found = said(gains, 3)["Which method gained most"]
    overlapping, apart = found[1], found[2]
    assert "<small>" in apart
    assert "<small>" not in overlapping
    assert ("<nearly>" in overlapping) or ("<large>" in overlapping)


def test_a_method_that_gained_nothing_is_not_said_to_have_gained() -> None:
    found = said({("idle", 1): {}}, 1)
    assert found["Gain over the start model"][0].startswith("The interval holds 0: <idle>")
    assert found["Over-optimisation"] == [
        "The reward of training rose for no method, so there is nothing to over-optimise."
    ]


def test_a_method_further_away_than_best_of_n_may_be_is_compared_with_no_line() -> None:
    rows = rows_of({("far", 9): {"reward": 1.0}}, 1)
    reference = reference_of(rows, REWARDS)
    assert reference.at("reward", reference.kl[-1] + 1e-9) is None
    assert reference.at("reward", 0.0) == pytest.approx(0.0)
    assert reference.at("reward", reference.kl[1]) == pytest.approx(reference.gains["reward"][1])


def python(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """In place of `aligner`."""
    monkeypatch.setattr(commands, "PREFIX", (sys.executable, "-c", code))


@pytest.mark.processes
def test_a_server_that_dies_is_started_again_and_given_up_the_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(monkeypatch, "import sys; print('up', sys.argv[1:])")
    with commands.Server(tmp_path, 5555, "rm_model_file=rm.nemo") as server:
        for _ in range(2):
            server.process.wait()
            server.keep()
        server.process.wait()
        with pytest.raises(commands.CommandError, match=r"serve\.log"):
            server.keep()
    said = (tmp_path / "serve.log").read_text().splitlines()
    assert said == ["up ['serve', 'inference.port=5555', 'rm_model_file=rm.nemo']"] * 3


@pytest.mark.processes
def test_a_command_that_fails_is_told_with_its_last_error_and_has_no_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(monkeypatch, "import sys; print('error: no such file'); print('bye'); sys.exit(3)")
    with pytest.raises(commands.CommandError, match=r"ended with 3; .*train\.log says: error: no such file"):
        commands.run(tmp_path, "train", "sft", "model=x")
    python(monkeypatch, "import os; os.environ['SEED'] == '7' or os._exit(1)")
    commands.run(tmp_path, "train", "sft", SEED=7)
    assert [cost["stage"] for cost in commands.costs_of(tmp_path)] == ["train"]
