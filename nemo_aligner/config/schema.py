"""Typed config blocks shared by several scripts; field names are the YAML's keys, so that an override reads the same.

`MISSING` fields are required (`???` in YAML). A block that may be deleted on the command line (`~model.optim.sched`)
has `None` as its default, or the merge with this schema would bring it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_aligner.config.cut import Sizes
from nemo_aligner.config.experts import ExpertOverrides
from nemo_aligner.config.fixed import MODEL, OPTIM, TRAINER, check_amp_o2, check_fixed
from nemo_aligner.config.libraries import LibraryKeys
from nemo_aligner.config.loggers import LoggersConfig
from nemo_aligner.config.peft import PeftConfig
from nemo_aligner.config.recomputation import RecomputationKeys
from nemo_aligner.errors import ConfigError

MISSING: Any = "???"
"""OmegaConf's mark of what must be given. It is not imported for it: the engine needs none of what scripts need."""

LEAST_TEMPERATURE = 1e-5
"""Below it logits no longer fit a float once divided by it, and the likeliest token is all that could be drawn."""

PENALTIES = (0.01, 100)
"""Within these repetition_penalty leaves logits that fit a float, also once divided by LEAST_TEMPERATURE."""

PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed", "bf16-true")


ACCELERATORS = ("auto", "gpu", "cuda", "cpu")
OPTIMIZERS = ("distributed_fused_adam", "mcore_distributed_optim", "fused_adam", "adamw", "adam")  # all are AdamW


def at_least(low: int, **values: int | None) -> None:
    """Whole numbers that must not be below `low`; the dots of a key are written as `__`. Raises ConfigError."""
    for name, value in values.items():
        if value is not None and value < low:
            raise ConfigError(f"{value} is below {low}", name.replace("__", "."))


