"""Earlier iterations' best samples compete with those of this one, by the rewards that they were given then."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.errors import AlignerError
from nemo_aligner.stages import run_control
from nemo_aligner.stages.offline.best_so_far import check_best_so_far
from tests.unit.stages.offline.test_reward_labeler import ByteSum, config, run, written


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_control.signal, "signal", lambda number, handler: None)


def iteration(folder: Path, texts: dict[str, list[str]], before: str | None = None) -> Any:
    """Label `texts`, responses by prompt, by the sum of their bytes."""
    folder.mkdir()
    rows = [{"input": p, "output": r, "id": f"{folder.name} {r}"} for p, responses in texts.items() for r in responses]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(folder)
    cfg.processor, cfg.export_reward, cfg.best_so_far_file = "rs", True, before
    return cfg


FIRST = {"p": ["a", "c"], "q": ["b", "a"], "r": ["z"]}
SECOND = {"q": ["a", "c"], "p": ["b", "a"], "s": ["d"], "r": ["z"]}


def test_each_prompt_seen_so_far_keeps_the_best_of_all_its_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = iteration(tmp_path / "1", FIRST)
    run(first)
    second = iteration(tmp_path / "2", SECOND, first.output_file)
    model = run(second)
    assert [row["id"] for row in written(second)] == ["1 c", "2 c", "1 z", "2 d"], "a tie goes to the earlier one"
    assert sum(map(len, model.scored)) == 6, "no earlier sample is scored again"
    assert "2 of the 4 rows kept are those of" in caplog.text
    meta = json.loads(Path(f"{second.output_file}.meta.json").read_text())
    assert meta["counts"]["kept_from_before"] == 2
    third = iteration(tmp_path / "3", {"t": ["x"]}, second.output_file)
    run(third)
    assert [row["id"] for row in written(third)] == ["1 c", "2 c", "1 z", "2 d", "3 x"]
    rewards = {row["input"]: row["reward"] for row in written(third)}
    assert rewards == {p: float(sum(f"{p}{r}".encode())) for p, r in zip("pqrst", "cczdx", strict=True)}


def test_without_it_the_samples_of_this_iteration_alone_are_chosen_from(tmp_path: Path) -> None:
    run(iteration(tmp_path / "1", FIRST))
    second = iteration(tmp_path / "2", SECOND)
    run(second)
    assert [row["id"] for row in written(second)] == ["2 c", "2 b", "2 d", "2 z"]
    assert "kept_from_before" not in json.loads(Path(f"{second.output_file}.meta.json").read_text())["counts"]


def test_rewards_of_another_reward_model_are_no_match(tmp_path: Path) -> None:
    first = iteration(tmp_path / "1", FIRST)
    run(first, model=ByteSum("b" * 64))
    second = iteration(tmp_path / "2", SECOND, first.output_file)
    with pytest.raises(AlignerError, match=r"1/out.jsonl: its rewards are those of another reward model"):
        run(second)
    assert not Path(second.output_file).exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reward": None}, r"out.jsonl:1: field 'reward' \(data.reward_key\) is no number; the labeler writes it with"),
        ({"reward": "high"}, r"out.jsonl:1: field 'reward' \(data.reward_key\) is no number"),
        ({"output": 3}, r"out.jsonl:1: field 'output' is int, a string is needed"),
    ],
)
def test_a_row_that_cannot_compete_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    first = iteration(tmp_path / "1", FIRST)
    run(first)
    rows = written(first)
    Path(first.output_file).write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))
    with pytest.raises(AlignerError, match=says):
        run(iteration(tmp_path / "2", SECOND, first.output_file))


def test_nobody_knows_whose_rewards_lie_there_without_a_word_beside_them(tmp_path: Path) -> None:
    first = iteration(tmp_path / "1", FIRST)
    run(first)
    meta = Path(f"{first.output_file}.meta.json")
    said = json.loads(meta.read_text())
    said["config"]["reward_function"] = "m:f"
    meta.write_text(json.dumps(said))
    with pytest.raises(AlignerError, match=r"its rewards are those of reward_function=m:f, this run has None"):
        run(iteration(tmp_path / "2", SECOND, first.output_file))
    for text in ("{", "[]", "{}"):
        meta.write_text(text)
        with pytest.raises(AlignerError, match=r"out.jsonl.meta.json should lie beside it"):
            run(iteration(tmp_path / f"with {text}", SECOND, first.output_file))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("processor", "rest", "best_so_far_file: it is for processor=rs, not rest"),
        ("processor", None, "best_so_far_file: it is for processor=rs, not null"),
        (
            "output_file",
            "./before.jsonl",
            r"output_file=\./before\.jsonl is also an input, before\.jsonl \(best_so_far_file\)",
        ),
        ("standardization", True, "reward_standardization.enable: rewards of several iterations are compared as"),
    ],
)
def test_keys_that_do_not_go_with_it_are_refused(tmp_path: Path, key: str, value: Any, says: str) -> None:
    cfg = iteration(tmp_path / "1", FIRST, "before.jsonl")
    check_best_so_far(cfg)
    if key == "standardization":
        cfg.reward_standardization.enable = value
    else:
        setattr(cfg, key, value)
    with pytest.raises(AlignerError, match=f"^{says}"):
        check_best_so_far(cfg)
