"""Generate responses to a few prompts, or serve the model over HTTP (OpenAI's API and NeMo's PUT /generate)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the clone, where it is not installed

from nemo_aligner.config.entry import script
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.config.load import load_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("megatron_gpt_inference", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, GenerationConfig)
    from nemo_aligner.stages.serving.generation import run

    run(config)


if __name__ == "__main__":
    main()
