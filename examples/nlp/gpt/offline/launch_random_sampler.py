"""Generate `data.n` responses for every prompt of a JSONL file."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from nemo_aligner.config.entry import script
from nemo_aligner.config.load import load_config
from nemo_aligner.config.offline import SamplerConfig


@script("megatron_random_sampler", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, SamplerConfig)
    from nemo_aligner.stages.offline.random_sampler import run

    run(config)


if __name__ == "__main__":
    main()
