"""Generate `data.n` responses for every prompt of a JSONL file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_aligner.config.entry import script
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.load import load_config
from nemo_aligner.config.offline import SamplerConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("megatron_random_sampler", CONF / "offline", output="output_file")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, SamplerConfig)
    from nemo_aligner.stages.offline.random_sampler import run

    run(config)
