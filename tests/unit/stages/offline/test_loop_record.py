"""An iteration of a loop leaves what it did, once, however often it is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_aligner.errors import DataError
from nemo_aligner.report.sources import find_sets
from nemo_aligner.stages.offline.loop_record import main, record

SAMPLES = [
    {"input": "p", "output": "aa", "id": 1}, {"input": "p", "output": "", "id": 1},
    {"input": "q", "output": "bbbb", "id": 2}, {"input": "q", "output": "cc", "id": 2},
]  # fmt: skip
REWARDS = [1.0, 4.0, -2.0, None]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def iteration(
    folder: Path,
    number: int,
    keep: int = 256,
    rewards: Sequence[float | None] = REWARDS,
    samples: Sequence[dict[str, Any]] = SAMPLES,
) -> None:
    generated = write(folder / "g.jsonl", samples)
    labeled = write(folder / "l.jsonl", samples[1:3])
    entries = [{"index": i, "row": {"reward": reward}} for i, reward in enumerate(rewards)]
    write(folder / "l.jsonl_temp" / "rank_0.json", entries[::2])
    write(folder / "l.jsonl_temp" / "rank_1.json", entries[1::2])
    record(folder, number, generated, labeled, keep)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_figures_are_those_of_the_samples(tmp_path: Path) -> None:
    (tmp_path / "seconds.log").write_text("0 sample 5\n1 sample 7\n0 label 2\n0 sample 4\n")
    iteration(tmp_path, 0)
    [found] = lines(tmp_path / "iterations.jsonl")
    assert found == {
        "iteration": 0, "samples": 4, "prompts": 2, "reward_mean": 1.0, "reward_std": pytest.approx(3.0),
        "best_of_n_mean": (4.0 - 2.0) / 2, "kept": 0.5, "kept_from_before": 0, "response_characters": 2.0,
        "empty": 0.25, "seconds/sample": 9.0, "seconds/label": 2.0,
    }  # fmt: skip
    kept = lines(tmp_path / "iterations" / "0.jsonl")
    assert [(row["reward"], row["kept"], row["id"]) for row in kept] == [
        (1.0, False, 1), (4.0, True, 1), (-2.0, True, 2), (None, False, 2),
    ]  # fmt: skip


def test_a_loop_whose_rows_have_other_fields_is_recorded_as_one_with_ours(tmp_path: Path) -> None:
    names = {"input": "text", "output": "answer", "reward": "score"}
    config = {"processor": "rest", "data": {f"{name}_key": own for name, own in names.items()}}
    for folder, renamed, said in ((tmp_path / "ours", {}, {"processor": "rest"}), (tmp_path / "own", names, config)):
        write(folder / "l.jsonl.meta.json", [{"config": said}])
        iteration(folder, 0, samples=[{renamed.get(name, name): v for name, v in row.items()} for row in SAMPLES])
    ours, own = (lines(tmp_path / name / "iterations" / "0.jsonl") for name in ("ours", "own"))
    assert own == [{names.get(name, name): value for name, value in row.items()} for row in ours]
    assert lines(tmp_path / "ours/iterations.jsonl") == lines(tmp_path / "own/iterations.jsonl")
    drawn, shown = (find_sets(tmp_path / name, 100).sets for name in ("ours", "own"))
    assert [set.columns for set in drawn] == [set.columns for set in shown]
    assert any(set.series == "iterations" for set in shown)


def test_samples_of_earlier_iterations_are_counted_apart(tmp_path: Path) -> None:
    """As many were trained on as were drawn, and two of the four are others."""
    older = [{"input": "r", "output": "d"}, {"input": "q", "output": "e"}]
    generated = write(tmp_path / "g.jsonl", SAMPLES)
    labeled = write(tmp_path / "l.jsonl", [*older, SAMPLES[1], SAMPLES[2]])
    (tmp_path / "l.jsonl.meta.json").write_text('{"config": {"processor": "rs"}}')
    write(
        tmp_path / "l.jsonl_temp" / "rank_0.json", [{"index": i, "row": {"reward": r}} for i, r in enumerate(REWARDS)]
    )
    record(tmp_path, 3, generated, labeled, 256)
    [found] = lines(tmp_path / "iterations.jsonl")
    assert (found["kept"], found["kept_from_before"]) == (0.5, 2)
    assert [row["kept"] for row in lines(tmp_path / "iterations" / "3.jsonl")] == [False, True, True, False]


def test_an_iteration_recorded_twice_stands_there_once_and_one_begun_anew_ends_those_after_it(tmp_path: Path) -> None:
    for number in (0, 1, 1, 2, 10, 1):
        (tmp_path / "iterations" / str(number)).mkdir(parents=True, exist_ok=True)
        iteration(tmp_path, number)
    assert sorted(path.name for path in (tmp_path / "iterations").iterdir()) == ["0", "0.jsonl", "1", "1.jsonl"]
    assert [row["iteration"] for row in lines(tmp_path / "iterations.jsonl")] == [0, 1]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("best_of_n_mean")] == [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize("keep", [0, 3])
def test_no_more_samples_are_kept_than_asked_for(tmp_path: Path, keep: int) -> None:
    iteration(tmp_path, 0, keep)
    path = tmp_path / "iterations" / "0.jsonl"
    assert (len(lines(path)) if path.exists() else 0) == keep


def test_how_an_iteration_was_made_outlives_what_it_was_made_of(tmp_path: Path) -> None:
    kept = {"sample.meta.json": "g.jsonl.meta.json", "label.meta.json": "l.jsonl.meta.json"}
    kept |= {name: f"iter_1/{name}" for name in ("run.json", "metrics.jsonl")}
    (tmp_path / "iter_1").mkdir()
    for name in list(kept.values())[:3]:  # of a training without a logger there are no metrics
        (tmp_path / name).write_text(json.dumps({"config": {"processor": "rs"}, "name": name}))
    iteration(tmp_path, 1)
    folder = tmp_path / "iterations" / "1"
    found = {path.name: json.loads(path.read_text())["name"] for path in folder.iterdir()}
    assert found == {name: source for name, source in kept.items() if name != "metrics.jsonl"}

    further = [f"improve_{step}/{name}" for step in (1, 2) for name in ("run.json", "metrics.jsonl")]
    for name in further:
        (tmp_path / "iter_1" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "iter_1" / name).write_text(name)
    iteration(tmp_path, 1)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.json*")} == {*found, *further}
    assert [(folder / name).read_text() for name in further] == further
    shutil.rmtree(tmp_path / "iter_1/improve_2")
    iteration(tmp_path, 1)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.json*")} == {*found, *further[:2]}


def test_without_any_reward_there_is_no_mean(tmp_path: Path) -> None:
    iteration(tmp_path, 0, rewards=[None] * 4)
    [found] = lines(tmp_path / "iterations.jsonl")
    assert (found["reward_mean"], found["best_of_n_mean"], found["prompts"]) == (None, None, 0)


def test_what_an_iteration_did_is_said_and_drawn_figure_by_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seconds.log").write_text("0 sample 5\n")
    iteration(tmp_path, 0)
    said = (
        "iteration 0: samples 4, prompts 2, reward_mean 1, reward_std 3, best_of_n_mean 1, kept 0.5, "
        "kept_from_before 0, response_characters 2, empty 0.25\n"
    )
    assert capsys.readouterr().out == said
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    figures = set(lines(tmp_path / "iterations.jsonl")[0]) - {"iteration"}
    assert set(events.Tags()["scalars"]) == figures


@pytest.mark.parametrize("missing", ["input", "output"])
def test_a_sample_without_a_text_is_named(tmp_path: Path, missing: str) -> None:
    iteration(tmp_path, 0)
    key = f"data.{missing}_key"
    for name in ("g.jsonl", "l.jsonl"):
        good = (tmp_path / name).read_text()
        write(tmp_path / name, [{key: value for key, value in SAMPLES[0].items() if key != missing}])
        with pytest.raises(DataError, match=rf"{name}:1: no field '{missing}' \({key}\)"):
            record(tmp_path, 1, tmp_path / "g.jsonl", tmp_path / "l.jsonl", 2)
        (tmp_path / name).write_text(good)


def test_the_command_records_what_its_options_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iteration(tmp_path, 0)
    options = ["--generated", str(tmp_path / "g.jsonl"), "--labeled", str(tmp_path / "l.jsonl"), "--iteration", "3"]
    monkeypatch.setattr("sys.argv", ["loop_record", "--result", str(tmp_path / "result"), *options])
    monkeypatch.setenv("SLURM_PROCID", "1")
    main()
    assert not (tmp_path / "result").exists(), "of the processes that srun starts one records"
    monkeypatch.setenv("SLURM_PROCID", "0")
    main()
    assert [row["iteration"] for row in lines(tmp_path / "result" / "iterations.jsonl")] == [3]
    shutil.rmtree(tmp_path / "result")
    monkeypatch.delenv("SLURM_PROCID")
    main()
    assert [row["iteration"] for row in lines(tmp_path / "result" / "iterations.jsonl")] == [3]
    assert len(lines(tmp_path / "result" / "iterations" / "3.jsonl")) == 4
    monkeypatch.setattr("sys.argv", ["loop_record", "--result", str(tmp_path / "result"), *options, "--keep", "1"])
    main()
    assert len(lines(tmp_path / "result" / "iterations" / "3.jsonl")) == 1


@pytest.mark.parametrize("left_out", ["--result", "--iteration", "--generated", "--labeled"])
def test_the_command_asks_for_what_it_needs(
    left_out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--result": "r", "--iteration": "1", "--generated": "g", "--labeled": "l"}
    words = [word for name, value in given.items() if name != left_out for word in (name, value)]
    monkeypatch.setattr("sys.argv", ["loop_record", *words])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.rstrip().endswith(f"required: {left_out}")
