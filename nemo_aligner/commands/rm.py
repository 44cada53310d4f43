"""Train a reward model on pairs of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_aligner.config.aliases import TRAINING
from nemo_aligner.config.entry import script
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.load import load_config
from nemo_aligner.config.supervised import RMConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("training_rm", CONF / "gpt", TRAINING, output="exp_manager.explicit_log_dir")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, RMConfig, TRAINING)
    from nemo_aligner.stages.supervised.reward_training import run

    run(config)
