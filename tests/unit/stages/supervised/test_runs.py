"""Whole supervised runs on a small real model: figures and weights are those of plain torch, and faults come first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_aligner import loggers
from nemo_aligner.config.cut import Sizes
from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig, SFTDatasetConfig
from nemo_aligner.engine import policy, reward_model
from nemo_aligner.engine.checkpoints import resident
from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture
from nemo_aligner.errors import DataError
from nemo_aligner.stages.supervised import reward_training, sft
from tests.fakes import RecordingLogger
from tests.unit.stages.conftest import Archives
from tests.unit.stages.plain import Plain, logged, logs_to, opened, write_rows
from tests.unit.stages.refusals import check_other_runs_refused, check_refused

OPTIM = OptimConfig(
    name="adamw", lr=4e-3, weight_decay=0.0, betas=[0.9, 0.95], eps=1e-3, sched={"name": "WarmupAnnealing"}
)
QUESTIONS = [{"input": f"q{i}", "output": "yes" * (1 + i % 3)} for i in range(5)]
HELD_OUT = [{"input": f"h{i}", "output": f"no{i}"} for i in range(3)]
PAIRS = [{"text": f"{word} film {i}"} for i in range(5) for word in ("good", "bad")]
HELD_OUT_PAIRS = [{"text": f"{word} play {i}"} for i in range(3) for word in ("fine", "poor")]
CALLBACK = "exp_manager.checkpoint_callback_params"


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> RecordingLogger:
    found = RecordingLogger()
    monkeypatch.setitem(loggers._STARTED, "dllogger", lambda *args: (found, None))
    return found


def in_small(cfg: Any, stage: str, folder: Path, archive: Path) -> None:
    """Two epochs of `archive` on a CPU, logged in `folder`."""
    cfg.trainer.accelerator, cfg.trainer.precision = "cpu", "32"
    loop = getattr(cfg.trainer, stage)
    loop.max_epochs, loop.gradient_clip_val, loop.save_interval = 2, 0.5, 0
    logs_to(cfg.exp_manager, folder / "log")
    cfg.model.restore_from_path, cfg.model.optim, cfg.model.seed = str(archive), replace(OPTIM), 77


def sft_config(folder: Path, archives: Archives) -> SFTConfig:
    cfg = SFTConfig()
    in_small(cfg, "sft", folder, archives.policy)
    cfg.model.data.train_ds = SFTDatasetConfig(
        write_rows(folder / "train.jsonl", QUESTIONS), global_batch_size=2, shuffle=False
    )
    cfg.model.data.validation_ds = SFTDatasetConfig(write_rows(folder / "validation.jsonl", HELD_OUT))
    return cfg


def rm_config(folder: Path, archives: Archives) -> RMConfig:
    cfg = RMConfig()
    in_small(cfg, "rm", folder, archives.judge)
    cfg.model.global_batch_size, cfg.model.data.shuffle, cfg.model.data.append_eod = 2, False, True
    cfg.model.data.data_prefix = {
        "train": [write_rows(folder / "pairs.jsonl", PAIRS)],
        "validation": [write_rows(folder / "held_out.jsonl", HELD_OUT_PAIRS)],
    }
    return cfg


def test_the_archives_of_a_run_are_read_once_for_their_sums_also_where_the_weights_stay(
    archives: Archives, tmp_path: Path, hashed_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_residents", {})
    cfg = sft_config(tmp_path, archives)
    base = cfg.model.restore_from_path = shutil.copy(str(archives.policy), str(tmp_path / "own.nemo"))
    sft.run(cfg)
    made = str(tmp_path / "log/checkpoints/m.nemo")
    assert [hashed_files.count(path) for path in (base, made)] == [1, 1]


def rates(steps: int) -> list[float]:
    """WarmupAnnealing without a warm-up falls in a line, to 0 after the last step."""
    return [OPTIM.lr * (1 - t / steps) for t in range(steps)]


def batches(rows: list[Any]) -> list[list[Any]]:
    """Two epochs of two rows a step."""
    return 2 * [rows[start : start + 2] for start in range(0, len(rows), 2)]


def answer_loss(model: Plain, rows: list[dict[str, str]]) -> Tensor:
    """−log p of the answers' tokens and of the EOS after each, averaged over them."""
    found = []
    for row in rows:
        prompt = model.tokenizer.encode(row["input"])
        tokens = [*prompt, *model.tokenizer.encode(f" {row['output']}"), model.tokenizer.eos_id]
        found.append(model.logprobs(tokens)[len(prompt) - 1 :])
    return -torch.cat(found).mean()


