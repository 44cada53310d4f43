"""What the reward server does to rewards before it answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_aligner.config.schema import RewardStandardization
from nemo_aligner.config.serving import ServedModelConfig, ServerConfig
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.serving.rewards import SharedScorer, standardization
from tests.fakes import OneProcess, RankOfSeveral, on_ranks


class LengthModel:
    """The reward of a row is its length; remembers what it scored."""

    def __init__(self) -> None:
        self.scored: list[list[list[int]]] = []
        self.micro_batch_sizes: set[int] = set()

    def score(self, rows: list[list[int]], micro_batch_size: int) -> list[list[float]]:
        self.scored.append(rows)
        self.micro_batch_sizes.add(micro_batch_size)
        return [[float(len(row))] for row in rows]


def config(**given: Any) -> ServerConfig:
    model = ServedModelConfig(precision=None, reward_standardization=RewardStandardization(**given))
    return ServerConfig(rm_model_file="rm.nemo", model=model)


def answered(cfg: ServerConfig, stored: tuple[float, float] | None) -> list[float]:
    known: Any = standardization(cfg, SimpleNamespace(stored_standardization=stored))  # type: ignore[arg-type]
    return SharedScorer(LengthModel(), OneProcess(), 4, known).score([[1], [1, 2, 3]])  # type: ignore[arg-type]


def test_rewards_are_as_they_are_unless_asked() -> None:
    assert answered(config(), (2.0, 0.5)) == [1.0, 3.0]


def test_rewards_are_standardised_by_what_is_given_before_what_is_stored() -> None:
    assert answered(config(enable=True), (2.0, 0.5)) == [-2.0, 2.0]
    assert answered(config(enable=True, mean=1.0, std=2.0), (2.0, 0.5)) == [0.0, 1.0]


def test_standardisation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.reward_standardization\.enable"):
        answered(config(enable=True), None)
    with pytest.raises(ConfigError, match=r"model\.reward_standardization\.std"):
        config(enable=True, mean=1.0).validate()


def served(ranks: int, batches: list[list[list[int]]]) -> tuple[list[list[float]], list[LengthModel]]:
    """Answers of rank 0 to `batches`, with a beat between each two, and the models of all ranks."""

    def one(cluster: RankOfSeveral) -> tuple[list[list[float]], LengthModel]:
        model = LengthModel()
        scorer = SharedScorer(model, cluster, 4, None)  # type: ignore[arg-type]
        answers = []
        if cluster.is_main:
            for rows in batches:
                answers.append(scorer.score(rows))
                scorer.beat()
            scorer.release()
        else:
            scorer.follow()
        return answers, model

    found = on_ranks(ranks, one)
    return found[0][0], [model for _, model in found]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_row_gets_its_own_reward_back_whatever_rank_scored_it(ranks: int, count: int) -> None:
    rows = [[0] * (1 + (5 * i) % 11) for i in range(count)]
    answers, _ = served(ranks, [rows, rows[::-1]])
    assert answers == [[float(len(row)) for row in rows], [float(len(row)) for row in rows[::-1]]]


def test_ranks_share_the_rows_evenly_and_score_none_twice() -> None:
    rows = [[0] * i for i in range(1, 8)]
    _, models = served(3, [rows])
    shares = [row for model in models for part in model.scored for row in part]
    assert sorted(shares) == rows
    assert sorted(sum(map(len, model.scored)) for model in models) == [2, 2, 3]
    assert all(model.micro_batch_sizes == {4} for model in models)


def test_a_rank_without_rows_scores_nothing() -> None:
    answers, models = served(4, [[[1], [1, 2]]])
    assert answers == [[1.0, 2.0]]
    assert [model.scored for model in models[2:]] == [[], []]
