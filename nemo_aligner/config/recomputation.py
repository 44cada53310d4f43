"""The keys of `model.*` that say which activations are computed again in the backward pass; NeMo's names."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner.errors import ConfigError


@dataclass
class RecomputationKeys:
    activations_checkpoint_granularity: str | None = None  # selective (attention, norms, activation) or full
    activations_checkpoint_method: str | None = None  # with full: uniform or block
    activations_checkpoint_num_layers: int | None = None  # of a part (uniform), or of a stage (block); null = 1

    def check_recomputation(self) -> None:
        """What can be said without the model. Raises ConfigError."""
        granularity, method, layers = self._values
        key = "model.activations_checkpoint"
        if granularity not in (None, "selective", "full"):
            raise ConfigError(f"{granularity!r} is not selective or full", f"{key}_granularity")
        if method not in (None, "uniform", "block"):
            raise ConfigError(f"{method!r} is not uniform or block", f"{key}_method")
        if layers is not None and layers < 1:
            raise ConfigError(f"{layers} is below 1", f"{key}_num_layers")
        if granularity == "full":
            if method is None:
                raise ConfigError(f"{key}_granularity=full takes uniform or block", f"{key}_method")
            return
        # YAMLs of NeMo have uniform beside selective, where it says nothing
        unused = None if (granularity, method) == ("selective", "uniform") else method
        for value, name in ((unused, "method"), (layers, "num_layers")):
            if value is not None:
                raise ConfigError(f"{value} is for {key}_granularity=full alone; leave it out", f"{key}_{name}")

    def check_recomputed_layers(self, layers: int) -> None:
        """Raises ConfigError where the `layers` of a pipeline stage are no whole number of parts."""
        granularity, method, together = self._values
        if granularity == "full" and method == "uniform" and layers % (together or 1):
            raise ConfigError(
                f"{together} does not divide the {layers} layers of a pipeline stage, as the method uniform wants",
                "model.activations_checkpoint_num_layers",
            )

    @property
    def _values(self) -> tuple[str | None, str | None, int | None]:
        return (
            self.activations_checkpoint_granularity,
            self.activations_checkpoint_method,
            self.activations_checkpoint_num_layers,
        )
