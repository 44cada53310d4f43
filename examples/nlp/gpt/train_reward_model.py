"""Train a reward model on pairs of texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the clone, where it is not installed

from nemo_aligner.config.aliases import TRAINING
from nemo_aligner.config.entry import script
from nemo_aligner.config.load import load_config
from nemo_aligner.config.supervised import RMConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("training_rm", Path(__file__).resolve().parent / "conf", TRAINING)
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, RMConfig, TRAINING)
    from nemo_aligner.stages.supervised.reward_training import run

    run(config)


if __name__ == "__main__":
    main()
