"""Score responses with a reward model, and select or rewrite them by their rewards (`processor`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_aligner.config.entry import script
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.load import load_config
from nemo_aligner.config.offline import LabelerConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("megatron_reward_labeler", CONF / "offline", output="output_file")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, LabelerConfig)
    from nemo_aligner.stages.offline.reward_labeler import run

    run(config)
