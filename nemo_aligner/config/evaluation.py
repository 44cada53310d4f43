"""Config of the policy evaluation: plain samples of a policy, their rewards, and how far it is from where it began."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from nemo_aligner.config.offline import SamplerConfig


@dataclass
class EvaluationConfig(SamplerConfig):
    reward_model_file: str = MISSING
    initial_policy_file: str | None = None  # KL is measured against it; null = no KL
