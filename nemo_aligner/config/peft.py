"""`model.peft`: train a few small matrices beside frozen weights (LoRA, arXiv 2106.09685), under NeMo's keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_aligner.config.fixed import LORA, check_fixed
from nemo_aligner.errors import CheckpointError, ConfigError

ATTENTION = ("linear_qkv", "linear_proj")
_LINEARS = {
    "attention_qkv": ("linear_qkv",),
    "attention_dense": ("linear_proj",),
    "attention": ATTENTION,
    "mlp_fc1": ("linear_fc1",),
    "mlp_fc2": ("linear_fc2",),
    "mlp": ("linear_fc1", "linear_fc2"),
    "all": ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
}
"""What a name of `target_modules` stands for: Megatron's linear layers of a decoder layer."""

VARIANTS = ("nemo", "canonical")


@dataclass
class LoraTuning:
    """`model.peft.lora_tuning`: y = W x + (alpha / adapter_dim) B A x; A `[adapter_dim, in]`, B `[out, adapter_dim]`.

    Megatron has query, key and value in one linear layer, and gate and up in another. The variant `nemo` gives such a
    layer one A for all of its parts, `canonical` one for each, as the PEFT library does.
    """

    adapter_dim: int = 32
    alpha: float | None = None  # null = adapter_dim
    adapter_dropout: float = 0.0  # of what A reads
    target_modules: list[str] = field(default_factory=lambda: ["attention_qkv"])
    variant: str = "nemo"  # nemo or canonical
    column_init_method: str = "xavier"
    row_init_method: str = "zero"
    layer_selection: list[int] | None = None
    weight_tying: bool = False
    position_embedding_strategy: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Megatron's linear layers that have an adapter, in the order of a layer."""
        asked = {linear for name in self.target_modules for linear in _LINEARS[name]}
        return tuple(linear for linear in _LINEARS["all"] if linear in asked)

    @property
    def of_attention_alone(self) -> bool:
        return {*self.linears} <= {*ATTENTION}

    @property
    def scale(self) -> float:
        return (self.adapter_dim if self.alpha is None else self.alpha) / self.adapter_dim

    def check(self, block: str) -> None:
        """Raises ConfigError, naming the key under `block`."""
        if self.adapter_dim < 1:
            raise ConfigError(f"{self.adapter_dim} is below 1", f"{block}.adapter_dim")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"{self.alpha} is not above 0", f"{block}.alpha")
        if not 0 <= self.adapter_dropout < 1:
            raise ConfigError(f"{self.adapter_dropout} is not from 0 to below 1", f"{block}.adapter_dropout")
        unknown = [name for name in self.target_modules if name not in _LINEARS]
        if unknown or not self.target_modules:
            found = repr(unknown[0]) if unknown else "an empty list"
            raise ConfigError(f"{found} is not one of {', '.join(_LINEARS)}", f"{block}.target_modules")
        if self.variant not in VARIANTS:
            raise ConfigError(f"{self.variant!r} is not one of {', '.join(VARIANTS)}", f"{block}.variant")
        check_fixed(self, LORA, block)

    def to_nemo(self) -> dict[str, Any]:
        """What an adapter's archive says of its shape."""
        return {
            "adapter_dim": self.adapter_dim,
            "alpha": self.scale * self.adapter_dim,
            "adapter_dropout": self.adapter_dropout,
            "target_modules": [*self.target_modules],
            "variant": self.variant,
        }

    @classmethod
    def from_nemo(cls, peft: Mapping[str, Any], where: str = "model_config.yaml") -> LoraTuning:
        """From the `peft` entry of an archive's `model_config.yaml`. Raises CheckpointError."""
        try:
            lora = cls(**peft["lora_tuning"])
            lora.check("peft.lora_tuning")
        except (KeyError, TypeError, ConfigError) as fault:
            raise CheckpointError(f"{where}: peft is not that of an adapter ({fault})") from None
        return lora


@dataclass
class PeftConfig:
    """`model.peft`."""

    peft_scheme: str | None = None  # lora; null or none: all weights are trained
    restore_from_path: str | None = None  # an adapter's .nemo to begin with
    merge: bool = False  # True: the .nemo at the end is a whole model, the adapter added to its weights
    lora_tuning: LoraTuning = field(default_factory=LoraTuning)

    @property
    def lora(self) -> LoraTuning | None:
        """None where all weights are trained."""
        return self.lora_tuning if self.peft_scheme == "lora" else None

    def check(self) -> None:
        """Raises ConfigError."""
        if self.peft_scheme not in (None, "none", "lora"):
            raise ConfigError(f"{self.peft_scheme!r} is not lora or none", "model.peft.peft_scheme")
        self.lora_tuning.check("model.peft.lora_tuning")
        for name in ("restore_from_path", "merge"):
            if getattr(self, name) and self.lora is None:
                raise ConfigError("there is no adapter; set model.peft.peft_scheme=lora", f"model.peft.{name}")
