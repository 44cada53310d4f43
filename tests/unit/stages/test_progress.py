"""The bar of every stage begins where the run goes on, ends at its total, and is shown by the main rank alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.errors import StoppedEarly
from nemo_aligner.stages.offline import evaluation, random_sampler, reward_labeler
from nemo_aligner.stages.offline.data import open_rows
from nemo_aligner.stages.reinforce import loop as reinforce
from nemo_aligner.stages.supervised import loop as supervised
from tests.fakes import EchoPolicy, OneProcess
from tests.unit.stages.offline import test_evaluation, test_random_sampler, test_reward_labeler
from tests.unit.stages.reinforce import test_actor
from tests.unit.stages.supervised import test_loop


class Bar:
    """Remembers what it is told."""

    def __init__(self, name: str, total: int, *, show: bool, done: int = 0, unit: str = "sample") -> None:
        self.name, self.total, self.show, self.unit = name, total, show, unit
        self.begun = self.done = done
        self.tokens, self.values, self.closed = list[int](), list[set[str]](), False

    def advance(self, count: int, tokens: int = 0, **values: float) -> None:
        self.done += count
        self.tokens.append(tokens)
        self.values.append(set(values))

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *fault: object) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """In the order in which they are made."""
    made: list[Bar] = []

    def make(*args: Any, **options: Any) -> Bar:
        made.append(Bar(*args, **options))
        return made[-1]

    for module in (random_sampler, reward_labeler, evaluation, supervised, reinforce):
        monkeypatch.setattr(module, "Progress", make)
    return made


def stops(cluster: Any) -> None:
    cluster.any = cluster.any_in_replica = lambda flag: True


def inner(folder: Path, stage: Callable[..., Any]) -> Path:
    """A folder of its own for a stage."""
    found = folder / stage.__name__
    found.mkdir()
    return found


def not_main() -> OneProcess:
    cluster = OneProcess()
    cluster.is_main = False  # type: ignore[misc]
    return cluster


def sample(folder: Path, cluster: Any) -> None:
    test_random_sampler.run(test_random_sampler.config(folder), cluster)


def label(folder: Path, cluster: Any) -> None:
    cfg = test_reward_labeler.config(folder, micro_batch_size=3)
    cfg.checkpoint_interval = 1
    test_reward_labeler.run(cfg, cluster)


def fine_tune(folder: Path, cluster: Any) -> None:
    model = test_loop.Recorder()
    model.cluster = cluster
    task = test_loop.task(save_interval=int(cluster.is_main))
    supervised.train(task, model, test_loop.experiment(folder))


def reinforced(folder: Path, cluster: Any) -> None:
    learner = test_actor.Learner()
    learner.cluster = cluster
    told = cluster.any
    cluster.any = lambda flag: bool(learner.trained) and told(flag)
    test_actor.run(test_actor.config(folder, save_interval=int(cluster.is_main)), learner=learner)


STAGES: list[tuple[Callable[[Path, Any], None], str, str, int, int]] = [
    (sample, "sampling", "sample", 15, 1),
    (label, "labeling", "sample", 7, 3),
    (fine_tune, "training", "step", 3, 1),
    (reinforced, "REINFORCE", "step", 3, 1),
]


@pytest.mark.parametrize(("stage", "name", "unit", "total", "first"), STAGES, ids=[name for _, name, *_ in STAGES])
def test_a_bar_begins_where_the_run_goes_on_and_ends_at_its_total(
    tmp_path: Path, bars: list[Bar], stage: Callable[[Path, Any], None], name: str, unit: str, total: int, first: int
) -> None:
    cluster = OneProcess()
    stops(cluster)
    with pytest.raises(StoppedEarly):
        stage(tmp_path, cluster)
    stage(tmp_path, OneProcess())
    [begun, rest] = bars
    assert [(bar.name, bar.unit, bar.total, bar.show) for bar in bars] == [(name, unit, total, True)] * 2
    assert (begun.begun, begun.done) == (0, first)
    assert (rest.begun, rest.done, rest.closed) == (first, total, True)


def test_other_ranks_show_no_bar(tmp_path: Path, bars: list[Bar]) -> None:
    for stage, *_ in STAGES[2:]:
        stage(inner(tmp_path, stage), not_main())
    cfg = test_evaluation.config(tmp_path)
    rows = open_rows(cfg.data, {"input": "data.input_key"})
    evaluation.draw(cfg, rows, EchoPolicy(), not_main(), "m.nemo")  # type: ignore[arg-type]
    assert [bar.show for bar in bars] == [False] * 3


def test_bars_count_the_tokens_of_what_was_done(tmp_path: Path, bars: list[Bar]) -> None:
    for stage, *_ in STAGES:
        stage(inner(tmp_path, stage), OneProcess())
    sampled, labeled, trained, reinforced = bars
    assert sampled.tokens == [5] * 15, "of <p.s>"
    texts = [len(f"q{i % 3}") + i for i in range(7)]
    assert labeled.tokens == [sum(texts[:3]), sum(texts[3:6]), texts[6]]
    rows = [len(example.rows[0]) for example in test_loop.EXAMPLES]
    assert [sum(trained.tokens), len(trained.tokens)] == [sum(rows), 3]
    assert trained.tokens == [sum(rows[i] for i in test_loop.task().plan.indices(step)) for step in range(3)]
    assert reinforced.tokens == [4 * 5, 4 * 5, 2 * 5], "responses to two prompts, two and one"
    assert [bar.values[-1] for bar in (trained, reinforced)] == [{"loss", "lr"}, {"reward"}]


def test_an_evaluation_shows_what_it_draws_of_each_policy(tmp_path: Path, bars: list[Bar]) -> None:
    cfg = test_evaluation.config(tmp_path)
    rows = open_rows(cfg.data, {"input": "data.input_key"})
    evaluation.draw(cfg, rows, EchoPolicy(), OneProcess(), "m.nemo")  # type: ignore[arg-type]
    [bar] = bars
    assert (bar.name, bar.unit, bar.total, bar.done) == ("evaluating m.nemo", "sample", 10, 10)
    assert (bar.show, bar.closed, bar.tokens) == (True, True, [5] * 10)
