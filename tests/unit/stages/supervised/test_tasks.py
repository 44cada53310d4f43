"""From files and config to what is trained on: SFT's rows, plain and chat, and a reward model's pairs, blended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.supervised import RMConfig, SFTConfig, SFTDatasetConfig
from nemo_aligner.engine.interfaces import StepMetrics
from nemo_aligner.errors import ConfigError, DataError, TrainingError
from nemo_aligner.stages.batches import BatchPlan
from nemo_aligner.stages.supervised import reward_training, sft
from nemo_aligner.stages.supervised.loop import ranking_objective, sft_objective
from tests.fakes import EOS, ByteTokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Model:
    max_sequence_length = 40

    def __init__(self) -> None:
        self.tokenizer = ByteTokenizer()

    def keep_chat_template(self, template: str) -> None:
        self.tokenizer.chat_template = template  # type: ignore[assignment]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft_config(folder: Path, **more: Any) -> SFTConfig:
    cfg = SFTConfig()
    train = cfg.model.data.train_ds
    train.file_path = write(folder / "t", [{"input": f"q{i}", "output": f"a{i}"} for i in range(5)])
    train.global_batch_size, train.micro_batch_size, train.shuffle, train.drop_last = 2, 3, False, True
    cfg.model.seed, cfg.trainer.sft.gradient_clip_val, cfg.model.micro_batch_tokens = 77, 0.5, 99
    for name, value in more.items():
        setattr(train, name, value)
    return cfg


def sft_task(cfg: SFTConfig) -> Any:
    train, validation = cfg.model.data.train_ds, cfg.model.data.validation_ds
    held_out = None if validation is None else sft.open_rows(cfg, validation, "model.data.validation_ds")
    return sft.make_task(cfg, Model(), sft.open_rows(cfg, train, "model.data.train_ds"), held_out)  # type: ignore[arg-type]


def test_sft_trains_on_the_answers_in_the_batches_of_its_config(tmp_path: Path) -> None:
    cfg = sft_config(tmp_path)
    held_out = write(tmp_path / "v", [{"input": "x", "output": "y"}])
    cfg.model.data.validation_ds = SFTDatasetConfig(
        file_path=held_out, global_batch_size=7, micro_batch_size=6, shuffle=False, drop_last=True
    )
    task = sft_task(cfg)
    assert task.validation_plan == BatchPlan(1, 7, 77, shuffle=False, drop_last=True)
    assert task.validation_micro_batch_size == 6
    assert [example.rows for example in task.train] == [([*f"q{i} a{i}".encode(), EOS],) for i in range(5)]
    assert task.train[0].masks == ([0, 0, 1, 1, 1, 1],)
    assert [example.rows for example in task.validation] == [([*b"x y", EOS],)]
    plan = task.plan
    assert (plan.count, plan.global_batch_size, plan.seed, plan.shuffle, plan.drop_last) == (5, 2, 77, False, True)
    assert (task.micro_batch_size, task.loop, task.objective) == (3, cfg.trainer.sft, sft_objective)
    assert task.micro_batch_tokens == 99
    assert task.settings["gradient_clip_val"] == 0.5
    assert task.settings["model.optim.lr"] == cfg.model.optim.lr
    assert sft_task(sft_config(tmp_path)).validation == []


def test_without_answer_only_loss_the_prompt_is_a_target_too(tmp_path: Path) -> None:
    cfg = sft_config(tmp_path)
    cfg.model.answer_only_loss = False
    assert all(mask == [1] * len(mask) for example in sft_task(cfg).train for mask in example.masks)


def test_a_chat_is_rendered_by_the_template_given_before_the_archives_and_only_answers_are_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    cfg = sft_config(tmp_path, file_path=write(tmp_path / "c", [{"messages": said}]))
    cfg.model.data.chat = True
    with pytest.raises(ConfigError, match=r"model\.data\.chat_template: the archive's tokenizer has no chat template"):
        sft_task(cfg)
    cfg.model.data.chat_template = TEMPLATE
    [example] = sft_task(cfg).train
    text = bytes(token for token in example.rows[0] if token < 256)
    trained = bytes(t for t, on in zip(example.rows[0], example.masks[0], strict=True) if on and t < 256)
    assert text.startswith(b"<user>hi")
    assert b"<assistant>yo" in text
    assert trained.startswith(b"yo")
    assert b"hi" not in trained
    monkeypatch.setattr(ByteTokenizer, "chat_template", TEMPLATE.replace("<", "["))
    cfg.model.data.chat_template = None
    assert sft_task(cfg).train[0].rows[0][:6] == list(b"[user>")


def test_what_no_row_is_left_of_is_named(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi" * 40}, {"role": "assistant", "content": "yo"}]
    cfg = sft_config(tmp_path, file_path=write(tmp_path / "c", [{"messages": said}]))
    cfg.model.data.chat, cfg.model.data.chat_template = True, TEMPLATE
    with pytest.raises(TrainingError, match="no row is left"):
        sft_task(cfg)


def pairs(name: str, count: int) -> list[dict[str, str]]:
    return [{"text": f"{name}{i}{side}"} for i in range(count) for side in "+-"]


def rm_config(**prefix: Any) -> RMConfig:
    cfg = RMConfig()
    cfg.model.data.data_prefix = prefix
    cfg.model.global_batch_size, cfg.model.micro_batch_size, cfg.model.seed = 3, 2, 77
    cfg.trainer.rm.gradient_clip_val, cfg.model.micro_batch_tokens = 0.5, 99
    return cfg


def names(found: reward_training.Pairs) -> list[str]:
    for chosen, rejected in found:
        assert chosen["text"][:-1] == rejected["text"][:-1]
        assert (chosen["text"][-1], rejected["text"][-1]) == ("+", "-")
    return [chosen["text"][:-1] for chosen, _ in found]


def test_one_file_is_taken_in_its_order_and_a_split_that_is_not_given_is_empty(tmp_path: Path) -> None:
    cfg = rm_config(train=[write(tmp_path / "a", pairs("a", 4))])
    assert names(reward_training.open_pairs(cfg, "train")) == ["a0", "a1", "a2", "a3"]
    assert reward_training.open_pairs(cfg, "validation") == []


def test_a_blend_gives_each_file_its_share_of_pairs_and_never_parts_a_pair(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", pairs("a", 3)), write(tmp_path / "b", pairs("b", 9))
    found = names(reward_training.open_pairs(rm_config(train=[0.75, a, 0.25, b]), "train"))
    assert len(found) == 12, "as many as there are in all files"
    assert [name for name in found if name[0] == "a"] == ["a0", "a1", "a2"] * 3
    assert [name for name in found if name[0] == "b"] == ["b0", "b1", "b2"]


def test_a_reward_model_trains_on_pairs_with_eos_as_its_archive_will_say(tmp_path: Path) -> None:
    cfg = rm_config(train=[write(tmp_path / "a", pairs("a", 4))])
    cfg.model.data.append_eod, cfg.model.data.shuffle = True, False
    splits = {split: reward_training.open_pairs(cfg, split) for split in ("train", "validation")}
    task = reward_training.make_task(cfg, Model(), splits)  # type: ignore[arg-type]
    assert [example.rows for example in task.train] == [
        ([*f"a{i}+".encode(), EOS], [*f"a{i}-".encode(), EOS]) for i in range(4)
    ]
    plan = task.plan
    assert (plan.count, plan.global_batch_size, plan.seed, plan.shuffle) == (4, 3, 77, False)
    assert (task.micro_batch_size, task.loop, task.objective) == (2, cfg.trainer.rm, ranking_objective)
    assert task.micro_batch_tokens == 99
    assert task.settings["gradient_clip_val"] == 0.5
    terms = {"accuracy": 1.0, "rewards_all_mean": 0.0, "rewards_all_square": 1.0}
    found = task.archive_notes(StepMetrics(0.0, 0.0, 0.0, terms), 4, True)
    assert (found["append_eod"], found["reward_model_type"]) == (True, "binary_ranking")


@pytest.mark.parametrize(("limit", "left"), [(3, 2), (2, 0)])
def test_pairs_longer_than_the_limit_are_left_out_together(tmp_path: Path, limit: int, left: int) -> None:
    rows = [*pairs("a", 2), {"text": "long+"}, {"text": "l-"}]
    cfg = rm_config(train=[write(tmp_path / "a", rows)])
    cfg.model.data.seq_length = limit
    splits = {"train": reward_training.open_pairs(cfg, "train"), "validation": []}
    if not left:
        with pytest.raises(TrainingError, match=r"model\.data\.data_prefix\.train: no row is left"):
            reward_training.make_task(cfg, Model(), splits)  # type: ignore[arg-type]
        return
    assert len(reward_training.make_task(cfg, Model(), splits).train) == left  # type: ignore[arg-type]


def test_validation_of_which_nothing_can_be_used_is_said_by_its_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = sft_config(tmp_path)
    cfg.model.data.validation_ds = SFTDatasetConfig(file_path=write(tmp_path / "v", [{"input": "x", "output": ""}] * 2))
    assert sft_task(cfg).validation == []
    assert "model.data.validation_ds.file_path: none of the 2 given can be used" in caplog.text
    caplog.clear()
    long = write(tmp_path / "long", [{"text": "x" * 99}, {"text": "y" * 99}] * 3)
    short = write(tmp_path / "short", [{"text": "good"}, {"text": "bad"}])
    rm = RMConfig()
    rm.model.data.data_prefix = {"train": [short], "validation": [long]}
    pairs = {split: reward_training.open_pairs(rm, split) for split in ("train", "validation")}
    assert reward_training.make_task(rm, Model(), pairs).validation == []  # type: ignore[arg-type]
    assert "validation: 3 of 3 pairs left out" in caplog.text
    assert (
        "model.data.data_prefix.validation: none of the 3 given can be used, so there is no validation" in caplog.text
    )


def test_rows_of_conversations_where_texts_are_wanted_are_told_of_the_key(tmp_path: Path) -> None:
    cfg = sft_config(tmp_path, file_path=write(tmp_path / "c", [{"messages": []}]))
    with pytest.raises(
        DataError, match=r"c:1: no field 'input' .*; rows of conversations want model\.data\.chat=True$"
    ):
        sft.open_rows(cfg, cfg.model.data.train_ds, "model.data.train_ds")
    cfg = sft_config(tmp_path, file_path=write(tmp_path / "d", [{"text": "x"}]))
    said = r"d:1: no field 'input' \(model\.data\.train_ds\.prompt_template\); the row has 'text'$"
    with pytest.raises(DataError, match=said):
        sft.open_rows(cfg, cfg.model.data.train_ds, "model.data.train_ds")
