"""A Hugging Face folder is read as transformers reads it, or refused by the name of what is not understood."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.hf_folder import read_hf_folder, write_hf_folder
from nemo_aligner.engine.checkpoints.hf_weights import to_megatron
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.model.build import RunOptions, build_model, padded_vocab_size
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import CheckpointError

SHAPE = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
TOKENS = torch.arange(60).reshape(3, 20) * 4


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def change(path: Path, **values: Any) -> None:
    """Some entries of a JSON file; None takes one away."""
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **values}
    write(path, {name: value for name, value in content.items() if value is not None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it, with the byte tokenizer."""
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer())
    write(tmp_path / "tokenizer_config.json", {name: BYTE_TOKENIZER[f"{name}"] for name in ("bos_token", "eos_token")})
    return tmp_path


def theirs(folder: Path) -> torch.nn.Module:
    """The folder's model, by transformers; its from_pretrained does not go with Megatron in one process."""
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder, dtype=torch.float32))
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    model.load_state_dict({name: tensor for file in names for name, tensor in load_file(folder / file).items()})
    return model.eval()


def their_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return theirs(folder)(TOKENS).logits


def ours(folder: Path) -> torch.Tensor:
    arch, tensors, _ = read_hf_folder(folder)
    model = build_model(arch, RunOptions()).eval()
    model.load_state_dict(to_megatron(arch, tensors, padded_vocab_size(arch, 1)), strict=False)
    with torch.no_grad():
        return model(TOKENS, torch.arange(20).expand(3, 20), None)[..., : arch.vocab_size]


def tokenizer_of(folder: Path) -> FastTokenizer:
    arch, _, content = read_hf_folder(folder)
    return FastTokenizer(content, arch.tokenizer)


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Cut the weights over two files and an index; returns the tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    write(folder / "model.safetensors.index.json", {"weight_map": {n: f for f, part in files.items() for n in part}})
    return tensors


def test_the_index_decides_which_files_count(folder: Path) -> None:
    tensors = sharded(folder)
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, folder / "model-00003-of-00003.safetensors")
    torch.testing.assert_close(ours(folder), their_logits(folder), atol=1e-4, rtol=1e-4)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        read_hf_folder(folder)


def test_one_file_beside_an_index_of_others_is_refused_as_transformers_would_take_it_alone(folder: Path) -> None:
    tensors = sharded(folder)
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, folder / "model.safetensors")
    said = r"model\.safetensors\.index\.json names other files beside model\.safetensors; take one of them away$"
    with pytest.raises(CheckpointError, match=said):
        read_hf_folder(folder)
    write(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, "model.safetensors")})
    assert not ours(folder).any()


