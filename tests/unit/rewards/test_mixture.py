"""Several sources make one reward: the weighted sum of those that can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from nemo_aligner.errors import RewardError
from nemo_aligner.rewards.interfaces import Candidate, Outcome
from nemo_aligner.rewards.mixture import Mixture, weighted

CANDIDATES = [Candidate("p", text) for text in "abc"]


class Says:
    """A source with its answers ready."""

    def __init__(self, *outcomes: Outcome, fault: Exception | None = None) -> None:
        self.outcomes, self.fault, self.did = list(outcomes), fault, list[str]()

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        assert len(candidates) == len(self.outcomes)
        answer: Future[list[Outcome]] = Future()
        if self.fault is None:
            answer.set_result(self.outcomes)
        else:
            answer.set_exception(self.fault)
        return answer

    def hurry(self) -> None:
        self.did.append("hurried")

    def close(self) -> None:
        self.did.append("closed")


@pytest.mark.parametrize(
    ("parts", "failed", "reward"),
    [
        ({"a": 1.0, "b": 3.0}, (), 2.0 * 1 + 0.5 * 3),
        ({"a": 1.0, "b": None}, (), 2.0),
        ({"a": None, "b": 3.0}, (), 1.5),
        ({"a": 0.0, "b": None}, (), 0.0),
        ({"a": None, "b": None}, (), None),
        ({"a": 1.0, "b": None}, ("b",), None),
        ({"a": 0.1, "b": 0.1}, (), 0.25),
    ],
)
def test_none_leaves_the_rest_of_the_sum_and_a_failure_leaves_nothing(
    parts: dict[str, float | None], failed: tuple[str, ...], reward: float | None
) -> None:
    found = weighted(parts, {"a": 2.0, "b": 0.5}, failed)
    assert found == (None if reward is None else pytest.approx(reward))


def test_each_candidate_has_its_sum_and_the_reward_of_each_source_by_name() -> None:
    first = Says(Outcome(1.0), Outcome(None), Outcome(None, "took too long"))
    second = Says(Outcome(4.0), Outcome(5.0), Outcome(6.0))
    mixture = Mixture({"first": first, "second": second}, {"first": 1.0, "second": -1.0})
    found = mixture.submit(CANDIDATES).result()
    assert [judgement.reward for judgement in found] == [-3.0, -5.0, None]
    assert found[2].parts == {"first": None, "second": 6.0}
    assert [judgement.failed for judgement in found] == [(), (), ("first",)]
    mixture.hurry()
    mixture.close()
    assert first.did == second.did == ["hurried", "closed"]


@pytest.mark.parametrize("apart", [True, False])
def test_what_stands_behind_a_server_is_told_by_its_names(apart: bool) -> None:
    served = Says(*(Outcome(reward, None, {"right": reward, "short": 0.0}) for reward in (1.0, 2.0, 3.0)))
    found = Mixture({"reward_model": served}, {"reward_model": 2.0}, apart=apart).submit(CANDIDATES).result()
    assert [judgement.reward for judgement in found] == [2.0, 4.0, 6.0]
    own = {"reward_model": 3.0} if apart else {}
    assert found[2].parts == {"right": 3.0, "short": 0.0, **own}


def test_a_source_that_gives_nothing_at_all_is_said_when_the_rewards_are_asked_for() -> None:
    broken = Says(*[Outcome(1.0)] * 3, fault=RewardError("no use"))
    pending = Mixture({"a": broken}, {"a": 1.0}).submit(CANDIDATES)
    with pytest.raises(RewardError, match="no use"):
        pending.result()


def test_a_reward_that_is_no_number_is_not_hidden_by_the_others() -> None:
    found = weighted({"a": math.nan, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert found is not None
    assert math.isnan(found)
