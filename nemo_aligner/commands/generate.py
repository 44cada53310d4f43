"""Generate responses to a few prompts, or serve the model over HTTP (OpenAI's API and NeMo's PUT /generate)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_aligner.config.entry import script
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.config.load import load_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


@script("megatron_gpt_inference", CONF / "gpt", output="output_file")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, GenerationConfig)
    from nemo_aligner.stages.serving.generation import run

    run(config)
