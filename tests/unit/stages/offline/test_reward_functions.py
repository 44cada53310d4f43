"""The labeler and the evaluation with reward functions: real worker processes, alone and beside a reward model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.offline import LabelerConfig
from nemo_aligner.errors import ConfigError, DataError, OutputError
from nemo_aligner.stages import run_control
from nemo_aligner.stages.offline import evaluation, reward_labeler
from nemo_aligner.stages.offline.data import open_rows
from nemo_aligner.stages.offline.loop_record import rewards_of
from nemo_aligner.stages.rewarders import all_but, check_fields, functions_of
from tests.fakes import EchoPolicy, OneProcess, on_ranks
from tests.unit.stages.offline.test_evaluation import config as evaluation_config
from tests.unit.stages.offline.test_reward_labeler import ByteSum

pytestmark = pytest.mark.processes

OWN = """
import os

def right(responses, answer):
    return [None if a is None else float(a == r) for r, a in zip(responses, answer)]

def length(responses):
    return [os._exit(1) if "!" in r else float(len(r)) for r in responses]
"""
ROWS = [
    {"input": f"q{i % 3}", "output": text, "answer": answer, "id": i}
    for i, (text, answer) in enumerate(
        [("a", "a"), ("bb", "b"), ("ccc", "ccc"), ("d!", "d!"), ("ee", None), ("", ""), ("g!", None)]
    )
]
RIGHT = [1.0, 0.0, 1.0, 1.0, None, 1.0, None]
LENGTH = [1.0, 2.0, 3.0, None, 2.0, 0.0, None]
REWARDS = [1 - 0.5, 0 - 1.0, 1 - 1.5, None, -1.0, 1.0, None]
"""right − 0.5 · length; nothing where length failed, length alone where right cannot tell"""


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for ranks here, and Python handles signals in the main thread alone."""
    monkeypatch.setattr(run_control.signal, "signal", lambda number, handler: None)


def config(folder: Path, **given: Any) -> LabelerConfig:
    (folder / "own.py").write_text(OWN)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cfg = LabelerConfig(output_file=str(folder / "out.jsonl"), **given)
    cfg.data.file_names, cfg.data.hf_dataset = [str(folder / "samples.jsonl")], False
    cfg.reward_function = {
        "right": f"{folder}/own.py:right",
        "length": {"function": f"{folder}/own.py:length", "weight": -0.5},
    }
    return cfg


def label(cfg: LabelerConfig, cluster: Any = None, model: ByteSum | None = None) -> None:
    rows = open_rows(cfg.data, {"input": "data.input_key", "output": "data.output_key"})
    with functions_of(cfg) as functions:
        check_fields(functions, rows, all_but("input", "output"))
        reward_labeler.label(cfg, rows, model, cluster or OneProcess(), functions)  # type: ignore[arg-type]


def written(cfg: LabelerConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(cfg.output_file).read_text().splitlines()]