def one_of(allowed: Sequence[str], value: str, key: str) -> None:
    """Raises ConfigError for a value that is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{value!r} is not one of {', '.join(allowed)}", key)


@dataclass
class ParallelConfig:
    """How a model is cut over processes; -1 = as stored in the archive, reduced to what world size and model allow."""

    tensor_model_parallel_size: int = -1
    pipeline_model_parallel_size: int = -1


@dataclass
class TrainerConfig:
    num_nodes: int = 1
    devices: int = 1  # processes on each node: GPUs, or CPU workers where there is no GPU
    accelerator: str = "auto"  # auto, gpu or cpu
    precision: str = "bf16-mixed"  # 32, bf16 or bf16-mixed (also "32-true", "bf16-true")
    logger: bool = False  # NeMo's YAMLs carry the next four; only these values are accepted
    enable_checkpointing: bool = False
    use_distributed_sampler: bool = False
    max_time: str | None = None  # use max_time_per_run

    def validate(self) -> None:
        at_least(1, trainer__num_nodes=self.num_nodes, trainer__devices=self.devices)
        one_of(ACCELERATORS, self.accelerator, "trainer.accelerator")
        one_of(PRECISIONS, self.precision, "trainer.precision")
        check_fixed(self, TRAINER, "trainer")

    def check_precision_of(self, precision: str | None, key: str) -> None:
        """`key` of a model may say again what `precision` of the trainer says, as ${trainer.precision} or spelled in
        another way; null says nothing. Raises ConfigError.
        """
        own = self.precision
        if precision is None or (precision in PRECISIONS and precision.startswith("32") == own.startswith("32")):
            return
        raise ConfigError(f"{precision!r} is not trainer.precision={own}, which decides; leave it out", key)


@dataclass
class LoopLimits:
    """How long any training loop is, and what bounds a step."""

    max_epochs: int = 1  # passes over the data
    max_steps: int = -1  # -1 = max_epochs passes
    save_interval: int = 100  # steps between checkpoints, and one at the end; 0 = none, the .nemo alone
    gradient_clip_val: float = 1.0  # 0 = no clipping

    def check_limits(self, block: str) -> None:
        """Raises ConfigError, naming the key under `block`."""
        at_least(1, **{f"{block}.max_epochs": self.max_epochs})
        at_least(0, **{f"{block}.save_interval": self.save_interval})
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigError(f"{self.max_steps} is not 1 or more; -1 = max_epochs passes", f"{block}.max_steps")
        if not self.gradient_clip_val >= 0:
            raise ConfigError(f"{self.gradient_clip_val} is not a number from 0 on", f"{block}.gradient_clip_val")


@dataclass
class SamplingConfig:
    """How the next token is drawn; becomes algorithms.sampling.SamplingParams."""

    temperature: float = 1.0
    top_k: int = 0  # 0 = all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    add_BOS: bool = False
    end_strings: list[str] = field(default_factory=lambda: ["<|endoftext|>"])

    def check_sampling(self, block: str) -> None:
        """Raises ConfigError, naming the key under `block`."""
        if not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"{self.temperature} is not a number from {LEAST_TEMPERATURE} on; for the likeliest token use greedy",
                f"{block}.temperature",
            )
        if self.top_k < 0:
            raise ConfigError(f"{self.top_k} is below 0", f"{block}.top_k")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"{self.top_p} is not between 0 and 1", f"{block}.top_p")
        least, most = PENALTIES
        if not least <= self.repetition_penalty <= most:
            raise ConfigError(
                f"{self.repetition_penalty} is not between {least} and {most}", f"{block}.repetition_penalty"
            )


@dataclass
class InferenceConfig(SamplingConfig):
    """`inference`: sampling of responses."""

    greedy: bool = False
    tokens_to_generate: int = 30
    min_tokens_to_generate: int = 0
    max_batch_slots: int | None = None  # responses decoded at once; null = from micro_batch_size and n

    def validate(self) -> None:
        self.check_sampling("inference")
        at_least(
            1, inference__tokens_to_generate=self.tokens_to_generate, inference__max_batch_slots=self.max_batch_slots
        )
        at_least(0, inference__min_tokens_to_generate=self.min_tokens_to_generate)
        if self.min_tokens_to_generate > self.tokens_to_generate:
            raise ConfigError(
                f"{self.min_tokens_to_generate} is above inference.tokens_to_generate={self.tokens_to_generate}",
                "inference.min_tokens_to_generate",
            )


@dataclass
class RewardStandardization:
    """r → (r − mean)/std. Both given: these. Neither: the archive's own if it has them, else of the whole file."""

    enable: bool = False
    mean: float | None = None
    std: float | None = None

    def validate(self, block: str) -> None:
        """Both of mean and std, or neither, and none where nothing is standardised. Raises ConfigError, naming the key
        under `block`.
        """
        for name in ("mean", "std") if not self.enable else ():
            if getattr(self, name) is not None:
                raise ConfigError(f"nothing is done with it without {block}.enable=True", f"{block}.{name}")
        if self.enable and (self.mean is None) != (self.std is None):
            raise ConfigError("give it too, or leave out both", f"{block}.{'mean' if self.mean is None else 'std'}")
        if self.enable and self.std is not None and not self.std > 0:
            raise ConfigError(f"{self.std} is not above 0", f"{block}.std")

    def known(self, stored: tuple[float, float] | None) -> tuple[float, float] | None:
        """(mean, std) as given, else those `stored` in the reward model, if it has them."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        return stored


@dataclass
class OptimConfig:
    name: str = "distributed_fused_adam"  # all are AdamW; this one is cut over data-parallel ranks
    lr: float = 3e-5
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    overlap_grad_sync: bool = False  # ranks sum gradients bucket by bucket during the backward pass
    bucket_cap_mb: float | None = None  # MiB of a bucket; null: Megatron's choice
    overlap_param_sync: bool = False  # weights that other ranks updated arrive beside what comes after the step
    cpu_offload: bool = False  # Adam's state, and its arithmetic, in the CPU's memory: for the CPU to do, beside a GPU
    contiguous_grad_buffer: bool = True
    contiguous_param_buffer: bool = True
    sched: dict[str, Any] | None = (
        None  # {name: CosineAnnealing, warmup_steps, constant_steps, min_lr, ...}; null = constant
    )

    def check(self) -> None:
        """Raises ConfigError for an unknown optimizer, and for numbers that none takes."""
        one_of(OPTIMIZERS, self.name, "model.optim.name")
        for name in ("lr", "weight_decay", "eps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{value} is not a number from 0 on", f"model.optim.{name}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{list(self.betas)} are not two numbers from 0 to below 1", "model.optim.betas")
        if self.bucket_cap_mb is not None and not 0 < self.bucket_cap_mb < math.inf:
            raise ConfigError(f"{self.bucket_cap_mb} is not above 0", "model.optim.bucket_cap_mb")


@dataclass
class CheckpointCallbackParams:
    save_top_k: int = 5
    monitor: str = "val_loss"
    mode: str = "min"  # min or max of the monitored value is best
    save_nemo_on_train_end: bool = True
    filename: str | None = None  # of a checkpoint, with fields like {step} and {val_loss:.3f}; null: as the docs show
    save_best_model: bool = False  # the archive at the end is that of the best checkpoint, not of the last
    async_save: bool = False  # write while training goes on, from a copy in memory of all that is saved
    model_parallel_size: Any = None  # null, or TP × PP of the run; a checkpoint is cut anew at every load


@dataclass
class ExpManagerConfig(LoggersConfig):
    """Where a training run logs and keeps its checkpoints (NeMo's `exp_manager` keys)."""

    explicit_log_dir: str | None = None  # null: <exp_dir or nemo_experiments>/<name>
    exp_dir: str | None = None
    name: str = MISSING  # the final archive is <log dir>/checkpoints/<name>.nemo
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointCallbackParams = field(default_factory=CheckpointCallbackParams)
    max_time_per_run: str | None = None  # D:H:M:S; saves, then leaves with exit status 75


@dataclass
class ModelOverrides(ExpertOverrides, LibraryKeys, RecomputationKeys):
    """`model.*` keys that change how an archive's model is run or trained; null = as the archive says."""

    restore_from_path: str = MISSING
    precision: str | None = "${trainer.precision}"  # that of the trainer, or null
    tensor_model_parallel_size: int = -1
    pipeline_model_parallel_size: int = -1
    virtual_pipeline_model_parallel_size: int | None = None  # stages of a rank, interleaved; null = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    megatron_amp_O2: bool | None = None  # True needs bf16, which always has it
    encoder_seq_length: int | None = None  # tokens of a row at most; above max_position_embeddings with rope alone
    seed: int = 1234
    hidden_dropout: float | None = None
    attention_dropout: float | None = None
    gradient_as_bucket_view: bool = True
    micro_batch_tokens: int | None = None  # of a micro-batch at most, shared ones once; null = any number
    peft: PeftConfig = field(default_factory=PeftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def sizes(self) -> Sizes:
        """Over how many ranks the model is to be cut."""
        return Sizes(
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            virtual=self.virtual_pipeline_model_parallel_size or 1,
            context=self.context_parallel_size,
            expert=self.expert_model_parallel_size,
            expert_tensor=self.expert_tensor_parallel_size,
            prefix="model.",
        )

    def check_model(self, exp: ExpManagerConfig, trainer: TrainerConfig) -> None:
        """What every training script asks of `model`. Raises ConfigError."""
        check_fixed(self, MODEL, "model")
        check_fixed(self.optim, OPTIM, "model.optim")
        self.optim.check()
        self.peft.check()
        self.check_experts()
        self.check_libraries()
        self.check_recomputation()
        at_least(
            1,
            model__encoder_seq_length=self.encoder_seq_length,
            model__micro_batch_tokens=self.micro_batch_tokens,
            model__virtual_pipeline_model_parallel_size=self.virtual_pipeline_model_parallel_size,
        )
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{value} is not from 0 to below 1", f"model.{name}")
        trainer.check_precision_of(self.precision, "model.precision")
        check_amp_o2(self.megatron_amp_O2, trainer.precision, "model.megatron_amp_O2")
        own = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        if exp.checkpoint_callback_params.model_parallel_size not in (None, own):
            raise ConfigError(
                "not the run's own; leave it out, and give model.tensor_model_parallel_size",
                "exp_manager.checkpoint_callback_params.model_parallel_size",
            )
