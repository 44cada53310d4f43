"""The labeler: every row its own reward, on any number of ranks; another reward model begins anew."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.offline import LabelerConfig
from nemo_aligner.config.schema import RewardStandardization
from nemo_aligner.errors import DataError, OutputError, StoppedEarly
from nemo_aligner.event_file import shown_before
from nemo_aligner.stages import run_control
from nemo_aligner.stages.offline.data import open_rows, tell_empty
from nemo_aligner.stages.offline.reward_labeler import label, standardize
from tests.fakes import EOS, ByteTokenizer, OneProcess, on_ranks


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for ranks here, and Python handles signals in the main thread alone."""
    monkeypatch.setattr(run_control.signal, "signal", lambda number, handler: None)


class ByteSum:
    """The reward of a text is the sum of its tokens; 0 in a text makes it NaN."""

    tokenizer, max_sequence_length, append_eod = ByteTokenizer(), 64, False

    def __init__(self, archive: str = "a" * 64, stored: tuple[float, float] | None = None) -> None:
        self.archive, self.stored_standardization = archive, stored
        self.scored: list[list[list[int]]] = []
        self.micro_batch_sizes: set[int] = set()

    def archive_hash(self) -> str:
        return self.archive

    def score(self, rows: Sequence[list[int]], micro_batch_size: int) -> list[list[float]]:
        self.scored.append(list(rows))
        self.micro_batch_sizes.add(micro_batch_size)
        return [[math.nan if 0 in row else float(sum(row)), -1.0] for row in rows]


def config(folder: Path, rows: int = 7, **data: Any) -> LabelerConfig:
    samples = folder / "samples.jsonl"
    if not samples.exists():
        lines = [{"input": f"q{i % 3}", "output": "x" * i, "id": i} for i in range(rows)]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = LabelerConfig(gpt_model_file="rm.nemo", output_file=str(folder / "out.jsonl"))
    cfg.data.file_names, cfg.data.hf_dataset = [str(samples)], False
    for name, value in data.items():
        setattr(cfg.data, name, value)
    return cfg


def run(cfg: LabelerConfig, cluster: Any = None, model: ByteSum | None = None) -> ByteSum:
    model = model or ByteSum()
    rows = open_rows(cfg.data, {"input": "data.input_key", "output": "data.output_key"})
    label(cfg, rows, model, cluster or OneProcess())  # type: ignore[arg-type]
    return model


def written(cfg: LabelerConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(cfg.output_file).read_text().splitlines()]


def reward_of(i: int, extra: int = 0) -> float:
    return float(sum(f"q{i % 3}".encode()) + i * ord("x") + extra)


