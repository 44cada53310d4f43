"""Supervised fine-tuning: the policy learns the answers of a JSONL file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.supervised import SFTConfig, SFTDatasetConfig
from nemo_aligner.data.chat import ChatTemplate, check_template
from nemo_aligner.data.conversations import check_conversation
from nemo_aligner.data.jsonl import Rows, load_rows
from nemo_aligner.data.prompts import bos_for
from nemo_aligner.data.supervised import (
    Example,
    PromptTemplate,
    chat_examples,
    long_enough,
    required_texts,
    sft_examples,
)
from nemo_aligner.engine.checks import check_is_policy, check_training
from nemo_aligner.engine.interfaces import TrainableModel
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.stages.run_checks import check_training_settings
from nemo_aligner.stages.run_identity import (
    adapter_settings,
    batch_settings,
    model_settings,
    optimizer_settings,
    refuse_other_run,
)
from nemo_aligner.stages.run_owner import owning_log_dir
from nemo_aligner.stages.supervised.monitors import monitors
from nemo_aligner.stages.training_template import TEMPLATE, training_template

if TYPE_CHECKING:
    from nemo_aligner.stages.batches import BatchPlan
    from nemo_aligner.stages.supervised.loop import Task

_ARCHIVE = "model.restore_from_path"
_TRAIN, _VALIDATION = "model.data.train_ds", "model.data.validation_ds"


def run(cfg: SFTConfig) -> None:
    """Train `model.restore_from_path` on `model.data.train_ds`; see stages.supervised for the loop."""
    rows = open_rows(cfg, cfg.model.data.train_ds, _TRAIN)
    validation = cfg.model.data.validation_ds
    held_out = open_rows(cfg, validation, _VALIDATION) if validation and validation.file_path else None
    check_training_settings(cfg.exp_manager, cfg.model.optim, monitors(()), cfg.trainer.sft.save_interval)
    check_template(cfg.model.data, TEMPLATE)
    check_training(cfg.trainer, cfg.model, key=_ARCHIVE)
    check_is_policy(cfg.model.restore_from_path, _ARCHIVE)

    with owning_log_dir(cfg.exp_manager, cfg.trainer):
        from nemo_aligner.engine.loading import start_for_training
        from nemo_aligner.engine.policy import load_policy_for_training
        from nemo_aligner.stages.supervised.loop import train

        with start_for_training(cfg.trainer, cfg.model, key=_ARCHIVE) as cluster:
            refuse_other_run(cfg.exp_manager, cluster, cfg.model.restore_from_path, settings(cfg))
            policy = load_policy_for_training(cfg.model, cfg.trainer, cluster)
            task = make_task(cfg, policy, rows, held_out)
            policy.add_optimizer(cfg.model.optim, clip_grad=cfg.trainer.sft.gradient_clip_val, max_steps=task.steps)
            train(task, policy, cfg.exp_manager, asdict(cfg))
            policy.stay_in_memory()


def settings(cfg: SFTConfig) -> dict[str, Any]:
    """What decides a step besides the examples."""
    data, limit = cfg.model.data.train_ds, cfg.trainer.sft.train_limit
    batches = batch_settings(data.global_batch_size, cfg.model.seed, data.shuffle, data.drop_last, limit)
    trained = optimizer_settings(cfg.model.optim, cfg.trainer.sft.gradient_clip_val)
    return batches | trained | adapter_settings(cfg.model.peft) | model_settings(cfg.model)


def open_rows(cfg: SFTConfig, config: SFTDatasetConfig, key: str) -> Rows:
    """The rows of one data set, checked. Raises ConfigError without a file, DataError for bad rows."""
    if not config.file_path:
        raise ConfigError("required, but not given", f"{key}.file_path")
    required: Mapping[str, str] = {}
    if not cfg.model.data.chat:
        required = required_texts(PromptTemplate.of(config, key), key)
    try:
        return load_rows(
            config.file_path,
            required=required,
            hf_dataset=config.hf_dataset,
            cache_dir=config.index_mapping_dir,
            check=check_conversation if cfg.model.data.chat else None,
        )
    except DataError as fault:
        if "the row has" in str(fault) and re.search("'(messages|conversations)'", str(fault)):
            raise DataError(f"{fault}; rows of conversations want model.data.chat=True") from None
        raise


def make_task(cfg: SFTConfig, policy: TrainableModel, rows: Rows, held_out: Rows | None) -> Task:
    from nemo_aligner.stages.supervised.loop import Task, check_held_out, check_not_empty, sft_objective

    train_ds, data = cfg.model.data.train_ds, cfg.model.data
    template = training_template(policy, data)
    if data.chat and template is None:
        raise ConfigError("the archive's tokenizer has no chat template; give one", TEMPLATE)
    chat = template if data.chat else None
    examples = make_examples(cfg, train_ds, policy, rows, _TRAIN, chat)
    check_not_empty(examples, str(rows.path))
    validation: list[Example] = []
    more: dict[str, Any] = {}
    if held_out is not None and data.validation_ds is not None:
        validation = make_examples(cfg, data.validation_ds, policy, held_out, _VALIDATION, chat)
        check_held_out(validation, len(held_out), f"{_VALIDATION}.file_path")
        more["validation_plan"] = batch_plan(cfg, data.validation_ds, len(validation))
        more["validation_micro_batch_size"] = data.validation_ds.micro_batch_size
    return Task(
        train=examples,
        validation=validation,
        objective=sft_objective,
        plan=batch_plan(cfg, train_ds, len(examples), cfg.trainer.sft.train_limit),
        micro_batch_size=train_ds.micro_batch_size,
        micro_batch_tokens=cfg.model.micro_batch_tokens,
        loop=cfg.trainer.sft,
        block="trainer.sft",
        settings=settings(cfg),
        **more,
    )


def batch_plan(cfg: SFTConfig, data: SFTDatasetConfig, count: int, limit: int | float | None = None) -> BatchPlan:
    from nemo_aligner.stages.batches import BatchPlan

    return BatchPlan(count, data.global_batch_size, cfg.model.seed, data.shuffle, data.drop_last, limit)


def make_examples(
    cfg: SFTConfig,
    config: SFTDatasetConfig,
    policy: TrainableModel,
    rows: Rows,
    key: str,
    chat: ChatTemplate | None,
) -> list[Example]:
    """Conversations through `chat`; None: rows are plain."""
    answer_only = cfg.model.answer_only_loss
    bos_for(policy.tokenizer, config.add_bos, f"{key}.add_bos")
    if chat is None:
        return sft_examples(
            rows, config, policy.tokenizer, answer_only=answer_only, max_length=policy.max_sequence_length, key=key
        )
    examples = chat_examples(
        rows, chat, policy.tokenizer, config, answer_only=answer_only, max_length=policy.max_sequence_length
    )
    return long_enough(examples, config.min_seq_length, str(rows.path))
