"""Score responses with a reward model, and select or rewrite them by their rewards (`processor`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[4]))  # the clone, where it is not installed

from nemo_aligner.config.entry import script
from nemo_aligner.config.load import load_config
from nemo_aligner.config.offline import LabelerConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("megatron_reward_labeler", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, LabelerConfig)
    from nemo_aligner.stages.offline.reward_labeler import run

    run(config)


if __name__ == "__main__":
    main()
