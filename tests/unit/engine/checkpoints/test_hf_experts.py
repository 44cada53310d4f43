"""Models with experts: the logits of transformers, and the way back bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.archive_weights import load_weights, whole_tensors
from nemo_aligner.engine.checkpoints.hf_config import architecture_of, to_hf_config
from nemo_aligner.engine.checkpoints.hf_folder import read_hf_folder
from nemo_aligner.engine.checkpoints.hf_tensors import load_tensors
from nemo_aligner.engine.checkpoints.hf_weights import to_hf, to_megatron
from nemo_aligner.engine.checkpoints.nemo_archive import open_archive, read_architecture, save_archive
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.conversion import Checkpoint, with_first_layers
from nemo_aligner.engine.model.build import RunOptions, build_model, padded_vocab_size
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import CheckpointError
from tests.hugging_face import random_model

pytestmark = pytest.mark.processes  # none is started, but they take as long

SHAPE = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3 = {"head_dim": 16, "moe_intermediate_size": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {}),
    "mixtral, window": ("Mixtral", {"sliding_window": 6, "num_experts_per_tok": 3}),
    "qwen3": ("Qwen3Moe", QWEN3),
    "qwen3, normed": ("Qwen3Moe", {**QWEN3, "norm_topk_prob": True, "attention_bias": True}),
    "qwen3, window": (
        "Qwen3Moe",
        {**QWEN3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3, every second layer": ("Qwen3Moe", {**QWEN3, "decoder_sparse_step": 2}),
    "qwen3, some layers without": ("Qwen3Moe", {**QWEN3, "mlp_only_layers": [0], "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def hugging_face(family: str, extra: dict[str, Any]) -> torch.nn.Module:
    return random_model(family, {**SHAPE, **extra})


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_and_the_way_back_is_exact(case: str, tmp_path: Path) -> None:
    model = hugging_face(*CASES[case])
    model.save_pretrained(tmp_path)
    tensors = load_tensors(tmp_path)
    arch = architecture_of(json.loads((tmp_path / "config.json").read_text()))
    ours = build_model(arch, RunOptions()).eval()
    converted = to_megatron(arch, tensors, padded_vocab_size(arch, 1))
    missing, unexpected = ours.load_state_dict(converted, strict=False)
    assert not unexpected
    assert all("_extra_state" in name for name in missing if not name.startswith("output_layer"))
    draw = torch.Generator().manual_seed(1)  # such that no router has a near tie, which rounding would decide
    tokens = torch.randint(0, arch.vocab_size, (3, 20), generator=draw)
    with torch.no_grad():
        expected = model(tokens).logits
        found = ours(tokens, torch.arange(20).expand(3, 20), None)[..., : arch.vocab_size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    back = to_hf(arch, converted)
    assert set(back) == set(tensors)
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors[name]), name
    assert architecture_of(to_hf_config(arch, "float32")) == replace(arch, kv_channels=arch.head_dim)
    assert Architecture.from_nemo(arch.to_nemo()) == arch


@pytest.mark.parametrize("case", ["mixtral", "qwen3, some layers without"])
def test_a_folder_and_the_archive_made_of_it_hold_the_same_numbers(
    case: str, tmp_path: Path, cluster: MegatronCluster
) -> None:
    hugging_face(*CASES[case]).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(byte_tokenizer())
    arch, tensors, _ = read_hf_folder(tmp_path / "hf")
    arch = replace(arch, precision="32", tokenizer=BYTE_TOKENIZER)
    weights, shapes = to_megatron(arch, tensors, padded_vocab_size(arch, 1)), RunOptions(shapes_only=True)
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    save_archive(tmp_path / "m.nemo", build_model(arch, shapes), arch, tokenizer, cluster, weights)
    assert read_architecture(tmp_path / "m.nemo", key="k") == arch
    from_folder, from_archive = build_model(arch, RunOptions()), build_model(arch, RunOptions())
    load_weights(from_folder, tmp_path / "hf", cluster)
    with open_archive(tmp_path / "m.nemo", cluster, key="k") as folder:
        load_weights(from_archive, folder, cluster)
        back = to_hf(arch, whole_tensors(build_model(arch, shapes), folder))
        assert set(back) == set(tensors)
        assert all(torch.equal(back[name], tensors[name]) for name in back)
    for name, parameter in from_folder.named_parameters():
        assert torch.equal(parameter, from_archive.get_parameter(name)), name


def test_of_the_first_layers_those_with_experts_keep_them() -> None:
    arch = Architecture(3, 8, 16, 2, 9, num_moe_experts=4, moe_layer_freq=[0, 0, 1])
    checkpoint = Checkpoint(arch, None, b"")
    assert with_first_layers(checkpoint, 2).arch == Architecture(2, 8, 16, 2, 9, moe_layer_freq=[0, 0])
    assert with_first_layers(checkpoint, 3).arch == arch


@pytest.mark.parametrize(
    ("family", "extra", "said"),
    [
        ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("Qwen3Moe", {"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
        ("Qwen2Moe", {}, "an expert that every token shares"),
        ("Mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not above 1, and one weight that is normed"),
        ("Qwen3Moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1 is not above 1, and"),
        ("Qwen3Moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not a whole number from 1 on"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family: str, extra: dict[str, Any], said: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **extra}).to_dict()
    with pytest.raises(CheckpointError, match=said):
        architecture_of({**config, "architectures": [f"{family}ForCausalLM"]})


def test_shapes_that_no_architecture_has_are_not_written() -> None:
    arch = Architecture(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, vocab_size=9)
    windows = {"qk_layernorm": True, "window_size": 4, "window_layers": [1]}
    for own in ({"moe_router_pre_softmax": True}, {"moe_layer_freq": 2}, {"moe_ffn_hidden_size": 8}, windows):
        with pytest.raises(CheckpointError, match="experts of this kind"):
            to_hf_config(replace(arch, num_moe_experts=4, **own), "float32")
