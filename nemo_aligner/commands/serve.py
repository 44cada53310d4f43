"""Serve a reward model over HTTP (PyTriton; any KServe-v2 client)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_aligner.config.aliases import SERVING
from nemo_aligner.config.entry import script
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.load import load_config
from nemo_aligner.config.serving import ServerConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("inference_rm", CONF / "gpt", SERVING)
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, ServerConfig, SERVING)
    from nemo_aligner.stages.serving.rewards import run

    run(config)
