"""Models for tests that come as far as to read what a model is, and not to load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from nemo_aligner.engine.checkpoints.hf_config import to_hf_config
from nemo_aligner.engine.checkpoints.tokenizer import byte_tokenizer
from tests.tiny import ARCHIVED


def models_without_weights(folder: Path) -> None:
    """In `folder`: extracted archives `policy` and `judge`, a reward model, and a Hugging Face folder `hf`."""
    for name, arch in (("policy", ARCHIVED), ("judge", replace(ARCHIVED, reward_model_type="binary_ranking"))):
        (folder / name).mkdir()
        (folder / name / "model_config.yaml").write_text(yaml.safe_dump(arch.to_nemo()))
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps(to_hf_config(ARCHIVED, "float32")))
    (folder / "hf/tokenizer.json").write_bytes(byte_tokenizer())
