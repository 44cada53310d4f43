"""Config of the two supervised scripts: SFT and reward-model training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.config.fixed import SFT_ROWS, WORKERS, check_fixed
from nemo_aligner.config.schema import MISSING, ExpManagerConfig, ModelOverrides, TrainerConfig, at_least


@dataclass
class LoopConfig:
    """`trainer.sft` or `trainer.rm`: the training loop."""

    max_epochs: int = 1
    max_steps: int = -1  # -1 = max_epochs passes over the data
    val_check_interval: Any = 100  # steps; a float up to 1.0 is a fraction of an epoch
    save_interval: int = 100  # steps between checkpoints, and one at the end; 0 = none, the .nemo alone
    limit_train_batches: Any = 1.0  # float = fraction, int = number of global batches
    limit_val_batches: Any = 1.0
    gradient_clip_val: float = 1.0  # 0 = no clipping
    skip_validation: bool = False


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
    add_eos: bool = True
    add_bos: bool = False
    add_sep: bool = False
    drop_last: bool = False
    hf_dataset: bool = False
    index_mapping_dir: str | None = None
    label_key: str = "output"
    prompt_template: str = "{input} {output}"
    truncation_field: str = "input"
    truncation_method: str = "right"  # right keeps the head
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
        self.exp_manager.validate()
        self.model.check_model(self.exp_manager)
        check_fixed(self.model.data, WORKERS, "model.data")
        for part in ("train_ds", "validation_ds"):
            if (rows := getattr(self.model.data, part)) is not None:
                check_fixed(rows, SFT_ROWS, f"model.data.{part}")
                names = ("micro_batch_size", "global_batch_size", "max_seq_length")
                at_least(1, **{f"model__data__{part}__{name}": getattr(rows, name) for name in names})
        at_least(1, trainer__sft__max_epochs=self.trainer.sft.max_epochs)
        at_least(0, trainer__sft__save_interval=self.trainer.sft.save_interval)


@dataclass
class RMDataConfig(ChatKeys):
    data_prefix: Any = MISSING  # {train: [f], validation: [f], test: [f]}; longer lists blend: [w1, f1, w2, f2]
    data_impl: str = "jsonl"  # lines of {"text": ...} by twos, or of {"chosen": ..., "rejected": ...}
    chat: bool = False  # prompt, chosen and rejected that are texts are turns
    prompt_template: str | None = None  # around a prompt, as in the labeler; must contain "{prompt}"
    seq_length: int = 512  # texts longer than this are skipped, pair by pair, and counted
    append_eod: bool = False  # the archive remembers it, and the labeler does the same
    shuffle: bool = True
    num_workers: int = 0


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
        self.exp_manager.validate()
        self.model.check_model(self.exp_manager)
        check_fixed(self.model.data, WORKERS, "model.data")
        at_least(
            1,
            model__micro_batch_size=self.model.micro_batch_size,
            model__global_batch_size=self.model.global_batch_size,
            model__data__seq_length=self.model.data.seq_length,
            trainer__rm__max_epochs=self.trainer.rm.max_epochs,
        )
        at_least(0, trainer__rm__save_interval=self.trainer.rm.save_interval)
