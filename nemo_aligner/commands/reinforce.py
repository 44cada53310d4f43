"""Train a policy by REINFORCE against a reward server: RLOO, ReMax, or no baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_aligner.config.aliases import REINFORCE
from nemo_aligner.config.entry import script
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.load import load_config
from nemo_aligner.config.reinforce import ReinforceConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("gpt_rs_actor", CONF / "gpt", REINFORCE, output="exp_manager.explicit_log_dir")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, ReinforceConfig, REINFORCE)
    from nemo_aligner.stages.reinforce.start import run

    run(config)
