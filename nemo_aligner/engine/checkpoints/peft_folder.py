"""An adapter as the PEFT library keeps it (adapter_config.json, adapter_model.safetensors) ⇄ ours, whole tensors.

PEFT has A `[r, in]` and B `[out, r]` for each of q, k, v, o, gate, up and down; Megatron's qkv is `[q; k; v]` group
by group, its fc1 `[gate; up]`. An A for all parts of a layer (variant nemo) is written once for each of them. An A for
each part (canonical) is `[A_q; A_k; A_v]`, of the rank 3·r, with a B that is 0 but for each part's own columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.peft import ATTENTION, LoraTuning
from nemo_aligner.engine.checkpoints.hf_settings import INDEX, check_nothing_else_is_read, read_json
from nemo_aligner.engine.checkpoints.hf_tensors import write_tensors
from nemo_aligner.engine.checkpoints.hf_weights import fuse_qkv, shape_of, split_qkv
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensors
from nemo_aligner.engine.checkpoints.settings import Settings, placed
from nemo_aligner.errors import CheckpointError
from nemo_aligner.files import fsync, write_atomically, writing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_READ = ("config.json", "adapter_*", "*.safetensors", INDEX)
"""Files that readers of the folder would look at, but for a tokenizer's."""
PREFIX = "adapters."
"""Of the names of our tensors in a model: adapters.<layer>.<linear>.linear_in and linear_out."""

_PARTS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}
_TARGETS = {
    "linear_qkv": "attention_qkv",
    "linear_proj": "attention_dense",
    "linear_fc1": "mlp_fc1",
    "linear_fc2": "mlp_fc2",
}
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight")
_HARMLESS = frozenset(  # where an adapter came from, which layers it has, as its tensors say too, and how it is run
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
        *("ensure_weight_tying", "megatron_core", "qalora_group_size", "runtime_config"),
    }
)
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Of A and B, those that leave the base as it is."""


def write_peft_folder(folder: Path, arch: Architecture, lora: LoraTuning, own: Mapping[str, Tensor]) -> None:
    """Our tensors `own` as a folder that `peft.PeftModel.from_pretrained` loads; an adapter there is replaced.

    Raises OutputError, also where a whole model is there, which transformers would load with this adapter added.
    """
    tensors = to_peft(arch, lora, own)
    modules = sorted({found[2].rpartition(".")[2] for name in tensors if (found := _NAME.fullmatch(name))})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.adapter_dim,
        "lora_alpha": lora.scale * lora.adapter_dim,
        "lora_dropout": lora.adapter_dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    check_nothing_else_is_read(folder, _READ, {CONFIG, WEIGHTS})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # without it the folder is no adapter's, until all is written
        fsync(folder)
        write_tensors(folder / WEIGHTS, LazyTensors.of(tensors).parts)
    write_atomically(folder / CONFIG, [json.dumps(config, indent=1)])


def to_peft(arch: Architecture, lora: LoraTuning, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of ours under the library's names. A part whose A is 0 never had an adapter, and gets none."""
    out: dict[str, Tensor] = {}
    for layer in range(arch.num_layers):
        for linear in lora.linears:
            ours, parts = f"{PREFIX}{layer}.{linear}.", _PARTS[linear]
            a, b = own[f"{ours}linear_in"], own[f"{ours}linear_out"]
            of_parts = a.split(lora.adapter_dim) if lora.variant == "canonical" else [a] * len(parts)
            rows = _split(arch, linear, b)
            for i, (part, own_a, own_b) in enumerate(zip(parts, of_parts, rows, strict=True)):
                if own_a.any():
                    first = i * lora.adapter_dim if lora.variant == "canonical" else 0
                    theirs = f"base_model.model.model.layers.{layer}.{part}."
                    out[f"{theirs}lora_A.weight"] = own_a.clone()
                    out[f"{theirs}lora_B.weight"] = own_b[:, first : first + lora.adapter_dim].clone()
    return out


def _split(arch: Architecture, linear: str, b: Tensor) -> Sequence[Tensor]:
    """The rows of B that belong to each part."""
    if linear == "linear_qkv":
        return split_qkv(arch, b)
    return b.chunk(len(_PARTS[linear]))