def test_loggers_are_told_figures_and_one_row_of_each_prompt_with_its_raw_reward(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.processor, cfg.exp_manager.create_tensorboard_logger = "rs", True
    cfg.reward_standardization.enable = True
    run(cfg)
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl_log/metrics.jsonl").read_text().splitlines()]
    rewards = [reward_of(i) for i in range(7)]
    assert (row["labeler/rows"], row["labeler/kept"]) == (7, 3)
    assert row["labeler/reward_mean"] == pytest.approx(sum(rewards) / 7)
    told = shown_before(tmp_path / "out.jsonl_log").texts[0, "table/labeler"]
    assert re.findall(r"reward (\d+)", told) == [f"{reward:.4g}" for reward in rewards[:3]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("interval", [None, 1])
def test_every_row_gets_its_own_reward_in_the_order_of_the_input(
    tmp_path: Path, ranks: int, interval: int | None
) -> None:
    cfg = config(tmp_path)
    cfg.checkpoint_interval = interval
    models = on_ranks(ranks, lambda cluster: run(cfg, cluster))
    assert written(cfg) == [
        {"input": f"q{i % 3}", "output": "x" * i, "id": i, "reward": reward_of(i)} for i in range(7)
    ]
    assert sum(len(part) for model in models for part in model.scored) == 7, "none is scored twice"
    meta = json.loads(Path(f"{cfg.output_file}.meta.json").read_text())
    assert meta["archive_sha256"] == "a" * 64
    assert list(meta["inputs_sha256"]) == cfg.data.file_names
    assert meta["config"]["data"]["micro_batch_size"] == cfg.data.micro_batch_size
    counts = meta["counts"]
    rewards = [reward_of(i) for i in range(7)]
    mean = sum(rewards) / 7
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 6)
    assert counts == pytest.approx({"rows": 7, "kept": 7, "reward_mean": mean, "reward_std": std})


def test_a_window_is_as_many_micro_batches_as_the_checkpoint_interval_says(tmp_path: Path) -> None:
    cfg = config(tmp_path, micro_batch_size=2)
    cfg.checkpoint_interval = 2
    model = run(cfg)
    assert [len(part) for part in model.scored] == [4, 3]
    assert model.micro_batch_sizes == {2}


def test_a_run_that_is_stopped_keeps_its_rewards_and_goes_on_with_the_rest(tmp_path: Path) -> None:
    cfg, cluster = config(tmp_path, micro_batch_size=3), OneProcess()
    cfg.checkpoint_interval = 1
    cluster.any = lambda flag: True  # type: ignore[method-assign]
    with pytest.raises(StoppedEarly, match=r"progress is in .*out.jsonl_temp"):
        run(cfg, cluster)
    assert not Path(cfg.output_file).exists()
    models = on_ranks(2, lambda cluster: run(cfg, cluster))
    assert sum(len(part) for model in models for part in model.scored) == 4
    assert [row["reward"] for row in written(cfg)] == [reward_of(i) for i in range(7)]


def _data(name: str, value: Any) -> Callable[[LabelerConfig], None]:
    return lambda cfg: setattr(cfg.data, name, value)


def _other_rows(cfg: LabelerConfig) -> None:
    Path(cfg.data.file_names[0]).write_text('{"input": "another", "output": "one", "answer": ""}\n')


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda cfg: setattr(cfg.trainer, "precision", "32"), "trainer.precision"),
        (_other_rows, "data"),
        (_data("add_eos", True), "data.add_eos"),
        (_data("add_bos", True), "data.add_bos"),
        (_data("max_seq_length", 9), "data.max_seq_length"),
        (_data("prompt_template", "Q: {input}"), "data.prompt_template"),
        (_data("num_samples", 4), "data.num_samples"),
        (_data("concat_sampling_probabilities", [3.0]), "data.concat_sampling_probabilities"),
        (_data("sample_split_size", 3), "data.sample_split"),
    ],
)
def test_what_decides_the_rewards_may_not_change_in_an_old_journal(
    tmp_path: Path, change: Callable[[LabelerConfig], None], named: str
) -> None:
    run(config(tmp_path))
    other = config(tmp_path)
    change(other)
    with pytest.raises(OutputError, match=rf"holds progress of another run: {named} was "):
        run(other)


@pytest.mark.parametrize(("input_key", "output_key"), [("output", "output"), ("input", "input")])
def test_other_fields_may_not_be_scored_in_an_old_journal(tmp_path: Path, input_key: str, output_key: str) -> None:
    run(config(tmp_path))
    with pytest.raises(OutputError, match=r"data\.(in|out)put_key was"):
        run(config(tmp_path, input_key=input_key, output_key=output_key))


def test_another_reward_model_does_not_go_on_in_an_old_journal(tmp_path: Path) -> None:
    run(config(tmp_path))
    with pytest.raises(OutputError, match=r"gpt_model_file was 'aaa.*', now 'bbb"):
        run(config(tmp_path), model=ByteSum("b" * 64))
    ends = ByteSum()
    ends.append_eod = True
    with pytest.raises(OutputError, match="add_eos was False, now True"):
        run(config(tmp_path), model=ends)


def test_another_processor_scores_nothing_again(tmp_path: Path) -> None:
    run(config(tmp_path))
    cfg = config(tmp_path)
    cfg.processor, cfg.export_reward = "rs", True
    assert run(cfg).scored == []
    # the longest answer to each of three inputs
    assert sorted(row["id"] for row in written(cfg)) == [4, 5, 6]
    assert all(row["reward"] == reward_of(row["id"]) for row in written(cfg))
    cfg.export_reward = False
    run(cfg)
    assert all("reward" not in row for row in written(cfg))