def pairs_of(rows: list[dict[str, str]]) -> list[Any]:
    return list(zip(rows[0::2], rows[1::2], strict=True))


def rewards(model: Plain, pairs: list[Any]) -> Tensor:
    """`[P, 2]`: of texts with EOS."""
    ends = [[*model.tokenizer.encode(row["text"]), model.tokenizer.eos_id] for pair in pairs for row in pair]
    return torch.stack([model.reward(tokens) for tokens in ends]).reshape(-1, 2)


def pair_loss(model: Plain, pairs: list[Any]) -> Tensor:
    """−log σ(chosen − rejected), averaged over pairs."""
    found = rewards(model, pairs)
    return -logsigmoid(found[:, 0] - found[:, 1]).mean()


def check_training(
    log: Path, begun: Path, loss: Callable[[Plain, list[Any]], Tensor], train: list[Any], validation: list[Any]
) -> None:
    """A run of two epochs: rates, losses and weights are those of plain torch, also on what was held out."""
    steps = batches(train)
    assert logged(log, "train/lr") == pytest.approx(rates(len(steps)))
    with opened(begun) as plain:
        losses = plain.trained([lambda b=b: loss(plain, b) for b in steps], rates(len(steps)), OPTIM, clip=0.5)
        expected = plain.weights()
        held_out = loss(plain, validation).item()
    assert logged(log, "train/loss") == pytest.approx(losses, abs=1e-4)
    assert max(logged(log, "train/grad_norm")) > 0.5, "the gradient is really cut"
    assert logged(log, "val/loss") == pytest.approx([held_out], abs=1e-4)
    with opened(log / "checkpoints" / "m.nemo") as plain:
        for name, weight in plain.weights().items():
            assert torch.allclose(weight, expected[name], atol=1e-5), name


def test_sft_trains_on_the_answers_as_plain_torch_would(
    archives: Archives, tmp_path: Path, started: list[dict[str, Any]], sink: RecordingLogger
) -> None:
    cfg = sft_config(tmp_path, archives)
    cfg.exp_manager.create_dllogger_logger = True
    sft.run(cfg)
    check_training(tmp_path / "log", archives.policy, answer_loss, QUESTIONS, HELD_OUT)
    own = {"sizes": Sizes(prefix="model."), "seed": 77}
    assert started == [{"devices": 1, "path": str(archives.policy), "key": "model.restore_from_path", **own}]
    assert sink.config["model"]["data"]["train_ds"]["global_batch_size"] == 2
    assert read_architecture(tmp_path / "log" / "checkpoints" / "m.nemo").precision == "32"


def test_a_reward_model_trains_on_pairs_as_plain_torch_would_and_stores_mean_and_std(
    archives: Archives, tmp_path: Path, started: list[dict[str, Any]], sink: RecordingLogger
) -> None:
    cfg = rm_config(tmp_path, archives)
    cfg.exp_manager.create_dllogger_logger = True
    reward_training.run(cfg)
    log, pairs, held_out = tmp_path / "log", pairs_of(PAIRS), pairs_of(HELD_OUT_PAIRS)
    check_training(log, archives.judge, pair_loss, pairs, held_out)
    own = {"sizes": Sizes(prefix="model."), "seed": 77}
    key = "pretrained_checkpoint.restore_from_path"
    assert started == [{"devices": 1, "path": str(archives.judge), "key": key, **own}]
    assert sink.config["model"]["global_batch_size"] == 2
    with opened(log / "checkpoints" / "m.nemo") as plain, torch.no_grad():
        found = rewards(plain, held_out)
    assert logged(log, "val/accuracy") == pytest.approx([(found[:, 0] > found[:, 1]).float().mean().item()])
    stored = read_architecture(log / "checkpoints" / "m.nemo").reward_standardization
    assert stored == pytest.approx({"mean": found.mean().item(), "std": found.std().item()}, abs=1e-4)