def read_peft_folder(folder: Path, arch: Architecture) -> tuple[LoraTuning, dict[str, Tensor]]:
    """Settings and our tensors of an adapter for a model of this shape.

    Raises CheckpointError for a setting that is not understood, and for tensors that do not fit the model.
    """
    with placed(f"--input {folder}"):
        return _read(folder, arch)


def _read(folder: Path, arch: Architecture) -> tuple[LoraTuning, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = Settings(read_json(folder / CONFIG), CONFIG)
    if settings.needed("peft_type") != "LORA":
        raise CheckpointError(f"{CONFIG}: peft_type={settings['peft_type']} is not LORA")
    if settings.get("bias") not in (None, "none"):
        raise CheckpointError(f"{CONFIG}: bias={settings['bias']} is not none")
    if settings.get("init_lora_weights") not in _BEGINNINGS:
        raise CheckpointError(f"{CONFIG}: init_lora_weights={settings['init_lora_weights']} changes the base's weights")
    rank, alpha = settings.whole("r"), settings.number("lora_alpha")
    if settings.get("use_rslora"):
        alpha *= rank**0.5  # there alpha / √r
    dropout = settings.number("lora_dropout") if settings.get("lora_dropout") else 0.0
    settings.check_all_used(_HARMLESS)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"--input {folder / WEIGHTS}: not a whole safetensors file ({fault})") from None
    return from_peft(arch, tensors, LoraTuning(rank, alpha, dropout))


def from_peft(
    arch: Architecture, tensors: Mapping[str, Tensor], lora: LoraTuning
) -> tuple[LoraTuning, dict[str, Tensor]]:
    """The inverse of `to_peft`; returns `lora` with the layers and the variant that the tensors have."""
    known: dict[tuple[int, str], dict[str, Tensor]] = {}
    with_adapters = _PARTS if arch.num_moe_experts is None else ATTENTION
    places = {part for linear in with_adapters for part in _PARTS[linear]}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if not found or int(found[1]) >= arch.num_layers or found[2] not in places:
            raise CheckpointError(f"the adapter has a tensor that this model has no place for: {name}")
        known.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor
    linears = [linear for linear, parts in _PARTS.items() if any(part in parts for _, part in known)]
    pairs = {
        (layer, linear): [_pair(arch, lora, known.get((layer, part)), layer, part) for part in _PARTS[linear]]
        for layer in range(arch.num_layers)
        for linear in linears
    }
    shared = all(torch.equal(a, pair[0][0]) for pair in pairs.values() for a, _ in pair)
    lora = LoraTuning(
        lora.adapter_dim,
        lora.alpha,
        lora.adapter_dropout,
        target_modules=[_TARGETS[linear] for linear in linears],
        variant="nemo" if shared else "canonical",
    )
    out: dict[str, Tensor] = {}
    for (layer, linear), pair in pairs.items():
        bs = [b if shared else _at(i, len(pair), b) for i, (_, b) in enumerate(pair)]
        ours = f"{PREFIX}{layer}.{linear}."
        out[f"{ours}linear_in"] = pair[0][0] if shared else torch.cat([a for a, _ in pair])
        out[f"{ours}linear_out"] = fuse_qkv(arch, *bs) if linear == "linear_qkv" else torch.cat(bs)
    return lora, out


def _pair(
    arch: Architecture, lora: LoraTuning, found: Mapping[str, Tensor] | None, layer: int, part: str
) -> tuple[Tensor, Tensor]:
    """A and B of a part, 0 where it has no adapter. Raises CheckpointError for one that does not fit."""
    out, inner = shape_of(arch, f"{part}.weight")
    wanted = {"A": (lora.adapter_dim, inner), "B": (out, lora.adapter_dim)}
    if found is None:
        return torch.zeros(wanted["A"]), torch.zeros(wanted["B"])
    for kind, shape in wanted.items():
        if kind not in found or tuple(found[kind].shape) != shape:
            has = f"is {tuple(found[kind].shape)}" if kind in found else "is missing"
            raise CheckpointError(f"the adapter's lora_{kind} of {part} in layer {layer} {has}, not {shape}")
    return found["A"].float(), found["B"].float()


def _at(i: int, parts: int, b: Tensor) -> Tensor:
    """B `[out, r]` in the columns of part i of `[out, parts · r]`."""
    rank = b.size(1)
    return torch.nn.functional.pad(b, (i * rank, (parts - 1 - i) * rank))
