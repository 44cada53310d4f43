"""Reward-model training: a policy's backbone with a new head learns which of two texts people prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.supervised import RMConfig
from nemo_aligner.data import preferences
from nemo_aligner.data.blending import blend, prefix_files
from nemo_aligner.data.chat import check_template
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.data.supervised import preference_examples
from nemo_aligner.engine.checks import check_training
from nemo_aligner.engine.interfaces import TrainableModel
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.run_checks import check_training_settings
from nemo_aligner.stages.run_identity import (
    adapter_settings,
    batch_settings,
    model_settings,
    optimizer_settings,
    refuse_other_run,
)
from nemo_aligner.stages.run_owner import owning_log_dir
from nemo_aligner.stages.supervised.monitors import RANKING_METRICS, monitors
from nemo_aligner.stages.training_template import TEMPLATE, training_template

if TYPE_CHECKING:
    from nemo_aligner.stages.supervised.loop import Task

_ARCHIVE = "pretrained_checkpoint.restore_from_path"

_Pairs = Sequence[tuple[Any, Any]]


def run(cfg: RMConfig) -> None:
    """Train on `model.data.data_prefix.train`; the archive carries mean and std of the validation rewards."""
    if cfg.model.reward_model_type != "binary_ranking":
        raise ConfigError(f"{cfg.model.reward_model_type!r} is not binary_ranking", "model.reward_model_type")
    check_templates(cfg)
    pairs = {split: open_pairs(cfg, split) for split in ("train", "validation")}
    if not pairs["train"]:
        raise ConfigError("required, but not given", "model.data.data_prefix.train")
    check_training_settings(cfg.exp_manager, cfg.model.optim, monitors(RANKING_METRICS), cfg.trainer.rm.save_interval)
    check_training(cfg.trainer, cfg.model, key=_ARCHIVE)

    with owning_log_dir(cfg.exp_manager, cfg.trainer):
        from nemo_aligner.engine.loading import start_for_training
        from nemo_aligner.engine.reward_model import load_reward_model_for_training
        from nemo_aligner.stages.supervised.loop import train

        with start_for_training(cfg.trainer, cfg.model, key=_ARCHIVE) as cluster:
            refuse_other_run(cfg.exp_manager, cluster, cfg.model.restore_from_path, settings(cfg))
            model = load_reward_model_for_training(
                cfg.model, cfg.trainer, cluster, reward_model_type=cfg.model.reward_model_type
            )
            task = make_task(cfg, model, pairs)
            model.add_optimizer(cfg.model.optim, clip_grad=cfg.trainer.rm.gradient_clip_val, max_steps=task.steps)
            train(task, model, cfg.exp_manager, asdict(cfg))


def check_templates(cfg: RMConfig) -> None:
    """Raises ConfigError."""
    data = cfg.model.data
    check_template(data, TEMPLATE)
    if data.prompt_template is not None and "{prompt}" not in data.prompt_template:
        raise ConfigError(f"{data.prompt_template!r} lacks {{prompt}}", "model.data.prompt_template")


def settings(cfg: RMConfig) -> dict[str, Any]:
    """What decides a step besides the examples."""
    limit = cfg.trainer.rm.train_limit
    batches = batch_settings(cfg.model.global_batch_size, cfg.model.seed, cfg.model.data.shuffle, limit=limit)
    trained = optimizer_settings(cfg.model.optim, cfg.trainer.rm.gradient_clip_val)
    return batches | trained | adapter_settings(cfg.model.peft) | model_settings(cfg.model)


def open_pairs(cfg: RMConfig, split: str) -> _Pairs:
    """Pairs of one split of `model.data.data_prefix`: [file] or the blend [weight, file, weight, file, ...]."""
    key = f"model.data.data_prefix.{split}"
    names, weights = prefix_files(cfg.model.data.data_prefix, split, key)
    if not names:
        return []
    files = [preferences.open_pairs(name, key=key, chat=cfg.model.data.chat) for name in names]
    return files[0] if len(files) == 1 else blend(files, weights, key=key)


def make_task(cfg: RMConfig, model: TrainableModel, pairs: dict[str, _Pairs]) -> Task:
    from nemo_aligner.stages.batches import BatchPlan
    from nemo_aligner.stages.supervised.loop import (
        Task,
        check_held_out,
        check_not_empty,
        ranking_objective,
        ranking_task_notes,
    )

    data = cfg.model.data
    limit = min(data.seq_length, model.max_sequence_length)
    texts = RowTexts(data.prompt_template, "prompt", training_template(model, data), TEMPLATE)
    splits = {
        split: preference_examples(
            rows,
            model.tokenizer,
            eos=data.append_eod,
            limit=limit,
            source=split,
            text=lambda side: preferences.side_text(side, texts),
        )
        for split, rows in pairs.items()
    }
    check_not_empty(splits["train"], "model.data.data_prefix.train")
    check_held_out(splits["validation"], len(pairs["validation"]), "model.data.data_prefix.validation")
    return Task(
        train=splits["train"],
        validation=splits["validation"],
        objective=ranking_objective,
        plan=BatchPlan(
            len(splits["train"]),
            cfg.model.global_batch_size,
            cfg.model.seed,
            data.shuffle,
            limit=cfg.trainer.rm.train_limit,
        ),
        micro_batch_size=cfg.model.micro_batch_size,
        micro_batch_tokens=cfg.model.micro_batch_tokens,
        loop=cfg.trainer.rm,
        block="trainer.rm",
        settings=settings(cfg),
        metric_names=RANKING_METRICS,
        archive_notes=ranking_task_notes(data.append_eod, cfg.model.reward_model_type),
    )
