"""The tensors of a Hugging Face folder: which files count, and block-scaled FP8 weights as the numbers they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.engine.checkpoints.settings import Settings
from nemo_aligner.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SCALE = "_scale_inv"
_HARMLESS = frozenset({"activation_scheme", "fmt", "modules_to_not_convert"})  # of running in FP8, not of the numbers


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor that the index names, or those of the one file. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / INDEX
    weight_map = read_json(index)["weight_map"] if index.is_file() else None
    names = [only_file(folder)] if weight_map is None else sorted(set(weight_map.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"--input {folder}: {INDEX} names {name}, which is not there")
        try:
            found = load_file(path)
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(f"--input {path}: not a whole safetensors file ({fault})") from None
        tensors |= found if weight_map is None else {k: v for k, v in found.items() if weight_map.get(k) == name}
    missing = sorted(set(weight_map or ()) - tensors.keys())
    if missing:
        raise CheckpointError(f"--input {folder}: {INDEX} names {missing[0]}, which its file does not hold")
    return tensors


def only_file(folder: Path) -> str:
    """The file of a folder without an index."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in found or len(found) == 1:
        return SINGLE if SINGLE in found else found[0]
    if found:
        raise CheckpointError(f"--input {folder}: {len(found)} *.safetensors, and no {INDEX} to say which count")
    raise CheckpointError(f"--input {folder}: the folder has no *.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"--input {path}: cannot be read as JSON ({fault})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"--input {path}: not a JSON object")
    return content


def dequantised(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """FP8 weights times the scale of their block, float32: W[i, j] = w[i, j] · s[⌊i/b⌋, ⌊j/b⌋].

    `quantization` is the `quantization_config` of config.json. Raises CheckpointError for other ways of quantising.
    """
    settings = Settings(quantization or {}, "config.json: quantization_config")
    method = settings.get("quant_method")
    if method not in (None, "fp8"):
        raise CheckpointError(f"config.json: quantization_config: quant_method={method} is not fp8")
    block = settings.get("weight_block_size") or [128, 128]
    settings.check_all_used(_HARMLESS)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE):
            continue
        scale = tensors.get(f"{name}{_SCALE}")
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            if scale is not None:
                raise CheckpointError(f"{name} is {tensor.dtype}, and yet has scales of FP8 blocks")
            out[name] = tensor
        elif tensor.dtype == torch.float8_e4m3fn and scale is not None:
            rows, columns = tensor.shape
            spread = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
            out[name] = tensor.float() * spread
        else:
            raise CheckpointError(f"{name} is {str(tensor.dtype).removeprefix('torch.')} without scales that are known")
    return out