def test_the_threshold_is_in_the_units_of_the_standardised_rewards(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.processor, cfg.threshold, cfg.export_reward = "rest", 1.0, True
    cfg.reward_standardization = RewardStandardization(enable=True, mean=reward_of(3), std=240.0)
    run(cfg)
    expected = {i: (reward_of(i) - reward_of(3)) / 240.0 for i in range(7)}
    assert {row["id"]: row["reward"] for row in written(cfg)} == pytest.approx(
        {i: r for i, r in expected.items() if r > 1.0}
    )


@pytest.mark.parametrize(
    ("given", "stored", "expected"),
    [
        (RewardStandardization(), (1.0, 2.0), [1.0, 3.0, 5.0]),
        (RewardStandardization(enable=True), (1.0, 2.0), [0.0, 1.0, 2.0]),
        (RewardStandardization(enable=True, mean=5.0, std=4.0), (1.0, 2.0), [-1.0, -0.5, 0.0]),
        (RewardStandardization(enable=True), None, [-1.0, 0.0, 1.0]),
    ],
)
def test_rewards_are_standardised_by_what_is_given_then_what_is_stored_then_their_own(
    given: RewardStandardization, stored: tuple[float, float] | None, expected: list[float]
) -> None:
    cfg = LabelerConfig(gpt_model_file="rm", output_file="o", reward_standardization=given)
    assert standardize(cfg, [1.0, 3.0, 5.0], stored) == pytest.approx(expected)


def test_what_the_reward_model_stores_standardises_what_is_written(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.reward_standardization = RewardStandardization(enable=True)
    run(cfg, model=ByteSum(stored=(100.0, 4.0)))
    assert [row["reward"] for row in written(cfg)] == [(reward_of(i) - 100.0) / 4.0 for i in range(7)]


def test_a_reward_that_is_no_number_is_named_by_its_line_and_outlives_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path)
    with Path(cfg.data.file_names[0]).open("a") as stream:
        stream.write('\n{"input": "q0", "output": "\\u0000"}\n')
    run(cfg)
    assert f"{cfg.data.file_names[0]}:9: the reward is NaN" in caplog.text
    assert written(cfg)[7]["reward"] is None
    assert [row["reward"] for row in written(cfg)[:7]] == [reward_of(i) for i in range(7)]


def test_texts_end_in_eos_as_the_model_was_trained_unless_told(tmp_path: Path) -> None:
    model = ByteSum()
    model.append_eod = True
    run(config(tmp_path), model=model)
    assert all(row[-1] == EOS for part in model.scored for row in part)


def test_a_chunk_of_an_online_loop_is_labeled_alone(tmp_path: Path) -> None:
    cfg = config(tmp_path, sample_split_size=3, sample_split_iter=2)
    run(cfg)
    assert [row["id"] for row in written(cfg)] == [6, 0, 1]
    assert [row["reward"] for row in written(cfg)] == [reward_of(i) for i in (6, 0, 1)]


def test_empty_responses_are_counted_and_left_out_only_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path)
    rows = [
        {"input": "q", "output": ""},
        {"input": "q", "output": "a"},
        *({"input": f"p{i}", "output": "x"} for i in range(8)),
    ]
    Path(cfg.data.file_names[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg.processor = "rs"

    class Terse(ByteSum):
        def score(self, rows: Sequence[list[int]], micro_batch_size: int) -> list[list[float]]:
            return [[-float(len(row))] for row in rows]

    run(cfg, model=Terse())
    assert written(cfg)[0]["output"] == "", "its reward is the best"
    assert "1 of 10 responses are empty (10 %): was a chat model sampled without its chat template" in caplog.text
    assert "1 of the 9 rows kept have an empty response; skip_empty=True leaves them out" in caplog.text
    caplog.clear()
    cfg.skip_empty = True
    run(cfg, model=Terse())
    assert written(cfg)[0]["output"] == "a"
    assert "rows kept have an empty response" not in caplog.text


def test_few_empty_responses_are_no_sign_of_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tell_empty(1, 11)
    assert caplog.text == ""


def test_nothing_but_empty_responses_is_said_so(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    Path(cfg.data.file_names[0]).write_text('{"input": "q", "output": ""}\n')
    cfg.skip_empty = True
    with pytest.raises(DataError, match="skip_empty=True leaves no sample: every response is empty"):
        run(cfg)


def test_a_rerun_of_what_is_done_says_that_nothing_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(tmp_path)
    said = "all 7 rows are scored already"
    with caplog.at_level(logging.INFO):
        run(cfg)
        assert said not in caplog.text
        run(cfg)
        assert said in caplog.text


def test_conversations_are_judged_by_their_turns_with_the_answer_inside_or_beside_them(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "q"}]
    rows = [
        {"messages": asked, "output": "ab", "id": 1},
        {"messages": [*asked, {"role": "assistant", "content": "abc"}], "id": 2},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    cfg = config(tmp_path, chat_template=template)
    cfg.processor, cfg.export_reward = "rs", True
    model = run(cfg)
    assert [bytes(row) for part in model.scored for row in part] == [b"q;ab;", b"q;abc;"]
    assert written(cfg) == [{**rows[1], "reward": float(sum(b"q;abc;"))}], "both answer the same prompt"
