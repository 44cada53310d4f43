"""Generate `data.n` responses for every prompt of a JSONL file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[4]))  # the clone, where it is not installed

from nemo_aligner.config.entry import script
from nemo_aligner.config.load import load_config
from nemo_aligner.config.offline import SamplerConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("megatron_random_sampler", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, SamplerConfig)
    from nemo_aligner.stages.offline.random_sampler import run

    run(config)


if __name__ == "__main__":
    main()
