"""Measure a policy on held-out prompts: reward of plain samples, KL to the initial policy, response length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_aligner.config.entry import script
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.load import load_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("evaluate_policy", CONF / "offline", output="output_file")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, EvaluationConfig)
    from nemo_aligner.stages.offline.evaluation import run

    run(config)
