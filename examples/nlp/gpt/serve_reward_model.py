"""Serve a reward model over HTTP (PyTriton; any KServe-v2 client)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the clone, where it is not installed

from nemo_aligner.config.aliases import SERVING
from nemo_aligner.config.entry import script
from nemo_aligner.config.load import load_config
from nemo_aligner.config.serving import ServerConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("inference_rm", Path(__file__).resolve().parent / "conf", SERVING)
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, ServerConfig, SERVING)
    from nemo_aligner.stages.serving.rewards import run

    run(config)


if __name__ == "__main__":
    main()
