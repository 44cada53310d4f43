"""Generate responses to a few prompts, or serve the model over HTTP (OpenAI's API and NeMo's PUT /generate)."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from nemo_aligner.config.entry import script
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.config.load import load_config


@script("megatron_gpt_inference", Path(__file__).resolve().parent / "conf")
def main(cfg: DictConfig) -> None:
    config = load_config(cfg, GenerationConfig)
    from nemo_aligner.stages.serving.generation import run

    run(config)


if __name__ == "__main__":
    main()
