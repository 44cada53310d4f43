"""A GGUF file gives the logits of the model it was made from, and splits texts as its tokenizer does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.gguf_tokenizer import tokenizer_json, tokenizer_settings
from nemo_aligner.engine.checkpoints.gguf_weights import read_gguf, unpermuted
from nemo_aligner.engine.checkpoints.hf_weights import to_megatron
from nemo_aligner.engine.checkpoints.tokenizer import FastTokenizer
from nemo_aligner.engine.model.build import RunOptions, build_model, padded_vocab_size
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import CheckpointError

SHAPE = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOKENS = torch.arange(60).reshape(3, 20) * 4


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def llama(**extra: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **extra})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The row order of q and k in GGUF files: pairs of the rotary embedding side by side."""
    half = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return half.swapaxes(1, 2).reshape(tensor.shape)


def byte_tokens() -> list[str]:
    """Byte-level BPE's names of the bytes, and three special tokens."""
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<|eot|>"]


def write_gguf(
    path: Path,
    model: transformers.LlamaForCausalLM,
    values: dict[str, Any] | None = None,
    tensors: dict[str, list[float]] | None = None,
) -> Path:
    """As llama.cpp's converter lays it out; `values` are more of the file's settings, `tensors` more vectors."""
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(byte_tokens())
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges([])
    for name, number in (("bos", 256), ("eos", 257), ("eot", 258)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, value in (values or {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](name, value)
    for name, vector in (tensors or {}).items():
        writer.add_tensor(name, np.array(vector, np.float32))
    for name, tensor in weights.items():
        array, (stem, _, kind) = tensor.numpy(), name.rpartition(".")
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in stem:
                array = interleaved(array, heads)
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{NAMES[rest]}.{kind}", np.ascontiguousarray(array))
        else:
            writer.add_tensor(f"{NAMES[stem]}.{kind}", np.ascontiguousarray(array))
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "frequencies of Llama 3": ({"rope_parameters": LLAMA3}, {}),
    "linear scaling": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
    ),
    "no scaling": ({}, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}),
    "the older name of linear scaling": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"llama.rope.scale_linear": 2.0},
    ),
    "biases of attention": ({"attention_bias": True}, {}),
    "biases of both": ({"attention_bias": True, "mlp_bias": True}, {}),
    "wide heads": ({"head_dim": 16}, {"llama.attention.key_length": 16, "llama.attention.value_length": 16}),
    "tied": ({"tie_word_embeddings": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_model_it_was_made_from(case: str, tmp_path: Path) -> None:
    extra, values = CASES[case]
    model = llama(**extra)
    if case == "tied":
        del model.lm_head
    arch, tensors, _ = read_gguf(write_gguf(tmp_path / "m.gguf", model, values))
    ours = build_model(arch, RunOptions()).eval()
    ours.load_state_dict(to_megatron(arch, tensors, padded_vocab_size(arch, 1)), strict=False)
    with torch.no_grad():
        found = ours(TOKENS, torch.arange(20).expand(3, 20), None)[..., : arch.vocab_size]
        hidden = model.model(TOKENS).last_hidden_state
        output = model.model.embed_tokens.weight if case == "tied" else model.lm_head.weight
    torch.testing.assert_close(found, hidden @ output.T, atol=1e-4, rtol=1e-4)


def turned_by(angles: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """`pairs` `[..., T/2, 2]`, each turned by its angle."""
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))


@pytest.mark.parametrize("turned", [2, 4, 8])
def test_of_heads_that_are_turned_in_part_the_rows_are_those_that_the_file_turns(turned: int) -> None:
    """llama.cpp turns rows 0 and 1, 2 and 3, ... of a head's first `turned`; here row i goes with i + turned/2."""
    heads, width = 3, 8
    query, key = torch.randn(2, heads, width)
    angles = torch.rand(turned // 2)

    def in_file(vector: torch.Tensor) -> torch.Tensor:
        first = turned_by(angles, vector[:, :turned].unflatten(1, (-1, 2))).flatten(1)
        return torch.cat((first, vector[:, turned:]), dim=1)

    def here(vector: torch.Tensor) -> torch.Tensor:
        rows = unpermuted(vector.flatten(), heads, turned).view(heads, width)
        first = turned_by(angles, rows[:, :turned].unflatten(1, (2, -1)).transpose(1, 2)).transpose(1, 2).flatten(1)
        return torch.cat((first, rows[:, turned:]), dim=1)

    score = (in_file(query) * key).sum(1)
    unturned = unpermuted(key.flatten(), heads, turned).view(heads, width)
    torch.testing.assert_close((here(query) * unturned).sum(1), score)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"llama.expert_count": 8}, "expert_count=8 is not understood"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type=yarn is not none or linear"),
        ({"llama.logit_scale": 0.5}, "logit_scale=0.5 is not understood"),
        ({"llama.attention.key_length": 24}, r"m\.gguf: blk\.0\.attn_q\.weight is \[32, 32\], and .* \[96, 32\]$"),
        ({"llama.attention.key_length": 4}, r"m\.gguf: blk\.0\.attn_q\.weight is \[32, 32\], and .* \[16, 32\]$"),
    ],
)
def test_settings_that_are_not_understood_or_do_not_fit_the_weights_are_named(
    values: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_gguf(write_gguf(tmp_path / "m.gguf", llama(), values))


@pytest.mark.parametrize("factors", [[1.0], [1.0] * 3, [1.0] * 8, [1.0, 0.0, 1.0, 1.0]])
def test_frequencies_are_one_for_each_that_a_head_has(factors: list[float], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama(), tensors={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match=r"m\.gguf: llama: rope_freqs\.weight=\[.*\] is not 4 numbers above 0$"):
        read_gguf(path)
    right = write_gguf(tmp_path / "r.gguf", llama(), tensors={"rope_freqs.weight": [1.0, 2.0, 3.0, 4.0]})
    assert read_gguf(right)[0].rope_freq_factors == [1.0, 2.0, 3.0, 4.0]


def test_settings_that_few_files_have_say_what_they_say(tmp_path: Path) -> None:
    bare, _, _ = read_gguf(write_gguf(tmp_path / "bare.gguf", llama()))
    assert (bare.window_size, bare.rope_scaling, bare.rope_freq_factors) == (None, None, None)
    assert (bare.rotary_percentage, bare.rotary_base) == (1.0, 10000.0)
    assert (bare.kv_channels, bare.query_groups, bare.layernorm_epsilon) == (8, 2, 1e-5)
    assert (bare.encoder_seq_length, bare.max_position_embeddings) == (64, 64)
    assert not any((bare.qkv_bias, bare.has_proj_bias, bare.has_mlp_bias, bare.share_embeddings_and_output_weights))
    more = {"llama.attention.sliding_window": 5, "llama.rope.dimension_count": 4, "llama.rope.scaling.finetuned": 1}
    arch, _, _ = read_gguf(write_gguf(tmp_path / "more.gguf", llama(), more))
    assert (arch.window_size, arch.rotary_percentage) == (5, 0.5)
    with pytest.raises(
        CheckpointError, match=r"m\.gguf: attention\.key_length and attention\.value_length differ, which"
    ):
        read_gguf(write_gguf(tmp_path / "m.gguf", llama(), {"llama.attention.value_length": 16}))
    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "other.gguf"
    with pytest.raises(CheckpointError, match=rf"^--input {path}: GGUF architecture 'gpt2' is not llama$"):
        read_gguf(path)


def test_the_files_special_tokens_and_chat_template_are_the_archives(tmp_path: Path) -> None:
    given = {"tokenizer.ggml.padding_token_id": 256, "tokenizer.chat_template": "{{ x }}"}
    arch, _, _ = read_gguf(write_gguf(tmp_path / "m.gguf", llama(), given))
    assert arch.tokenizer == {
        "library": "huggingface", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>",
        "stop_tokens": ["<|eot|>"], "chat_template": "{{ x }}",
    }  # fmt: skip
    tokens = ["a", "b"]
    assert tokenizer_settings({"tokens": tokens, "eos_token_id": 0, "eot_token_id": 0, "eom_token_id": 1}, None) == {
        "library": "huggingface", "bos_token": None, "eos_token": "a", "pad_token": None, "stop_tokens": ["b"],
        "chat_template": None,
    }  # fmt: skip
    assert "stop_tokens" not in tokenizer_settings({"tokens": tokens, "eos_token_id": 0, "eot_token_id": 0}, None)


def test_a_file_cut_short_is_one_clear_fault(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"m\.gguf: not a whole GGUF file"):
        read_gguf(path)


def test_the_end_of_a_turn_ends_a_response_too(tmp_path: Path) -> None:
    arch, _, content = read_gguf(write_gguf(tmp_path / "m.gguf", llama()))
    tokenizer = FastTokenizer(content, arch.tokenizer)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (257, {257, 258})


def pieces(pre: str, text: str) -> list[str]:
    """What `text` is split into before merging: the pieces between which no merge goes."""
    from tokenizers import Tokenizer

    values = {"model": "gpt2", "pre": pre, "tokens": byte_tokens(), "merges": [], "token_type": [1] * 256 + [3] * 3}
    tokenizer = Tokenizer.from_str(tokenizer_json(values).decode())
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", ["I", "'M", " ", "123", "45"]),
        ("qwen2", ["I", "'M", " ", "1", "2", "3", "4", "5"]),
        ("gpt-2", ["I", "'", "M", " 12345"]),
        ("smollm", ["I", "'", "M", " ", "1", "2", "3", "4", "5"]),
    ],
)
def test_texts_are_split_as_the_file_says(pre: str, expected: list[str]) -> None:
    assert pieces(pre, "I'M 12345") == expected


