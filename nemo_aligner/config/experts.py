"""`model.*` keys of models with experts, by the names of Megatron and NeMo; refused for models without."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from nemo_aligner.config.architecture import BALANCING, Architecture
from nemo_aligner.errors import ConfigError


@dataclass
class ExpertOverrides:
    expert_model_parallel_size: int = 1  # so many ranks share the experts of a layer
    expert_tensor_parallel_size: int | None = None  # so many share each expert; null = tensor_model_parallel_size
    moe_router_load_balancing_type: str | None = None  # aux_loss, seq_aux_loss or none; null = as the archive says
    moe_aux_loss_coeff: float | None = None
    moe_z_loss_coeff: float | None = None

    def router_settings(self) -> dict[str, Any]:
        """What changes the loss; None = as the archive says."""
        names = [field.name for field in fields(ExpertOverrides) if field.name.startswith("moe_")]
        return {name: getattr(self, name) for name in names}

    def check_experts(self) -> None:
        """What can be said without the model. Raises ConfigError."""
        if self.moe_router_load_balancing_type not in (None, *BALANCING):
            raise ConfigError(
                f"{self.moe_router_load_balancing_type!r} is not one of {', '.join(BALANCING)}",
                "model.moe_router_load_balancing_type",
            )
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{value} is not a number from 0 on", f"model.{name}")
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{value} is below 1", f"model.{name}")

    def with_router_settings(self, arch: Architecture) -> Architecture:
        """The model's shape, with the losses of its routers as this run has them."""
        return replace(arch, **{name: value for name, value in self.router_settings().items() if value is not None})

    def check_model_has_experts(self, arch: Architecture) -> None:
        """Raises ConfigError for a key that means nothing to this model."""
        for field in fields(ExpertOverrides):
            if arch.num_moe_experts is None and getattr(self, field.name) != field.default:
                raise ConfigError("the model has no experts; leave it out", f"model.{field.name}")

    def check_expert_sizes(self, arch: Architecture, *, tensor: int, ranks: int, sequence_parallel: bool) -> None:
        """Whether the `ranks` of a pipeline stage can be trained so, `tensor` of them for a layer.

        Raises ConfigError.
        """
        ep, etp = self.expert_model_parallel_size, self.expert_tensor_parallel_size or tensor
        experts, ffn = arch.num_moe_experts or 0, arch.expert_ffn_hidden_size
        for fault, says, name in (
            (experts % ep, f"{ep} does not divide the {experts} experts", "expert_model_parallel_size"),
            (ffn % etp, f"{etp} does not divide an expert's FFN size {ffn}", "expert_tensor_parallel_size"),
            (
                ranks % (ep * etp),
                f"{ep}, with {etp} ranks for each expert, does not divide the {ranks} ranks of a pipeline stage",
                "expert_model_parallel_size",
            ),
            (
                ep == 1 and etp != tensor,
                f"{etp} is not tensor_model_parallel_size {tensor}, which takes expert_model_parallel_size above 1",
                "expert_tensor_parallel_size",
            ),
            (
                tensor > 1 and not sequence_parallel,
                "a model with experts is trained with tensor_model_parallel_size above 1 only if this is True",
                "sequence_parallel",
            ),
        ):
            if fault:
                raise ConfigError(says, f"model.{name}")
