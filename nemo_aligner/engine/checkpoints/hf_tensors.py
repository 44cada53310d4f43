"""The tensors of a Hugging Face folder, read one at a time; block-scaled FP8 weights as the numbers they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.engine.checkpoints.hf_settings import INDEX, named, weight_files, weight_map
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors, lazily
from nemo_aligner.engine.checkpoints.settings import Settings
from nemo_aligner.errors import CheckpointError

_SCALE = "_scale_inv"
_HARMLESS = frozenset({"activation_scheme", "fmt", "modules_to_not_convert"})  # of running in FP8, not of the numbers


def load_tensors(folder: Path, *, key: str = "--input") -> LazyTensors:
    """Every tensor that the index names, or those of the one file. Raises CheckpointError; `key` is what named it."""
    places = weight_map(folder, key=key)
    parts: dict[str, LazyTensor] = {}
    for path in weight_files(folder, key=key):
        found = _tensors_of(path, key)
        parts |= {name: part for name, part in found.items() if places is None or places.get(name) == path.name}
    missing = sorted(set(places or ()) - parts.keys())
    if missing:
        raise CheckpointError(f"{named(key, folder)}: {INDEX} names {missing[0]}, which its file does not hold")
    return LazyTensors(parts)


def _tensors_of(path: Path, key: str) -> dict[str, LazyTensor]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import _TYPES

    def make(name: str) -> Tensor:
        with safe_open(path, "pt") as file:  # anew for every tensor: of a file once read, all pages would stay
            return file.get_tensor(name).clone()

    def described(name: str, part: Any) -> LazyTensor:
        kind = part.get_dtype()
        if kind not in _TYPES:
            raise CheckpointError(f"{named(key, path)}: {name} is {kind}, which torch does not have")
        return LazyTensor(torch.empty(part.get_shape(), dtype=_TYPES[kind], device="meta"), lambda: make(name))

    try:
        with safe_open(path, "pt") as file:
            return {name: described(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"{named(key, path)}: not a whole safetensors file ({fault})") from None


def dequantised(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None) -> LazyTensors:
    """FP8 weights times the scale of their block, float32: W[i, j] = w[i, j] · s[⌊i/b⌋, ⌊j/b⌋].

    `quantization` is the `quantization_config` of config.json. Raises CheckpointError for other ways of quantising.
    """
    settings = Settings(quantization or {}, "config.json: quantization_config")
    method = settings.get("quant_method")
    if method not in (None, "fp8"):
        raise CheckpointError(f"config.json: quantization_config: quant_method={method} is not fp8")
    block = settings.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(one) is int and one >= 1 for one in block)):
        raise CheckpointError(
            f"config.json: quantization_config: weight_block_size={str(block)[:80]} is not two whole numbers from 1 on"
        )
    settings.check_all_used(_HARMLESS)
    parts = LazyTensors.of(tensors).parts
    out: dict[str, LazyTensor] = {}
    for name, part in parts.items():
        if name.endswith(_SCALE):
            continue
        scale, dtype = parts.get(f"{name}{_SCALE}"), part.meta.dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            if scale is not None:
                raise CheckpointError(f"{name} is {dtype}, and yet has scales of FP8 blocks")
            out[name] = part
        elif dtype == torch.float8_e4m3fn and scale is not None:
            wanted = [-(-size // length) for size, length in zip(part.meta.shape, block, strict=False)]
            if part.meta.dim() != 2 or list(scale.meta.shape) != wanted:
                sizes = f"{list(scale.meta.shape)} for a weight of {list(part.meta.shape)}"
                raise CheckpointError(f"{name}{_SCALE} is {sizes}, and not one scale for each block of {block}")
            out[name] = lazily(lambda weight, by_block: _scaled(weight, by_block, block), part, scale)
        else:
            raise CheckpointError(f"{name} is {str(dtype).removeprefix('torch.')} without scales that are known")
    return LazyTensors(out)


def _scaled(weight: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread


def write_tensors(path: Path, parts: Mapping[str, LazyTensor]) -> None:
    """A safetensors file, one tensor in memory at a time; it appears whole or not at all.

    The format is eight bytes that say how long the header is, a JSON header, and the tensors one after another
    (github.com/huggingface/safetensors); its own writer takes all tensors at once.
    """
    from safetensors.torch import _TYPES

    kinds = {dtype: kind for kind, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in parts.items():
        start, end = end, end + part.meta.numel() * part.meta.dtype.itemsize
        header[name] = {"dtype": kinds[part.meta.dtype], "shape": list(part.meta.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for part in parts.values():
                # not tofile, which does not say why a disk takes no more
                stream.write(part.make().contiguous().view(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
