"""Which Hugging Face architecture a shape is, and what stands in the way of one that is none."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_aligner.config.architecture import RopeScaling
from nemo_aligner.engine.checkpoints.hf_config import SUPPORTED, architecture_of, to_hf_config
from nemo_aligner.engine.checkpoints.hf_folder import write_hf_folder
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.errors import CheckpointError
from tests.tiny import ARCH

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 130, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
WINDOW = {"window_size": 5}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "Llama"),
        ({"mlp_bias": True}, "Llama"),
        ({"qkv_bias": True, "proj_bias": True}, "Llama"),
        ({"qkv_bias": True, "proj_bias": True, "mlp_bias": True}, "Llama"),
        ({"qkv_bias": True}, "Qwen2"),
        ({"qkv_bias": True, **WINDOW}, "Qwen2"),
        ({"qkv_bias": True, **WINDOW, "window_layers": [1]}, "Qwen2"),
        ({"qk_layernorm": True}, "Qwen3"),
        ({"qk_layernorm": True, "qkv_bias": True, "proj_bias": True}, "Qwen3"),
        ({"qk_layernorm": True, **WINDOW, "window_layers": [0]}, "Qwen3"),
        (WINDOW, "Mistral"),
        ({**WINDOW, "window_layers": [0, 1]}, "Mistral"),
        ({**WINDOW, "window_layers": []}, "Llama"),
    ],
)
def test_a_shape_is_written_as_the_architecture_it_is_and_read_as_it_was(changes: dict[str, Any], name: str) -> None:
    arch = replace(ARCH, rotary_base=5e3, layernorm_epsilon=1e-6, attention_dropout=0.25, **changes)
    config = to_hf_config(arch, "bfloat16")
    assert config["architectures"] == [f"{name}ForCausalLM"]
    theirs = transformers.AutoConfig.for_model(**config)
    assert type(theirs).__name__ == f"{name}Config"
    assert (theirs.head_dim, theirs.hidden_act, theirs.attention_dropout) == (8, "silu", 0.25)
    assert config["dtype"] == "bfloat16"
    read = architecture_of(config)
    for field in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "query_groups", "head_dim",
                  "vocab_size", "max_position_embeddings", "encoder_seq_length", "rotary_base", "layernorm_epsilon",
                  "activation", "qkv_bias", "has_proj_bias", "has_mlp_bias", "qk_layernorm", "attention_dropout",
                  "share_embeddings_and_output_weights"):  # fmt: skip
        assert getattr(read, field) == getattr(arch, field), field
    assert [read.window_of(i) for i in range(2)] == [arch.window_of(i) for i in range(2)]


def test_rows_may_be_as_long_in_a_folder_as_in_the_archive() -> None:
    for row, table in ((64, 16), (16, 64)):
        arch = replace(ARCH, encoder_seq_length=row, max_position_embeddings=table)
        assert to_hf_config(arch, "float32")["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"normalization": "layernorm"}, "its norms or biases"),
        ({"bias": True}, "its norms or biases"),
        ({"position_embedding_type": "learned_absolute"}, "its position embedding"),
        ({"rotary_percentage": 0.5}, "its position embedding"),
        ({"rope_freq_factors": [1.0] * 4}, "its rotary frequencies, which came from a GGUF file"),
        ({"activation": "gelu"}, "its activation gelu"),
        ({"proj_bias": True}, "a bias on the attention's output alone"),
        ({**WINDOW, "mlp_bias": True}, "a sliding window beside biases"),
        ({"qk_layernorm": True, "qkv_bias": True}, "this mixture of windows, norms and biases"),
        ({"qkv_bias": True, "mlp_bias": True}, "this mixture of windows, norms and biases"),
        ({"qk_layernorm": True, "mlp_bias": True}, "this mixture of windows, norms and biases"),
        ({**WINDOW, "window_layers": [1]}, "this mixture of windows, norms and biases"),
        ({**WINDOW, "qkv_bias": True, "proj_bias": True}, "this mixture of windows, norms and biases"),
    ],
)
def test_a_shape_that_is_none_of_them_says_why(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^no Hugging Face architecture that is written here has {what}$"):
        to_hf_config(replace(ARCH, **changes), "float32")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": None}, r"architecture none is not one of LlamaForCausalLM, Qwen2ForCausalLM, .*"),
        ({"architectures": ["Olmo2ForCausalLM"]}, "Olmo2ForCausalLM is not supported: it has norms after attention .*"),
        ({"hidden_act": "tanh"}, "hidden_act=tanh is not one of silu, gelu, .*"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling type 'yarn' is not one of default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 2}}, "rope_scaling: beta=2 is not understood"),
        ({"unheard_of": 2}, "unheard_of=2 is not understood"),
        ({"model_type": "gemma"}, "model_type=gemma is not llama, that of LlamaForCausalLM"),
        ({"is_causal": False}, "is_causal=False is not supported: tokens would see those after them"),
        ({"model_type": "qwen3"}, "model_type=qwen3 is not llama, that of LlamaForCausalLM"),
    ],
)
def test_a_config_that_is_not_understood_is_named_with_its_file(changes: dict[str, Any], said: str) -> None:
    config = {**SHAPE, **changes}
    with pytest.raises(CheckpointError, match=rf"^config\.json: {said}$"):
        architecture_of(config)
    with pytest.raises(CheckpointError, match=rf"^other: {said}$"):
        architecture_of(config, "other")


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name != "Phi3ForCausalLM"])
@pytest.mark.parametrize("block", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_heads_are_turned_in_part_where_transformers_does_so_and_nowhere_else(name: str, block: dict[str, Any]) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if name.startswith(("Mixtral", "Qwen3Moe")) else {}
    config = {**SHAPE, **experts, "num_key_value_heads": 2, "architectures": [name]}
    with pytest.raises(CheckpointError, match=rf"^config\.json: partial_rotary_factor=0.5 is not 1, and {name} turns"):
        architecture_of({**config, **block})
    assert architecture_of({**config, "partial_rotary_factor": 1.0}).rotary_percentage == 1.0
    assert architecture_of({**SHAPE, "architectures": ["Phi3ForCausalLM"], **block}).rotary_percentage == 0.5


@pytest.mark.parametrize("name", sorted(SHAPE.keys() - {"architectures"}))
def test_a_size_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json has no {name}$"):
        architecture_of({key: value for key, value in SHAPE.items() if key != name})


def test_what_a_config_leaves_out_is_as_transformers_has_it() -> None:
    arch = architecture_of(SHAPE)
    assert architecture_of({**SHAPE, "is_causal": True}) == arch
    assert (arch.query_groups, arch.head_dim, arch.activation, arch.attention_dropout) == (4, 8, "fast-swiglu", 0.0)
    assert not any((arch.qkv_bias, arch.has_proj_bias, arch.has_mlp_bias, arch.share_embeddings_and_output_weights))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", SUPPORTED)
def test_what_a_config_of_any_family_leaves_out_is_as_transformers_has_it(name: str, windows: bool) -> None:
    sizes = {"num_attention_heads": 32, "hidden_size": 64, "num_hidden_layers": 30, "pad_token_id": None}
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if name.startswith(("Mixtral", "Qwen3Moe")) else {}
    asked = {"use_sliding_window": True} if windows and name.startswith("Qwen") else {}
    short = {**SHAPE, **sizes, **experts, **asked, "architectures": [name]}
    theirs = getattr(transformers, f"{name.removesuffix('ForCausalLM')}Config")(**short).to_dict()
    one, other = (replace(found, kv_channels=found.head_dim) for found in map(architecture_of, (short, theirs)))
    assert replace(one, num_query_groups=one.query_groups) == replace(other, num_query_groups=other.query_groups)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}


@pytest.mark.parametrize(("beside", "within"), [({}, {}), ({"at": 16}, {}), ({}, {"at": 16}), ({"at": 16}, {"at": 32})])
@pytest.mark.parametrize("block", ["rope_scaling", "rope_parameters"])
def test_the_length_that_llama3_scaling_begins_from_is_found_where_transformers_finds_it(
    beside: dict[str, int], within: dict[str, int], block: str
) -> None:
    name = "original_max_position_embeddings"
    outer, inner = ({name: given["at"]} if given else {} for given in (beside, within))
    config = {**SHAPE, **outer, "rope_theta": 5e3, block: {**LLAMA3, **inner}}
    theirs = transformers.LlamaConfig(**copy.deepcopy(config))
    LlamaRotaryEmbedding(theirs)  # looks once more, and may find another
    assert architecture_of(config).rope_scaling == RopeScaling("llama3", 4.0, 2.0, 3.0, theirs.rope_parameters[name])


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_factor_of_a_scaling_is_never_made_up(missing: str) -> None:
    for kind in ("llama3", "linear") if missing == "factor" else ("llama3",):
        block = {name: value for name, value in LLAMA3.items() if name != missing} | {"rope_type": kind}
        with pytest.raises(CheckpointError, match=rf"^config\.json: rope_scaling has no {missing}$"):
            architecture_of({**SHAPE, "rope_scaling": block})


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 2.0}])
def test_a_rope_scaling_is_not_passed_over_for_rope_parameters(scaling: dict[str, Any]) -> None:
    plain = {"rope_type": "default", "rope_theta": 5e3}
    with pytest.raises(CheckpointError, match=r"^config\.json: rope_scaling and rope_parameters differ; leave"):
        architecture_of({**SHAPE, "rope_parameters": plain, "rope_scaling": scaling})
    for other in (None, {}, plain):
        assert architecture_of({**SHAPE, "rope_parameters": plain, "rope_scaling": other}).rotary_base == 5e3


def test_a_tokenizer_that_has_no_such_form_is_refused(tmp_path: Path) -> None:
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    for block, said in (
        ({**BYTE_TOKENIZER, "special_tokens": ["<x>"]}, r"\(library huggingface\).* that has its special_tokens"),
        ({"additional_special_tokens": ["<x>"]}, r"\(library None\) has no Hugging Face form that has its .*"),
    ):
        with pytest.raises(CheckpointError, match=rf"^the archive's tokenizer {said}$"):
            write_hf_folder(tmp_path, replace(ARCH, tokenizer=block), {}, tokenizer)
    tokenizer.files = {"vocab.json": b"", "merges.txt": b""}
    for library in ("megatron", "sentencepiece"):
        said = rf"the archive's tokenizer \(library {library}\) has no Hugging Face form"
        with pytest.raises(CheckpointError, match=rf"^{said}$"):
            write_hf_folder(tmp_path, replace(ARCH, tokenizer={"library": library}), {}, tokenizer)
    assert list(tmp_path.iterdir()) == []
