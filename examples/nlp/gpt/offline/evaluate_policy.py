"""Measure a policy on held-out prompts: reward of plain samples, KL to the initial policy, response length."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[4]))  # the clone, where it is not installed

from nemo_aligner.config.entry import script
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.load import load_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("evaluate_policy", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, EvaluationConfig)
    from nemo_aligner.stages.offline.evaluation import run

    run(config)


if __name__ == "__main__":
    main()
