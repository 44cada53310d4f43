"""A Hugging Face folder: config.json, safetensors, and the tokenizer's files; read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.checkpoints.hf_config import architecture_of, to_hf_config
from nemo_aligner.engine.checkpoints.hf_tensors import SINGLE, dequantised, load_tensors, read_json
from nemo_aligner.engine.checkpoints.hf_weights import to_hf
from nemo_aligner.engine.checkpoints.tokenizer import HF_FILE, SENTENCEPIECE_FILE, ArchiveTokenizer
from nemo_aligner.errors import CheckpointError, OutputError

_TOKENS = ("bos", "eos", "pad")


def read_hf_folder(folder: Path) -> tuple[Architecture, dict[str, Tensor], bytes]:
    """Shape, tensors and tokenizer.json. Raises CheckpointError naming the file that is missing."""
    for name in ("config.json", HF_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"--input {folder}: the folder has no {name}")
    config = read_json(folder / "config.json")
    arch = architecture_of(config)
    tensors = dequantised(load_tensors(folder), config.get("quantization_config"))
    tokenizer_json = (folder / HF_FILE).read_bytes()
    return replace(arch, tokenizer=_tokenizer_settings(folder, tokenizer_json)), tensors, tokenizer_json


def _tokenizer_settings(folder: Path, tokenizer_json: bytes) -> dict[str, Any]:
    """Special tokens, what ends a response, and chat template, from whichever of the folder's files names them.

    tokenizer_config.json and special_tokens_map.json name tokens, generation_config.json and config.json ids; the
    former come first. Several ids for EOS all end a response.
    """
    from tokenizers import Tokenizer

    named, by_id = (
        [read_json(folder / name) if (folder / name).is_file() else {} for name in names]
        for names in (
            ("tokenizer_config.json", "special_tokens_map.json"),
            ("generation_config.json", "config.json"),
        )
    )
    vocabulary = Tokenizer.from_str(tokenizer_json.decode())

    def ids(kind: str) -> list[int]:
        found: Any = next((c[f"{kind}_token_id"] for c in by_id if c.get(f"{kind}_token_id") is not None), [])
        return found if isinstance(found, list) else [found]

    def token(kind: str) -> str | None:
        given = next((c[f"{kind}_token"] for c in named if c.get(f"{kind}_token")), None)
        if given is None:
            return next((vocabulary.id_to_token(one) for one in ids(kind)), None)
        return given["content"] if isinstance(given, dict) else given

    settings: dict[str, Any] = {f"{kind}_token": token(kind) for kind in _TOKENS}
    ends = [text for text in map(vocabulary.id_to_token, ids("eos")) if text and text != settings["eos_token"]]
    return {
        "library": "huggingface",
        **settings,
        **({"stop_tokens": ends} if ends else {}),
        "chat_template": _chat_template(folder, named[0].get("chat_template")),
    }


def _chat_template(folder: Path, given: Any) -> str | None:
    """A file of its own, or that of tokenizer_config.json; of several, the one called default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(given, list):
        templates = {entry["name"]: entry["template"] for entry in given}
        if "default" not in templates:
            raise CheckpointError(f"--input {folder}: chat templates {sorted(templates)}, none of them called default")
        return templates["default"]
    return given


def write_hf_folder(
    folder: Path, arch: Architecture, megatron: Mapping[str, Tensor], tokenizer: ArchiveTokenizer
) -> None:
    """Everything that transformers and vLLM read: weights, shape, tokenizer, what ends a response, chat template.

    `megatron` are whole Megatron tensors. Raises OutputError, and CheckpointError for a shape or tokenizer that has no
    such form.
    """
    from safetensors.torch import save_file

    files = _hf_tokenizer_files(arch, tokenizer.files)
    dtype = "bfloat16" if arch.precision.startswith("bf16") else "float32"
    ends = sorted(tokenizer.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id if len(ends) == 1 else [tokenizer.eos_id, *(set(ends) - {tokenizer.eos_id})],
        "pad_token_id": tokenizer.pad_id,
    }
    special = {f"{kind}_token": arch.tokenizer.get(f"{kind}_token") for kind in _TOKENS}
    special = {name: value for name, value in special.items() if value}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    texts = {
        "config.json": {**to_hf_config(arch, dtype), **ids},
        "generation_config.json": {**ids, "transformers_version": "5.0.0"},
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(to_hf(arch, megatron), folder / SINGLE, metadata={"format": "pt"})
        for name, content in texts.items():
            (folder / name).write_text(json.dumps(content, indent=1))
        (folder / SINGLE).chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read it
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if tokenizer.chat_template is not None:
            (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    except OSError as fault:
        raise OutputError(f"cannot write {folder}: {fault.strerror or fault}") from fault


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