def test_rows_carry_the_weighted_sum_and_the_reward_of_each_function(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cfg = config(tmp_path)
    label(cfg)
    assert written(cfg) == [
        {**row, "reward": reward, "reward_right": right, "reward_length": length}
        for row, reward, right, length in zip(ROWS, REWARDS, RIGHT, LENGTH, strict=True)
    ]
    assert f"{tmp_path}/samples.jsonl:4: reward function length ended its process (status 1)" in caplog.text
    counts = json.loads(Path(f"{cfg.output_file}.meta.json").read_text())["counts"]
    assert counts["reward_mean"] == pytest.approx(sum(r for r in REWARDS if r is not None) / 5)
    assert counts["rewards"]["length"] == {
        "mean": 1.6, "std": pytest.approx(1.14, abs=0.01), "cannot_tell": 0, "failed": 2,
    }  # fmt: skip
    assert (counts["rewards"]["right"]["cannot_tell"], counts["rewards"]["right"]["failed"]) == (2, 0)
    assert rewards_of(Path(cfg.output_file)) == {i: reward for i, reward in enumerate(REWARDS) if reward is not None}


def test_the_file_is_the_same_bytes_for_any_number_of_ranks_and_workers(tmp_path: Path) -> None:
    found = []
    for ranks, workers in ((1, 1), (2, 2), (3, 1)):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        cfg = config(folder, reward_workers=workers)
        on_ranks(ranks, lambda cluster, cfg=cfg: label(cfg, cluster))
        found.append(Path(cfg.output_file).read_bytes())
    assert found[0] == found[1] == found[2]


def test_other_weights_and_processors_score_nothing_again_and_another_function_is_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    label(cfg)
    journal = (tmp_path / "out.jsonl_temp" / "rank_0.json").read_bytes()
    cfg.reward_function["length"]["weight"] = 2.0
    cfg.processor, cfg.export_reward = "rs", True
    label(cfg)
    assert [(row["id"], row["reward"]) for row in written(cfg)] == [(0, 3.0), (1, 4.0), (2, 7.0)]
    assert (tmp_path / "out.jsonl_temp" / "rank_0.json").read_bytes() == journal
    (tmp_path / "own.py").write_text(f"{OWN}\n# changed\n")
    with pytest.raises(OutputError, match=r"holds progress of another run: reward_function was "):
        label(cfg)


@pytest.mark.parametrize(("processor", "ids"), [("rs", [0, 1, 5]), ("rest", [0, 5]), ("dt", [0, 1, 2, 4, 5])])
def test_a_row_without_a_reward_is_never_chosen(tmp_path: Path, processor: str, ids: list[int]) -> None:
    cfg = config(tmp_path, processor=processor, threshold=0.0)
    label(cfg)
    assert [row["id"] for row in written(cfg)] == ids
    assert all("reward" not in row and "reward_right" not in row for row in written(cfg))


def test_a_reward_model_is_one_source_more_and_its_nan_is_a_failure(tmp_path: Path) -> None:
    cfg = config(tmp_path, gpt_model_file="rm.nemo")
    cfg.reward_function = {"right": f"{tmp_path}/own.py:right", "reward_model": 0.01}
    cfg.data.prompt_template = "{input}\0"
    label(cfg, model=ByteSum())
    assert {row["reward"] for row in written(cfg)} == {None}
    cfg.data.prompt_template, cfg.output_file = None, str(tmp_path / "other.jsonl")
    label(cfg, model=ByteSum())
    for row, right in zip(written(cfg), RIGHT, strict=True):
        score = float(sum((row["input"] + row["output"]).encode()))
        assert row["reward_model"] == score
        assert row["reward"] == pytest.approx(0.01 * score + (right or 0.0))


def test_a_row_that_lacks_what_a_function_needs_is_named_before_anything_is_judged(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    lines = [json.dumps({"input": "q", "output": "a", "answer": "a"}), json.dumps({"input": "q", "output": "a"})]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"samples.jsonl:2: no field 'answer', which reward function right needs"):
        label(cfg)
    assert not (tmp_path / "out.jsonl_temp").exists()


def test_fields_of_parameters_that_are_not_there_are_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.reward_function["length"]["fields"] = {"unit": "id"}
    with pytest.raises(ConfigError, match=r"^reward_function.length.fields.unit: .*own.py:length has no parameter"):
        label(cfg)


def test_the_evaluation_tells_each_function_apart(tmp_path: Path) -> None:
    cfg: EvaluationConfig = evaluation_config(tmp_path)
    config(tmp_path)
    cfg.reward_model_file = None
    cfg.reward_function = {"length": f"{tmp_path}/own.py:length", "id": f"{tmp_path}/own.py:of_id"}
    (tmp_path / "own.py").write_text(f"{OWN}\ndef of_id(responses, id):\n    return [i % 2 or None for i in id]\n")
    rows = open_rows(cfg.data, {"input": "data.input_key"})
    cluster: Any = OneProcess()
    drawn = evaluation.draw(cfg, rows, EchoPolicy(), cluster, "one.nemo")  # type: ignore[arg-type]
    with functions_of(cfg) as functions:
        judged = evaluation.score(cfg, rows, drawn, None, cluster, functions)
    figures = evaluation.report(cfg, "/models/one.nemo", rows, drawn, judged, None, cluster).figures
    assert (figures["reward_length_mean"], figures["reward_id_mean"], figures["unknown"]) == (5.0, 1.0, 0.0)
    assert figures["reward_mean"] == pytest.approx((6 * 5 + 4 * 6) / 10)
    samples = [json.loads(line) for line in (tmp_path / "figures.json.one.jsonl").read_text().splitlines()]
    assert [(s["reward_length"], s["reward_id"]) for s in samples] == [
        (5.0, 1.0 if i % 2 else None) for i in range(5) for _ in "ab"
    ]
