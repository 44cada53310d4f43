"""A Hugging Face folder: config.json, safetensors, and the tokenizer's files; read and written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.checkpoints.hf_config import to_hf_config
from nemo_aligner.engine.checkpoints.hf_settings import (
    CONFIG,
    INDEX,
    SINGLE,
    TEMPLATE,
    TOKENIZER,
    TOKENS,
    check_nothing_else_is_read,
    named,
    read_hf_architecture,
    read_json,
)
from nemo_aligner.engine.checkpoints.hf_tensors import dequantised, load_tensors, write_tensors
from nemo_aligner.engine.checkpoints.hf_weights import to_hf
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors
from nemo_aligner.engine.checkpoints.settings import placed
from nemo_aligner.engine.checkpoints.tokenizer import HF_FILE, SENTENCEPIECE_FILE, ArchiveTokenizer
from nemo_aligner.errors import CheckpointError
from nemo_aligner.files import fsync, write_atomically, writing

SHARD_BYTES = 5_000_000_000
"""Of a file of weights at most, unless a tensor alone is larger; as transformers has it."""

_READ = ("*.safetensors", INDEX, TOKENIZER, "added_tokens.json", "chat_template.*", "adapter_config.json")
"""Files that an export may not replace, and that readers would look at all the same."""


def read_hf_folder(folder: Path, *, key: str = "--input") -> tuple[Architecture, LazyTensors, bytes]:
    """Shape, tensors and tokenizer.json. Raises CheckpointError; `key` is what named the folder."""
    with placed(named(key, folder)):
        arch = read_hf_architecture(folder, key=key)
        quantization = read_json(folder / CONFIG, key=key).get("quantization_config")
        return arch, dequantised(load_tensors(folder, key=key), quantization), (folder / HF_FILE).read_bytes()


def write_hf_folder(
    folder: Path,
    arch: Architecture,
    megatron: Mapping[str, Tensor],
    tokenizer: ArchiveTokenizer,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Everything that transformers and vLLM read: weights, shape, tokenizer, what ends a response, chat template.

    `megatron` are whole Megatron tensors; of lazy ones, one is in memory at a time. Files of the same names are
    replaced, as by the same export again. Raises OutputError, also where others are there that would be read, and
    CheckpointError for a shape or tokenizer that has no such form.
    """
    tokenizer_files, texts = _hf_tokenizer_files(arch, tokenizer.files), _texts(arch, tokenizer)
    parts = to_hf(arch, megatron).parts
    weights = _files_of_weights(parts, shard_bytes)
    if len(weights) > 1:
        places = {tensor: name for name, shard in weights.items() for tensor in shard}
        texts[INDEX] = {"metadata": {"total_size": sum(map(_size, parts.values()))}, "weight_map": places}
    others: dict[str, str | bytes] = {name: json.dumps(content, indent=1) for name, content in texts.items()}
    others |= tokenizer_files
    if tokenizer.chat_template is not None:
        others[TEMPLATE] = tokenizer.chat_template
    check_nothing_else_is_read(folder, _READ, weights.keys() | others.keys())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # without it the folder is no model's, until all is written
        fsync(folder)
        for name, shard in weights.items():
            write_tensors(folder / name, shard)
    for name in sorted(others, key=CONFIG.__eq__):  # last
        write_atomically(folder / name, [others[name]])


def _texts(arch: Architecture, tokenizer: ArchiveTokenizer) -> dict[str, Mapping[str, Any]]:
    """The JSON files beside the weights. Raises CheckpointError for a shape that has no such form."""
    dtype = "bfloat16" if arch.precision.startswith("bf16") else "float32"
    ends = sorted(tokenizer.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id if len(ends) == 1 else [tokenizer.eos_id, *(set(ends) - {tokenizer.eos_id})],
        "pad_token_id": tokenizer.pad_id,
    }
    special = {f"{kind}_token": arch.tokenizer.get(f"{kind}_token") for kind in TOKENS}
    special = {name: value for name, value in special.items() if value}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    return {
        CONFIG: {**to_hf_config(arch, dtype), **ids},
        "generation_config.json": {**ids, "transformers_version": "5.0.0"},
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
    }


def _files_of_weights(parts: Mapping[str, LazyTensor], shard_bytes: int) -> dict[str, dict[str, LazyTensor]]:
    """One file, or several of `shard_bytes` at most, by name."""
    shards = list(_shards(parts, shard_bytes))
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _shards(parts: Mapping[str, LazyTensor], most: int) -> Iterator[dict[str, LazyTensor]]:
    shard: dict[str, LazyTensor] = {}
    for name, part in parts.items():
        if shard and sum(map(_size, shard.values())) + _size(part) > most:
            yield shard
            shard = {}
        shard[name] = part
    yield shard


def _size(part: LazyTensor) -> int:
    return part.meta.numel() * part.meta.dtype.itemsize


def _hf_tokenizer_files(arch: Architecture, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The tokenizer's files under the names they have in a Hugging Face folder."""
    plain = not (arch.tokenizer.get("special_tokens") or arch.tokenizer.get("additional_special_tokens"))
    if plain and (HF_FILE in files or "tokenizer_config.json" in files):
        return files
    if plain and len(files) == 1 and arch.tokenizer.get("library") in (None, "sentencepiece"):
        [content] = files.values()
        return {SENTENCEPIECE_FILE: content}
    raise CheckpointError(
        f"the archive's tokenizer (library {arch.tokenizer.get('library')}) has no Hugging Face form"
        + ("" if plain else " that has its special_tokens")
    )
