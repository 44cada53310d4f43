"""A report holds what stages and loops left, of runs that go on too, and says what it could not read."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from nemo_aligner.errors import DataError
from nemo_aligner.records import Keys
from nemo_aligner.report.runs import Run, read_run
from nemo_aligner.report.samples import SampleSet, columns_of
from tests.results import evaluated, make_loop, make_reinforce, samples, write_json, write_rows


def read(folder: Path) -> Run:
    return read_run(folder, folder.name, limit=1000)


def named(run: Run) -> dict[tuple[str, str], SampleSet]:
    return {(own.series, own.name): own for own in run.sets}


def test_a_loop_has_its_iterations_and_its_evaluated_policies_in_order(tmp_path: Path) -> None:
    run = read(make_loop(tmp_path, iterations=11))
    assert [own.name for own in run.sets if own.series == "iterations of loop"] == [f"iteration {i}" for i in range(11)]
    assert [own.name for own in run.sets if own.series == "evaluation"] == [f"policy {i}" for i in range(12)]
    first = named(run)["iterations of loop", "iteration 0"]
    figures = first.figures()
    assert (figures["samples"], figures["prompts"], figures["kept"]) == (20, 5, 0.25)
    assert figures["mean"] == pytest.approx(sum(i / 10 + j for i in range(5) for j in range(4)) / 20)
    assert figures["best_of"][-1] == (4, pytest.approx(3.2))  # the mean over i of i/10 + 3
    [times] = run.times
    assert (times["labels"], times["stages"]["label"]) == (list(range(11)), [2.0] * 11)
    assert {table["title"] for table in run.tables} == {"evaluation.json", "loop/iterations.jsonl"}
    assert run.scalars["loop/iterations/3"].curves["train/loss"].values == [2.0, 1.0]
    assert {"title": "loop/iterations/2/sample", "values": {"seed": 2, "data.n": 4}} in run.configs
    assert not run.faults


def test_evaluated_policies_are_in_their_order_whatever_dots_their_names_have(tmp_path: Path) -> None:
    policies = ["m/v-3.2/", "m/v-3.1", "p.nemo"]
    for name in ("v-3.2", "v-3.1", "p"):
        write_rows(tmp_path / f"e.json.{name}.jsonl", samples(2, 2))
    write_json(tmp_path / "e.json", [evaluated(i, own) for i, own in enumerate(policies)])
    assert [own.name for own in read(tmp_path).sets] == ["v-3.2", "v-3.1", "p"]


def test_samples_of_an_evaluation_are_found_under_the_fields_that_it_was_given(tmp_path: Path) -> None:
    names = {"input": "text", "output": "answer", "reward": "score"}
    write_rows(tmp_path / "e.json.p.jsonl", [{names[k]: v for k, v in row.items()} for row in samples(2, 2)])
    write_json(tmp_path / "e.json", [evaluated(0, "p.nemo")])
    data = {f"{name}_key": own for name, own in names.items()}
    write_json(tmp_path / "e.json.meta.json", {"config": {"policy_files": ["p.nemo"], "data": data}})
    [found] = read(tmp_path).sets
    expected, _ = columns_of(samples(2, 2), Keys())
    assert found.columns == expected


def test_an_actor_has_its_validations_rollouts_functions_and_phases_and_keeps_its_secrets(tmp_path: Path) -> None:
    run = read(make_reinforce(tmp_path))
    found = named(run)
    validation = found["validation", "step 2"].figures()
    assert validation["functions"]["exact"]["mean"] == pytest.approx(validation["mean"] / 2)
    assert validation["kl"] == pytest.approx(0.5)
    assert found["rollouts", "step 4"].columns.kept == [True] * 12
    [times] = run.times
    assert times["stages"] == {"generate": [4.0, 2.0, pytest.approx(4 / 3), 1.0]}  # rollout_time holds it already
    [config] = run.configs
    assert config["values"] == {"model.seed": 7, "exp_manager.wandb_api_key": "(not shown)"}


def offline(folder: Path) -> list[dict]:
    """generated.jsonl and what a labeler that keeps the best has so far: rewards of all but the last row."""
    rows = [{name: row[name] for name in ("input", "output")} for row in samples(2, 2)]
    write_rows(folder / "generated.jsonl", rows)
    write_json(folder / "generated.jsonl.meta.json", {"config": {"data": {"n": 2}}})
    entries = [{"index": i, "row": {"reward": float(i), "parts": {"f": 2.0 * i}}} for i in range(3)]
    write_rows(folder / "filtered.jsonl_temp" / "rank_0.json", entries)
    return rows


def test_samples_get_the_rewards_that_a_labeler_has_given_so_far(tmp_path: Path) -> None:
    offline(tmp_path)
    [found] = read(tmp_path).sets
    assert (found.columns.reward, found.columns.functions) == ([0.0, 1.0, 2.0, None], {"f": [0.0, 2.0, 4.0, None]})
    assert not found.is_whole


def test_samples_whose_labeler_has_ended_say_which_were_kept(tmp_path: Path) -> None:
    rows = offline(tmp_path)
    write_rows(tmp_path / "filtered.jsonl", [rows[1], rows[3]])
    config = {"processor": "rs", "data": {"file_names": [str(tmp_path / "generated.jsonl")]}}
    write_json(tmp_path / "filtered.jsonl.meta.json", {"config": config, "counts": {"kept": 2}})
    run = read(tmp_path)
    [found] = run.sets
    assert (found.source, found.columns.kept, found.is_whole) == ("generated.jsonl", [False, True, False, True], True)
    assert {"title": "filtered.jsonl", "values": {"counts.kept": 2}} in run.provenance


def test_samples_that_lie_elsewhere_are_named_by_their_whole_path(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside.jsonl"
    rows = offline(folder)
    (folder / "generated.jsonl").rename(outside)
    (folder / "generated.jsonl.meta.json").unlink()
    write_rows(folder / "filtered.jsonl", [rows[1]])
    config = {"processor": "rs", "data": {"file_names": [str(outside)]}}
    write_json(folder / "filtered.jsonl.meta.json", {"config": config, "counts": {"kept": 1}})
    [found] = read(folder).sets
    assert (found.source, found.columns.kept) == (str(outside), [False, True, False, False])


def test_a_sampler_at_work_shows_the_rows_of_its_journal_up_to_a_torn_line(tmp_path: Path) -> None:
    journal = tmp_path / "out.jsonl_temp" / "rank_0.json"
    write_rows(journal, [{"index": i, "row": row} for i, row in reversed(list(enumerate(samples(2, 1))))])
    with journal.open("a") as stream:
        stream.write('{"index": 9, "row": {"inp')
    [found] = read(tmp_path).sets
    assert (found.columns.prompts[0], len(found.columns), found.is_whole) == ("prompt 0: the film was", 2, False)


def test_samples_that_a_loop_is_at_are_its_next_iteration(tmp_path: Path) -> None:
    make_loop(tmp_path, iterations=2)
    loop = tmp_path / "loop"
    (loop / "iter.log").write_text("2\n")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": "2026-01-01T00:00:00+00:00"}
    write_json(loop / "loop.lock", owner)
    offline(loop)
    run = read(tmp_path)
    found = named(run)["iterations of loop", "iteration 2"]
    assert (found.at, found.is_whole) == (2, False)
    assert run.writers == [f"loop/loop: process {os.getpid()} on {socket.gethostname()}, started {owner['started']}"]


def test_a_lock_whose_process_has_died_says_nothing(tmp_path: Path) -> None:
    make_loop(tmp_path)
    write_json(tmp_path / "loop" / "loop.lock", {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "then"})
    assert read(tmp_path).writers == []


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    make_loop(tmp_path)
    broken = tmp_path / "loop" / "iterations" / "1.jsonl"
    broken.write_text('{"input": "p", "output"\n')
    run = read(tmp_path)
    assert [fault.split(": ")[0] for fault in run.faults] == [f"{broken}:1"]
    assert ("iterations of loop", "iteration 2") in named(run)


def test_prompts_and_pairs_are_no_results(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"input": "p"}])
    write_rows(tmp_path / "sft.jsonl", [{"input": "p", "output": "o"}])
    with pytest.raises(DataError, match="holds no results"):
        read(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read(tmp_path / "absent")


def test_of_a_large_set_whole_prompts_are_taken(tmp_path: Path) -> None:
    columns, of = columns_of(samples(100, 4), Keys(), limit=100)
    assert (of, len(columns), len(columns.prompts)) == (400, 100, 25)
    assert all(columns.prompt.count(place) == 4 for place in range(25))
    assert [columns.prompts[place] for place in (0, 24)] == ["prompt 0: the film was", "prompt 96: the film was"]
    assert columns.reward[4:6] == [0.4, 1.4]


def test_a_conversation_is_shown_by_its_turns() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    columns, _ = columns_of([{"messages": turns, "output": "So.", "reward": 1, "id": {"a": 1}}], Keys())
    assert columns.prompts == ["system: Be brief.\n\nuser: Why?"]
    assert columns.others == {"id": [json.dumps({"a": 1})]}
