"""Who judges a run's responses, in one place: its reward model, its functions, or both at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.config.rewards import REWARD_MODEL, RewardPlan, RewardSources
from nemo_aligner.data.blending import Blend
from nemo_aligner.data.jsonl import Row
from nemo_aligner.data.judged_text import TextEncoder
from nemo_aligner.records import Keys, Sample
from nemo_aligner.rewards.functions import Functions
from nemo_aligner.rewards.interfaces import Candidate, Outcome, Source
from nemo_aligner.rewards.mixture import Mixture

if TYPE_CHECKING:
    from nemo_aligner.engine.interfaces import Cluster, RewardModel
    from nemo_aligner.servers.reward_client import RewardClient


@contextmanager
def functions_of(cfg: RewardSources) -> Iterator[Functions | None]:
    """The processes of `reward_function`, None where it names no function. Raises ConfigError."""
    plan = cfg.reward_plan
    if not plan.functions:
        yield None
        return
    functions = Functions(plan.functions, cfg.reward_workers)
    try:
        functions.check_names()
        yield functions
    finally:
        functions.close()


def rewarder_of(plan: RewardPlan, functions: Functions | None, model: Source | None, cluster: Cluster) -> Mixture:
    """Everyone of `plan` together; functions judge on the rank that speaks for its replica alone."""
    sources: dict[str, Source] = {}
    for function in plan.functions:
        assert functions is not None
        sources[function.name] = functions.source(function.name) if cluster.speaks_for_replica else Silent()
    if plan.uses_model:
        assert model is not None
        sources[REWARD_MODEL] = model
    return Mixture(sources, plan.weights, apart=bool(plan.functions))


def candidate_of(row: Row, where: tuple[str, int], keys: Keys) -> Candidate:
    """A row with prompt and response, as reward functions see it; the turns of a conversation are a field too."""
    sample = Sample.of(row, keys)
    return Candidate(
        sample.input, sample.output, all_but(keys.input, keys.output)(row), "{}:{}".format(*where), sample.turns
    )


def check_fields(functions: Functions | None, rows: Blend | None, others: Callable[[Row], Row]) -> None:
    """Every row must have what the functions need among its `others`: all but prompt and response. Raises DataError."""
    if functions is None or rows is None:
        return
    for index in range(len(rows)):
        functions.check_fields(others(rows[index]), *rows.where(index))


def all_but(*own: str) -> Callable[[Row], Row]:
    """A row without its fields `own`."""
    return lambda row: {name: value for name, value in row.items() if name not in own}


class _AtOnce:
    """A source that answers while it is asked."""

    def hurry(self) -> None: ...

    def close(self) -> None: ...


class ModelSource(_AtOnce):
    """Implements interfaces.Source: a reward model of this process, asked by all ranks of a replica together."""

    def __init__(self, model: RewardModel, data: OfflineDataConfig) -> None:
        self._model, self._data, self._encoder = model, data, TextEncoder(data, model)
        self.tokens = 0  # read so far

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        data = self._data
        tokens = [self._encoder.tokens(c.row(data.input_key, data.output_key), c.where) for c in candidates]
        self.tokens += sum(map(len, tokens))
        scores = self._model.score(tokens, data.micro_batch_size) if tokens else []
        return _known([_outcome(score[0]) for score in scores])

    def report(self) -> None:
        """Say what was cut."""
        self._encoder.report()


class RowsSource(_AtOnce):
    """Implements interfaces.Source: a reward model that is asked for the rewards of `rows`, the candidates' tokens."""

    def __init__(self, score: Callable[[list[list[int]]], list[float]], rows: list[list[int]]) -> None:
        self._score, self._rows = score, rows

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        assert len(candidates) == len(self._rows), "a row each"
        return _known([_outcome(score) for score in self._score(self._rows)] if self._rows else [])


class ServedSource:
    """Implements interfaces.Source: a reward server, which has been waited for."""

    def __init__(self, client: RewardClient) -> None:
        self._client = client

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        return self._client.judge(candidates)

    def hurry(self) -> None:
        self._client.hurry()

    def close(self) -> None:
        self._client.close()


class Silent(_AtOnce):
    """Implements interfaces.Source for ranks whose rewards nobody asks for."""

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        return _known([Outcome(None) for _ in candidates])


def _outcome(score: float) -> Outcome:
    return Outcome(None, "the reward model gave NaN") if math.isnan(score) else Outcome(score)


def _known(outcomes: list[Outcome]) -> Future[list[Any]]:
    answer: Future[list[Any]] = Future()
    answer.set_result(outcomes)
    return answer