def test_several_files_without_an_index_are_refused(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 \*\.safetensors, and no model\.safetensors\.index\.json"):
        read_hf_folder(folder)


def test_files_that_are_cut_short_are_one_clear_fault(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        read_hf_folder(folder)
    (folder / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        read_hf_folder(folder)


def test_the_one_file_counts_whatever_its_name_and_the_usual_name_among_several(folder: Path) -> None:
    expected = ours(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert torch.equal(ours(folder), expected)
    (folder / "weights.safetensors").rename(folder / "model.safetensors")
    save_file({"other": torch.zeros(1)}, folder / "adapter.safetensors")
    assert torch.equal(ours(folder), expected)


def test_what_a_folder_lacks_is_named(folder: Path) -> None:
    tensors = sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = min(tensors)
    index["weight_map"][first] = index["weight_map"][sorted(tensors)[1]]  # in the other file
    write(folder / "model.safetensors.index.json", index)
    said = rf"model\.safetensors\.index\.json names {first}, which its file does not hold"
    with pytest.raises(CheckpointError, match=rf"^--input {folder}: {said}$"):
        read_hf_folder(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=rf"^--input {folder}: the folder has no \*\.safetensors$"):
        read_hf_folder(folder)
    write(folder / "config.json", [])
    with pytest.raises(CheckpointError, match=rf"^--input {folder}/config\.json: not a JSON object$"):
        read_hf_folder(folder)
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=rf"^--input {folder}: the folder has no {name}$"):
            read_hf_folder(folder)


def test_fp8_blocks_are_the_numbers_they_stand_for(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name, block = "model.layers.0.mlp.gate_proj.weight", 16
    scale = torch.tensor([[0.5, 2.0], [0.25, 1.0], [4.0, 0.125]])
    stored = torch.randn(40, 32).to(torch.float8_e4m3fn)  # not a multiple of the block
    expected = torch.empty(40, 32)
    for i, j in itertools.product(range(40), range(32)):
        expected[i, j] = float(stored[i, j]) * float(scale[i // block, j // block])
    tensors |= {name: stored, f"{name}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors")
    quantised = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    change(folder / "config.json", quantization_config=quantised)
    _, found, _ = read_hf_folder(folder)
    assert torch.equal(found[name], expected)
    assert not any(other.endswith("_scale_inv") for other in found)


@pytest.mark.parametrize(
    ("quantised", "says"),
    [
        ({"quant_method": "gptq"}, "quant_method=gptq is not fp8"),
        ({"quant_method": "fp8", "weight_per_tensor": True}, "weight_per_tensor=True is not understood"),
        (None, "is float8_e4m3fn without scales"),
    ],
)
def test_other_ways_of_quantising_are_refused(folder: Path, quantised: dict | None, says: str) -> None:
    if quantised is None:
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.gate_proj.weight"
        save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    else:
        change(folder / "config.json", quantization_config=quantised)
    with pytest.raises(CheckpointError, match=says):
        read_hf_folder(folder)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.bias", "model.embed_tokens.weight_scale"])
def test_a_tensor_that_nobody_asked_for_is_named(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 tensors that are not understood, among them {name}"):
        ours(folder)


def test_tensors_that_follow_from_the_settings_may_be_there(folder: Path) -> None:
    expected = ours(folder)
    tensors = load_file(folder / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **more}, folder / "model.safetensors")
    assert torch.equal(ours(folder), expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"logits_scaling": 8.0}, {"sliding_window": 5}, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 3}}, {"hidden_act": "quick_gelu"},
        {"num_local_experts": 8}, {"attn_logit_softcapping": 50.0},
    ],
)  # fmt: skip
def test_a_setting_that_is_not_understood_is_named(folder: Path, setting: dict[str, Any]) -> None:
    more: dict[str, Any] = {"rope_parameters": None} if "rope_scaling" in setting else {}
    change(folder / "config.json", **setting, **more)
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        read_hf_folder(folder)


def test_settings_that_are_off_or_known_to_change_nothing_are_let_through(folder: Path) -> None:
    change(folder / "config.json", num_experts_per_tok=0, use_cache=False, unsloth_version="2026.1", some_feature=False)
    change(folder / "config.json", is_llama_config=True, auto_map={"AutoConfig": "configuration_llama.LlamaConfig"})
    torch.testing.assert_close(ours(folder), their_logits(folder), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("Gemma2ForCausalLM", "soft caps"), ("Qwen2MoeForCausalLM", "every token"), ("GraniteForCausalLM", "multipliers"),
     ("GPT2LMHeadModel", "is not one of LlamaForCausalLM")],
)  # fmt: skip
def test_models_that_are_not_supported_say_what_stands_in_the_way(folder: Path, architecture: str, reason: str) -> None:
    change(folder / "config.json", architectures=[architecture])
    with pytest.raises(CheckpointError, match=f"{architecture}.*{reason}"):
        read_hf_folder(folder)


@pytest.mark.parametrize("source", ["special_tokens_map.json", "generation_config.json", "config.json"])
def test_eos_is_found_wherever_it_is_named(folder: Path, source: str) -> None:
    change(folder / "tokenizer_config.json", eos_token=None)
    change(folder / "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    named = {"eos_token": {"content": "<|eos|>"}} if source.startswith("special") else {"eos_token_id": 257}
    change(folder / source, **named)
    tokenizer = tokenizer_of(folder)
    assert tokenizer.eos_id == 257
    assert tokenizer.stop_ids == {257}


def test_several_eos_all_end_a_response(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[257, 10, 258])
    tokenizer = tokenizer_of(folder)
    assert tokenizer.eos_id == 257
    assert tokenizer.stop_ids == {257, 10, 258}


def test_of_several_chat_templates_the_default_one_counts(folder: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    change(folder / "tokenizer_config.json", chat_template=templates)
    assert tokenizer_of(folder).chat_template == "yes"
    change(folder / "tokenizer_config.json", chat_template=templates[:1])
    with pytest.raises(CheckpointError, match="none of them called default"):
        read_hf_folder(folder)


def test_what_is_written_stops_and_chats_in_transformers_as_here(folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    change(folder / "tokenizer_config.json", chat_template=template)
    change(folder / "generation_config.json", eos_token_id=[257, 10])
    arch, tensors, content = read_hf_folder(folder)
    arch.tokenizer["pad_token"] = "<|pad|>"
    arch.precision = "32"
    target = tmp_path / "exported"
    tokenizer = FastTokenizer(content, arch.tokenizer)
    write_hf_folder(target, arch, to_megatron(arch, tensors, padded_vocab_size(arch, 1)), tokenizer)
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1, "whoever may read one file may read all"
    torch.testing.assert_close(their_logits(target), their_logits(folder), atol=0, rtol=0)
    generation = transformers.GenerationConfig.from_pretrained(target)
    assert sorted(generation.eos_token_id) == [10, 257]
    assert (generation.bos_token_id, generation.pad_token_id) == (256, 258)
    loaded = transformers.AutoTokenizer.from_pretrained(target)
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == ("<|eos|>", "<|bos|>", "<|pad|>")
    text = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<user>hi<|eos|>"
    assert loaded.encode("aé<|eos|>", add_special_tokens=False) == tokenizer.encode("aé<|eos|>")
    model, prompt = theirs(target), torch.tensor([[65, 66]])
    with torch.no_grad():  # make the newline the likeliest third token
        state = model.model(prompt).last_hidden_state[0, -1]
        model.lm_head.weight[10] = 10 * state / state.norm()
    drawn = model.generate(prompt, generation_config=generation, max_new_tokens=20, do_sample=False)
    assert drawn[0, 2:].tolist() == [10]