def test_a_reward_model_grows_out_of_a_policy(archives: Archives, tmp_path: Path, alone: None) -> None:
    cfg = rm_config(tmp_path, archives)
    cfg.model.restore_from_path, cfg.trainer.rm.max_steps, cfg.trainer.rm.gradient_clip_val = str(archives.policy), 1, 0
    cfg.model.data.append_eod, cfg.model.optim = False, OptimConfig(name="adamw", lr=0.0)
    reward_training.run(cfg)
    made = tmp_path / "log" / "checkpoints" / "m.nemo"
    arch = read_architecture(made)
    assert (arch.reward_model_type, arch.append_eod) == ("binary_ranking", False)
    with opened(archives.policy) as plain:
        policy_weights = plain.weights()
    with opened(made) as plain:
        for name, weight in plain.weights().items():
            assert name.startswith("rm_head.") or torch.equal(weight, policy_weights[name]), name


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.data.train_ds.file_path", None, "model.data.train_ds.file_path: required, but not given"),
        ("model.data.train_ds.prompt_template", "{input}", "model.data.train_ds.prompt_template: '{input}' must end"),
        ("model.data.validation_ds.label_key", "x", "model.data.validation_ds.prompt_template: '{input} {output}'"),
        (f"{CALLBACK}.monitor", "accuracy", f"{CALLBACK}.monitor: 'accuracy' is not logged; one of"),
        (f"{CALLBACK}.save_best_model", True, f"{CALLBACK}.save_best_model: the best of the checkpoints, and none"),
        ("exp_manager.max_time_per_run", "1h", "exp_manager.max_time_per_run: '1h' is not of the form"),
        ("model.optim.sched", {"name": "none"}, "model.optim.sched.name: 'none' is not one of"),
        ("model.data.chat_template", "{% if", "model.data.chat_template: not a valid Jinja template"),
        ("model.tensor_model_parallel_size", 2, "model.tensor_model_parallel_size: 2 does not divide"),
        ("model.restore_from_path", "/no.nemo", "model.restore_from_path=/no.nemo: no such file"),
        ("model.restore_from_path", "JUDGE", "model.restore_from_path=JUDGE is a reward model"),
    ],
)
def test_what_is_wrong_with_an_sft_run_is_said_before_it_starts(
    archives: Archives, tmp_path: Path, never_starts: None, key: str, value: Any, says: str
) -> None:
    cfg = sft_config(tmp_path, archives)
    check_refused(sft.run, cfg, key, value, says, JUDGE=str(archives.judge))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.reward_model_type", "regression", "model.reward_model_type: 'regression' is not binary_ranking"),
        ("model.data.data_prefix.train", [], "model.data.data_prefix.train: required, but not given"),
        (f"{CALLBACK}.monitor", "rewards", f"{CALLBACK}.monitor: 'rewards' is not logged; one of"),
        (f"{CALLBACK}.save_best_model", True, f"{CALLBACK}.save_best_model: the best of the checkpoints, and none"),
        ("exp_manager.max_time_per_run", "1h", "exp_manager.max_time_per_run: '1h' is not of the form"),
        ("model.optim.sched", {"name": "none"}, "model.optim.sched.name: 'none' is not one of"),
        ("model.pipeline_model_parallel_size", 2, "model.pipeline_model_parallel_size: 2 does not divide"),
        ("model.restore_from_path", "/no.nemo", "pretrained_checkpoint.restore_from_path=/no.nemo: no such file"),
    ],
)
def test_what_is_wrong_with_a_reward_models_training_is_said_before_it_starts(
    archives: Archives, tmp_path: Path, never_starts: None, key: str, value: Any, says: str
) -> None:
    cfg = rm_config(tmp_path, archives)
    check_refused(reward_training.run, cfg, key, value, says)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_row_without_a_text_is_named_with_its_split(
    archives: Archives, tmp_path: Path, never_starts: None, split: str
) -> None:
    cfg = rm_config(tmp_path, archives)
    cfg.model.data.data_prefix[split] = [write_rows(tmp_path / "bad.jsonl", [{"txt": "a"}] * 2)]
    with pytest.raises(DataError, match=rf"bad\.jsonl:1: no field 'text' \(model\.data\.data_prefix\.{split}\)"):
        reward_training.run(cfg)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_checkpoint_of_other_settings_is_refused_before_a_model_is_loaded(
    archives: Archives, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    cfg: Any = (sft_config if stage == "sft" else rm_config)(tmp_path, archives)
    run: Any = sft.run if stage == "sft" else reward_training.run
    loop = getattr(cfg.trainer, stage)
    loop.save_interval, loop.max_steps = 1, 1
    run(cfg)
    for module, name in ((policy, "load_policy_for_training"), (reward_model, "load_reward_model_for_training")):
        monkeypatch.setattr(module, name, None)
    changes = (
        (f"trainer.{stage}.gradient_clip_val", 0.25, "gradient_clip_val = 0.5, this run has 0.25"),
        ("model.seed", 78, "model.seed = 77, this run has 78"),
        ("model.hidden_dropout", 0.5, "model.hidden_dropout = None, this run has 0.5"),
        ("model.attention_dropout", 0.5, "model.attention_dropout = None, this run has 0.5"),
        ("model.restore_from_path", str(archives.other), "the archive to start from = "),
    )
    check_other_runs_refused(run, cfg, changes)
