"""Train a reward model on pairs of texts."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from nemo_aligner.config.entry import script
from nemo_aligner.config.load import load_config
from nemo_aligner.config.supervised import RMConfig


@script("training_rm", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, RMConfig)
    from nemo_aligner.stages.supervised.reward_training import run

    run(config)


if __name__ == "__main__":
    main()
