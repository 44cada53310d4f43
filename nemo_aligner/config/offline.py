"""Config of the offline scripts: the random sampler and the reward labeler."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.config.fixed import NO_MODEL, NO_TEMPLATE, Fixed, check_amp_o2, check_fixed
from nemo_aligner.config.loggers import OutputLoggersConfig
from nemo_aligner.config.rewards import RewardSources
from nemo_aligner.config.schema import MISSING, InferenceConfig, RewardStandardization, TrainerConfig, at_least
from nemo_aligner.errors import ConfigError


@dataclass
class OfflineDataConfig(ChatKeys):
    """Which rows are read, and how they become model input."""

    file_names: list[str] = MISSING  # JSONL files
    concat_sampling_probabilities: list[float] = field(default_factory=lambda: [1.0])  # one weight per file, any scale
    num_samples: int | None = None  # rows of the blend; null = sum of the file lengths
    micro_batch_size: int = 1  # prompts (sampler) or rows (labeler) in flight per data-parallel rank
    max_seq_length: int = 2048
    input_key: str = "input"
    output_key: str = "output"
    reward_key: str = "reward"
    prompt_template: str | None = None  # e.g. "User: {input}\nAssistant:"; must contain "{<input_key>}"
    add_bos: bool = False
    add_eos: bool | None = None  # sampler: never; labeler: null = as the reward model was trained
    hf_dataset: bool = False  # read by line offsets, or through Hugging Face datasets (a copy in Arrow, cached)
    index_mapping_dir: str | None = None  # cache of the loader; null = its default
    sample_split_size: int | None = None  # online loops: rows [iter*size, (iter+1)*size), wrapping around at the end
    sample_split_iter: int = 0

    def validate(self) -> None:
        self._check_fields()
        if not self.file_names:
            raise ConfigError("give one file or more", "data.file_names")
        at_least(1, data__micro_batch_size=self.micro_batch_size, data__max_seq_length=self.max_seq_length)
        at_least(1, data__num_samples=self.num_samples, data__sample_split_size=self.sample_split_size)
        at_least(0, data__sample_split_iter=self.sample_split_iter)
        if self.sample_split_iter and self.sample_split_size is None:
            raise ConfigError("nothing is done with it without data.sample_split_size", "data.sample_split_iter")

    def _check_fields(self) -> None:
        """What is written takes the place of nothing that was read. Raises ConfigError."""
        for first, second in itertools.combinations(("input_key", "output_key", "reward_key"), 2):
            if (name := getattr(self, first)) == getattr(self, second):
                raise ConfigError(f"{name!r} is data.{first} too; fields need names of their own", f"data.{second}")


@dataclass
class SamplerDataConfig(OfflineDataConfig):
    n: int = 1  # responses per prompt
    export_metadata: bool = False  # add sample_index, finish_reason, num_tokens and logprob to each row
    export_tokens: bool = False  # add <output_key>_token_ids, which labeler and SFT then prefer over the text

    def validate(self) -> None:
        super().validate()
        check_fixed(self, {"add_eos": Fixed((None, False), "a prompt is continued, not ended; leave it out")}, "data")


@dataclass
class OfflineConfig:
    """What both offline scripts share."""

    output_file: str = MISSING  # final JSONL; progress lives in <output_file>_temp/
    checkpoint_interval: int | None = None  # write progress every that many micro-batches; null = every 15 seconds
    max_time_per_run: str | None = None  # D:H:M:S; saves progress, then leaves with exit status 75
    seed: int = 1234
    megatron_amp_O2: bool | None = None  # True needs bf16, which always has it
    tensor_model_parallel_size: int = -1
    pipeline_model_parallel_size: int = -1
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: OutputLoggersConfig = field(default_factory=OutputLoggersConfig)
    export_reward: bool = False  # labeler only; the sampler accepts it so that loop scripts may pass it to both


@dataclass
class SamplerConfig(OfflineConfig):
    gpt_model_file: str = MISSING  # .nemo file, extracted or Hugging Face folder
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    data: SamplerDataConfig = field(default_factory=SamplerDataConfig)

    def validate(self) -> None:
        at_least(1, data__n=self.data.n, checkpoint_interval=self.checkpoint_interval)
        self.data.validate()
        self.inference.validate()
        self.trainer.validate()
        self.exp_manager.validate()
        check_amp_o2(self.megatron_amp_O2, self.trainer.precision, "megatron_amp_O2")


@dataclass
class LabelerConfig(RewardSources, OfflineConfig):
    gpt_model_file: str | None = None  # of a reward model: .nemo file or extracted folder
    data: OfflineDataConfig = field(default_factory=OfflineDataConfig)
    processor: str | None = None  # rs, rest, dt or null
    threshold: float = 0.0  # rest keeps rewards strictly above it
    best_so_far_file: str | None = None  # rs: what the labeler wrote before, with rewards; its rows compete too
    skip_empty: bool = False  # leave out rows whose response is empty, whatever their reward
    reward_template: str = "{input} <rm_score>: {reward} "  # dt
    reward_standardization: RewardStandardization = field(default_factory=RewardStandardization)
    print_reward_info: bool = True

    def validate(self) -> None:
        self.reward_plan.check_model(self.gpt_model_file, "gpt_model_file")
        if self.gpt_model_file is None:
            check_fixed(self, NO_MODEL)
            check_fixed(self.data, NO_TEMPLATE, "data")
        at_least(1, checkpoint_interval=self.checkpoint_interval)
        if self.threshold != 0 and self.processor != "rest":
            raise ConfigError(f"it is for processor=rest, not {self.processor or 'null'}", "threshold")
        self.reward_standardization.validate("reward_standardization")
        self.data.validate()
        self.trainer.validate()
        self.exp_manager.validate()
        check_amp_o2(self.megatron_amp_O2, self.trainer.precision, "megatron_amp_O2")
