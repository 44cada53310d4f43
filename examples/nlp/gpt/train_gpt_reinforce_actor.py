"""Train a policy by REINFORCE against a reward server: RLOO, ReMax, or no baseline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the clone, where it is not installed

from nemo_aligner.config.aliases import REINFORCE
from nemo_aligner.config.entry import script
from nemo_aligner.config.load import load_config
from nemo_aligner.config.reinforce import ReinforceConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("gpt_rs_actor", Path(__file__).resolve().parent / "conf", REINFORCE)
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, ReinforceConfig, REINFORCE)
    from nemo_aligner.stages.reinforce.start import run

    run(config)


if __name__ == "__main__":
    main()
