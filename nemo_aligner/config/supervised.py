"""Config of the two supervised scripts: SFT and reward-model training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.config.fixed import BLENDED, CHAT_ROWS, SFT_ROWS, WORKERS, check_fixed
from nemo_aligner.config.schema import (
    MISSING,
    ExpManagerConfig,
    LoopLimits,
    ModelOverrides,
    TrainerConfig,
    at_least,
    one_of,
)
from nemo_aligner.errors import ConfigError


@dataclass
class LoopConfig(LoopLimits):
    """`trainer.sft` or `trainer.rm`: the training loop."""

    val_check_interval: Any = 100  # steps; a float up to 1.0 is a fraction of an epoch; 0 = no validation
    limit_train_batches: Any = 1.0  # of each epoch: float = fraction, int = number of global batches; null = all
    limit_val_batches: Any = 1.0  # of each validation, likewise; 0 = no validation
    skip_validation: bool = False

    def validate(self, block: str) -> None:
        """Raises ConfigError, naming the key under `block`."""
        self.check_limits(block)
        check_amount(self.val_check_interval, 0, "steps", f"{block}.val_check_interval")
        if self.limit_train_batches is not None:
            check_amount(self.limit_train_batches, 1, "batches", f"{block}.limit_train_batches")
        if self.limit_val_batches is not None:
            check_amount(self.limit_val_batches, 0, "batches", f"{block}.limit_val_batches")

    @property
    def train_limit(self) -> int | float | None:
        """`limit_train_batches`; None where it leaves out nothing."""
        everything = isinstance(self.limit_train_batches, float) and self.limit_train_batches == 1
        return None if everything else self.limit_train_batches

    @property
    def validates(self) -> bool:
        """Whether there is validation during training, where there is something to validate on."""
        return not self.skip_validation and self.val_check_interval != 0 and self.limit_val_batches != 0


def check_amount(value: Any, least: int, unit: str, key: str) -> None:
    """A whole number from `least` on, or as a float the share of an epoch. Raises ConfigError."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    share = isinstance(value, float) and (0 < value <= 1 or value == least)
    if not (whole or share):
        raise ConfigError(
            f"{value!r} is not a number of {unit}, {least} or more, nor a share of them, above 0.0 and up to 1.0", key
        )


@dataclass
class SFTTrainerConfig(TrainerConfig):
    sft: LoopConfig = field(default_factory=LoopConfig)


@dataclass
class RMTrainerConfig(TrainerConfig):
    rm: LoopConfig = field(default_factory=LoopConfig)


@dataclass
class SFTDatasetConfig:
    """`model.data.train_ds` or `model.data.validation_ds`."""

    file_path: str | None = None
    global_batch_size: int = 128
    micro_batch_size: int = 1
    shuffle: bool = True
    max_seq_length: int = 2048
    min_seq_length: int = 1  # rows of fewer tokens are left out, and counted
    add_eos: bool = True  # of rows that are no conversations: the chat template ends those
    add_bos: bool = False
    add_sep: bool = False
    drop_last: bool = False
    hf_dataset: bool = False
    index_mapping_dir: str | None = None
    label_key: str = "output"
    prompt_template: str = "{input} {output}"
    truncation_field: str = "input"
    truncation_method: str = "right"  # right keeps the head, left the tail
    num_workers: int = 0
    memmap_workers: int | None = None


@dataclass
class SFTDataConfig(ChatKeys):
    chat: bool = False
    train_ds: SFTDatasetConfig = field(default_factory=SFTDatasetConfig)
    validation_ds: SFTDatasetConfig | None = None
    num_workers: int = 0


@dataclass
class SFTModelConfig(ModelOverrides):
    answer_only_loss: bool = True
    data: SFTDataConfig = field(default_factory=SFTDataConfig)


@dataclass
class SFTConfig:
    name: str = "megatron_gpt_sft"
    trainer: SFTTrainerConfig = field(default_factory=SFTTrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: SFTModelConfig = field(default_factory=SFTModelConfig)

    def validate(self) -> None:
        self.trainer.validate()
        self.trainer.sft.validate("trainer.sft")
        self.exp_manager.validate()
        self.model.check_model(self.exp_manager, self.trainer)
        check_fixed(self.model.data, WORKERS, "model.data")
        for part in ("train_ds", "validation_ds"):
            if (rows := getattr(self.model.data, part)) is not None:
                check_fixed(rows, SFT_ROWS | (CHAT_ROWS if self.model.data.chat else {}), f"model.data.{part}")
                one_of(("right", "left"), rows.truncation_method, f"model.data.{part}.truncation_method")
                names = ("micro_batch_size", "global_batch_size", "max_seq_length")
                at_least(1, **{f"model__data__{part}__{name}": getattr(rows, name) for name in names})


@dataclass
class BlendedDataConfig(ChatKeys):
    """`model.data` of what trains on files by `data_prefix`."""

    data_prefix: Any = MISSING  # {train: [f], validation: [f], test: [f]}; longer lists blend: [w1, f1, w2, f2]
    data_impl: str = "jsonl"
    shuffle: bool = True
    num_workers: int = 0

    def validate(self) -> None:
        """Raises ConfigError for files of another form, and for those of a split that nothing would read."""
        check_fixed(self, BLENDED, "model.data")
        key = "model.data.data_prefix"
        splits = self.data_prefix if isinstance(self.data_prefix, dict) else {"train": self.data_prefix}
        for name, files in splits.items():
            if name not in ("train", "validation", "test"):
                raise ConfigError("no such key; one of train, validation, test", f"{key}.{name}")
            if not isinstance(files, str | list | None):
                raise ConfigError(f"{files} is neither [file] nor [weight, file, weight, file, ...]", f"{key}.{name}")


@dataclass
class RMDataConfig(BlendedDataConfig):
    """Lines of {"text": ...} by twos, or of {"chosen": ..., "rejected": ...}."""

    chat: bool = False  # prompt, chosen and rejected that are texts are turns
    prompt_template: str | None = None  # around a prompt, as in the labeler; must contain "{prompt}"
    seq_length: int = 512  # texts longer than this are skipped, pair by pair, and counted
    append_eod: bool = False  # the archive remembers it, and the labeler does the same


@dataclass
class PretrainedCheckpoint:
    restore_from_path: str = MISSING  # the policy (or an earlier reward model) the backbone comes from


@dataclass
class RMModelConfig(ModelOverrides):
    restore_from_path: str = "${pretrained_checkpoint.restore_from_path}"
    reward_model_type: str = "binary_ranking"
    micro_batch_size: int = 2  # pairs
    global_batch_size: int = 64  # pairs
    data: RMDataConfig = field(default_factory=RMDataConfig)


@dataclass
class RMConfig:
    name: str = "megatron_gpt"
    trainer: RMTrainerConfig = field(default_factory=RMTrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = field(default_factory=PretrainedCheckpoint)
    model: RMModelConfig = field(default_factory=RMModelConfig)

    def validate(self) -> None:
        self.trainer.validate()
        self.trainer.rm.validate("trainer.rm")
        self.exp_manager.validate()
        self.model.check_model(self.exp_manager, self.trainer)
        self.model.data.validate()
        at_least(
            1,
            model__micro_batch_size=self.model.micro_batch_size,
            model__global_batch_size=self.model.global_batch_size,
            model__data__seq_length=self.model.data.seq_length,
        )
