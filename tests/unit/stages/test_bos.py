"""BOS that is asked for is written, or the key that asks for it is refused: never passed over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.config.offline import OfflineDataConfig, SamplerConfig
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.supervised import SFTConfig
from nemo_aligner.data.blending import blend
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.data.judged_text import TextEncoder
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.offline.random_sampler import Prompts, draw
from nemo_aligner.stages.reinforce.drawing import encode
from nemo_aligner.stages.serving.generation import encoded
from nemo_aligner.stages.supervised.sft import make_examples
from tests.fakes import ByteTokenizer

POLICY: Any = SimpleNamespace(tokenizer=ByteTokenizer(), max_sequence_length=64, append_eod=False)
NOTHING: Any = None


def sampler(rows: Any) -> None:
    cfg = SamplerConfig(gpt_model_file="m", output_file="o")
    cfg.inference.add_BOS = True
    Prompts(cfg, rows, POLICY)


def sampler_data(rows: Any) -> None:
    cfg = SamplerConfig(gpt_model_file="m", output_file="o")
    cfg.data.add_bos = True
    draw(cfg, rows, range(1), POLICY, NOTHING, NOTHING)


def labeler(rows: Any) -> None:
    TextEncoder(OfflineDataConfig(add_bos=True), POLICY)


def actor(rows: Any) -> None:
    cfg = ReinforceConfig()
    cfg.model.ppo.sampling_params.add_BOS = True
    encode(cfg, POLICY, rows, None)


def generate(rows: Any) -> None:
    cfg = GenerationConfig()
    cfg.inference.add_BOS = True
    encoded(cfg, [], POLICY)


def sft(rows: Any) -> None:
    cfg = SFTConfig()
    cfg.model.data.train_ds.add_bos = True
    make_examples(cfg, cfg.model.data.train_ds, POLICY, rows, "model.data.train_ds", None)


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        (sampler, "inference.add_BOS"),
        (sampler_data, "data.add_bos"),
        (labeler, "data.add_bos"),
        (actor, "model.ppo.sampling_params.add_BOS"),
        (generate, "inference.add_BOS"),
        (sft, "model.data.train_ds.add_bos"),
    ],
)
def test_a_tokenizer_without_bos_is_named_where_one_is_asked_for(stage: Any, key: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    rows = blend([load_rows(tmp_path / "rows.jsonl", required={})], [1.0], key="k")
    with pytest.raises(ConfigError, match=rf"^{key}: the model's tokenizer has no BOS token$"):
        stage(rows)
