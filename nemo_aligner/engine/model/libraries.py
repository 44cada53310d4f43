"""Which of NVIDIA's libraries a training run uses: what is asked for, and what of it this machine has."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.libraries import LibraryKeys
from nemo_aligner.errors import ConfigError

_FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later
FP8_MULTIPLE = 16
"""What the sizes of its products are a multiple of."""

_EXTRA = "pip install --no-build-isolation -e '.[te]'"


@dataclass(frozen=True)
class Machine:
    """What there is; of a library that is not, why. None: it is there."""

    on_gpu: bool
    transformer_engine: str | None
    gradient_fusion: str | None  # apex's extension
    layer_norm: str | None  # apex's
    compiler: str | None  # of what torch.compile makes
    fp8: str | None
    adam: str  # whose is in use


def this_machine() -> Machine:
    """The machine as it is; imports the libraries where there is a GPU for them."""
    on_gpu = torch.cuda.is_available()
    engine = _missing("transformer_engine.pytorch", on_gpu)
    if on_gpu:
        compiler = None if importlib.util.find_spec("triton") else "Triton is not installed"
    else:
        compiler = None if shutil.which(os.environ.get("CXX", "g++")) else "there is no C++ compiler"
    fp8 = engine
    if fp8 is None and torch.cuda.get_device_capability() < _FP8_CAPABILITY:
        fp8 = f"{torch.cuda.get_device_name()} has no fp8 products"
    from megatron.core.optimizer import Adam

    return Machine(
        on_gpu=on_gpu,
        transformer_engine=engine,
        gradient_fusion=_missing("fused_weight_gradient_mlp_cuda", on_gpu),
        layer_norm=_missing("apex.contrib.layer_norm.layer_norm", on_gpu),
        compiler=compiler,
        fp8=fp8,
        adam=Adam.__module__.partition(".")[0],
    )


def _missing(module: str, on_gpu: bool) -> str | None:
    """Why `module` cannot be used; None where it can."""
    if not on_gpu:
        return "this run is on a CPU"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as fault:
        return f"{fault.name} is not installed"
    except Exception as fault:  # built for another torch or CUDA, which shows in many ways
        return f"{module} cannot be imported ({' '.join(str(fault).split())[:200]})"
    return None


@dataclass(frozen=True)
class Libraries:
    """What a model is built with; without anything, Megatron's layers, torch's norms and our kernels."""

    transformer_engine: bool = False
    fuses_norms: bool = False  # into the products that follow them, by Transformer Engine
    gradient_accumulation: bool = False
    bias_activation: bool = False
    bias_dropout_add: bool = False
    rope: bool = False
    layer_norm: bool = False  # apex's
    fp8: dict[str, Any] = field(default_factory=dict)
    adam: str = "torch"

    def __str__(self) -> str:
        names = ("gradient_accumulation", "bias_activation", "bias_dropout_add", "rope", "layer_norm")
        fused = [name for name in names if getattr(self, name)]
        layers = "Transformer Engine" if self.transformer_engine else "Megatron"
        precision = f", products in fp8 ({self.fp8['fp8']})" if self.fp8 else ""
        owner = {"transformer_engine": "Transformer Engine"}.get(self.adam, self.adam)
        return f"layers of {layers}{precision}; fused: {', '.join(fused) or 'nothing'}; Adam of {owner}"


def choose(
    keys: LibraryKeys,
    machine: Machine,
    arch: Architecture,
    *,
    activation: Any,
    tp: int,
    lora: bool,
    selective: bool = False,
) -> Libraries:
    """What `keys` ask for and `machine` has, for a model of `arch` whose `activation` is as in Megatron's config.

    `selective`: recomputation. Raises ConfigError for what is asked for and cannot be had.
    """
    wanted, missing = keys.transformer_engine, machine.transformer_engine
    if wanted is True and missing:
        raise ConfigError(f"True, and {missing}; {_EXTRA} on a GPU, or auto", "model.transformer_engine")
    engine = bool(wanted) and missing is None
    if keys.fp8:
        _check_fp8(machine, arch, tp)

    def use(asked: bool | None, key: str, *against: str | None, exact: bool = True) -> bool:
        """Whether a fusion is in use that each of `against` would keep from it; by default it has to be `exact`."""
        why = next((reason for reason in against if reason), None)
        if asked and why:
            raise ConfigError(f"True, and {why}; leave it out", f"model.{key}")
        return why is None and (machine.on_gpu and exact if asked is None else asked)

    return Libraries(
        transformer_engine=engine,
        fuses_norms=engine and not lora,  # an adapter reads what is between the two
        gradient_accumulation=use(
            keys.gradient_accumulation_fusion,
            "gradient_accumulation_fusion",
            machine.gradient_fusion,
            "with model.peft the weights have no gradients" if lora else None,
        ),
        bias_activation=use(
            keys.bias_activation_fusion,
            "bias_activation_fusion",
            machine.compiler,
            _no_fused_activation(arch, activation),
            # in LeanMLP, which is not Transformer Engine's nor that of experts
            "selective recomputation has the activation by itself"
            if selective and not engine and arch.num_moe_experts is None
            else None,
            exact=activation["activation_func"] is not F.gelu,  # whose fused form is the approximation by tanh
        ),
        bias_dropout_add=use(keys.bias_dropout_add_fusion, "bias_dropout_add_fusion", machine.compiler),
        rope=use(
            keys.apply_rope_fusion,
            "apply_rope_fusion",
            missing,
            None if arch.position_embedding_type == "rope" else "the model's positions are learned",
        ),
        layer_norm=use(
            keys.persist_layer_norm,
            "persist_layer_norm",
            machine.layer_norm,
            None if arch.normalization == "layernorm" else "the model's norms are RMSNorm",
            "the norms are Transformer Engine's" if engine else None,
        ),
        fp8=keys.fp8_settings,
        adam=machine.adam,
    )


def _check_fp8(machine: Machine, arch: Architecture, tp: int) -> None:
    if machine.fp8:
        raise ConfigError(f"True, and {machine.fp8}; leave it out", "model.fp8")
    sizes = {
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size / TP": arch.ffn_hidden_size // tp,
        "heads × their dimension / TP": arch.num_attention_heads * arch.head_dim // tp,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise ConfigError(f"it takes multiples of {FP8_MULTIPLE}, and {name} is {size}", "model.fp8")


def _no_fused_activation(arch: Architecture, activation: Any) -> str | None:
    """Why Megatron has no fused form of the activation (with what it is multiplied by); None where it has."""
    function, gated = activation["activation_func"], activation.get("gated_linear_unit", False)
    dense = arch.num_moe_experts is None  # what experts compute is weighted in the same pass
    if (function is F.silu and gated) or (dense and function is F.gelu and (gated or arch.has_mlp_bias)):
        return None
    where = "of experts" if not dense else "" if arch.has_mlp_bias else "without a bias"
    return f"there is no fused form of {arch.activation} {where}".rstrip()
