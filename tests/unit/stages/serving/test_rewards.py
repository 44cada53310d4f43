"""What the reward server does to rewards before it answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_aligner.config.schema import RewardStandardization
from nemo_aligner.config.serving import ServedModelConfig, ServerConfig
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.serving.rewards import SharedScorer, standardization


class OneProcess:
    dp_rank, dp_size = 0, 1

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


class LengthModel:
    """The reward of a row is its length."""

    def score(self, rows: list[list[int]], micro_batch_size: int) -> list[list[float]]:
        return [[float(len(row))] for row in rows]


def config(**given: Any) -> ServerConfig:
    model = ServedModelConfig(precision="32", reward_standardization=RewardStandardization(**given))
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
