"""Config of the evaluation: plain samples of policies, their rewards, and how far they are from where they began."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from nemo_aligner.config.fixed import EVALUATION, EVALUATION_ROWS, check_fixed
from nemo_aligner.config.offline import OfflineDataConfig, SamplerConfig, SamplerDataConfig
from nemo_aligner.config.rewards import RewardSources
from nemo_aligner.config.schema import MISSING
from nemo_aligner.errors import ConfigError


def policy_name(path: str) -> str:
    """What the samples of a policy are called: as its archive or folder, without .nemo."""
    return os.path.basename(os.path.abspath(path)).removesuffix(".nemo")


@dataclass
class EvaluationDataConfig(SamplerDataConfig):
    """What is sampled, and what the reward model reads of it: max_seq_length, add_bos, add_eos as in the labeler."""

    max_seq_length: int = 4096
    reward_prompt_template: str | None = None  # what the reward model sees of a prompt; null = prompt_template

    def validate(self) -> None:
        OfflineDataConfig.validate(self)  # add_eos is of the judge here, not of the sampler
        check_fixed(self, EVALUATION_ROWS, "data")

    @property
    def judged(self) -> EvaluationDataConfig:
        """The same rows as the reward model reads them."""
        return replace(self, prompt_template=self.reward_prompt_template or self.prompt_template)


@dataclass
class EvaluationConfig(RewardSources, SamplerConfig):
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)
    gpt_model_file: str = "${policy_files.0}"
    policy_files: list[str] = MISSING
    reward_model_file: str | None = None
    initial_policy_file: str | None = None  # KL is measured against it; null = no KL
    pass_threshold: float | None = None  # a sample with a higher reward passes, for pass_at; null = no pass_at

    def samples_file(self, policy_file: str) -> str:
        """Where the samples of one of `policy_files` are written."""
        return f"{self.output_file}.{policy_name(policy_file)}.jsonl"

    def validate(self) -> None:
        super().validate()
        self.reward_plan.check_model(self.reward_model_file, "reward_model_file")
        check_fixed(self, EVALUATION)
        if not self.policy_files or len({*map(policy_name, self.policy_files)}) < len(self.policy_files):
            raise ConfigError(f"{self.policy_files}: give one file or more, no two of the same name", "policy_files")
