"""Measure a policy on held-out prompts: reward of plain samples, KL to the initial policy, response length."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from nemo_aligner.config.entry import script
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.load import load_config


@script("evaluate_policy", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, EvaluationConfig)
    from nemo_aligner.stages.offline.evaluation import run

    run(config)


if __name__ == "__main__":
    main()