@pytest.mark.parametrize(("pre", "tokens"), [("gpt-2", ["the", "a", "t"]), ("llama-bpe", ["the", "at"])])
def test_letters_are_merged_as_the_file_says_and_whole_words_where_its_kind_knows_them(
    pre: str, tokens: list[str]
) -> None:
    vocabulary = [*byte_tokens(), "th", "the", "at"]  # nothing merges a and t
    values = {"model": "gpt2", "pre": pre, "tokens": vocabulary, "merges": ["t h", "th e"]}
    content = tokenizer_json({**values, "token_type": [1] * 256 + [3] * 3 + [1] * 3})
    tokenizer = FastTokenizer(content, {"eos_token": "</s>"})
    assert [tokenizer.piece(i) for i in tokenizer.encode("the</s>")] == ["the", "</s>"]
    assert [tokenizer.piece(i) for word in ("the", "at") for i in tokenizer.encode(word)] == tokens
    assert tokenizer.decode(tokenizer.encode("the é  at</s>")) == "the é  at"


def test_a_token_that_the_file_gives_as_one_is_never_cut_and_stays_in_the_text() -> None:
    vocabulary = [*byte_tokens(), "<think>", "\t\t", "<unused>", "<unk>"]
    types = [1] * 256 + [3] * 3 + [4, 4, 5, 2]
    content = tokenizer_json({"model": "gpt2", "pre": "gpt-2", "tokens": vocabulary, "merges": [], "token_type": types})
    tokenizer = FastTokenizer(content, {"eos_token": "</s>"})
    assert [tokenizer.piece(i) for i in tokenizer.encode("a<think>\t\t</s><unk>")] == [
        *("a", "<think>", "\t\t", "</s>", "<unk>"),
    ]
    assert len(tokenizer.encode("<unused>")) == 8
    assert tokenizer.decode(tokenizer.encode("a<think>\t\tb</s><unk>")) == "a<think>\t\tb"
    assert tokenizer.vocab_size == len(vocabulary)


def test_a_way_of_splitting_that_is_not_known_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre=viking is not one of gpt-2, smollm, llama-bpe"):
        pieces("viking", "x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model=llama: only byte-level BPE"):
        tokenizer_json({"model": "llama"})
