"""A Hugging Face folder: config.json, safetensors, and the tokenizer's files; read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.checkpoints.hf_weights import architecture_of, to_hf, to_hf_config
from nemo_aligner.engine.checkpoints.tokenizer import HF_FILE, SENTENCEPIECE_FILE
from nemo_aligner.errors import CheckpointError, OutputError


def read_hf_folder(folder: Path) -> tuple[Architecture, dict[str, Tensor], bytes]:
    """Shape, tensors and tokenizer.json. Raises CheckpointError naming the file that is missing."""
    from safetensors.torch import load_file

    for name in ("config.json", HF_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"--input {folder}: the folder has no {name}")
    arch = architecture_of(json.loads((folder / "config.json").read_text()))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"--input {folder}: the folder has no *.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return replace(arch, tokenizer=_tokenizer_settings(folder)), tensors, (folder / HF_FILE).read_bytes()


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Special tokens and chat template out of `tokenizer_config.json`."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}

    def token(name: str) -> str | None:
        value = config.get(name)
        return value["content"] if isinstance(value, dict) else value

    template_file = folder / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    names = {name: token(name) for name in ("bos_token", "eos_token", "pad_token")}
    return {"library": "huggingface", **names, "chat_template": template}


def write_hf_folder(
    folder: Path, arch: Architecture, megatron: Mapping[str, Tensor], tokenizer_files: Mapping[str, bytes]
) -> None:
    """config.json, model.safetensors and the tokenizer's files, from whole Megatron tensors.

    Raises OutputError, and CheckpointError for a tokenizer that has no Hugging Face form.
    """
    from safetensors.torch import save_file

    files = _hf_tokenizer_files(arch, tokenizer_files)
    dtype = "bfloat16" if arch.precision.startswith("bf16") else "float32"
    special = {k: v for k, v in arch.tokenizer.items() if k.endswith("_token") or k == "chat_template"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in special.items() if v}}
    config = {"tokenizer_config.json": json.dumps(settings, indent=1).encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(to_hf(arch, megatron), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(to_hf_config(arch, dtype), indent=1))
        for name, content in {**config, **files}.items():
            (folder / name).write_bytes(content)
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
