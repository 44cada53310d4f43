"""The keys of `model.*` that name NVIDIA's libraries, Transformer Engine and apex, and what they fuse; NeMo's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_aligner.config.fixed import Fixed, check_fixed
from nemo_aligner.errors import ConfigError

_FIXED = {
    "masked_softmax_fusion": Fixed((True,), "attention stores no scores to mask; leave it at True"),
    "reduce_amax": Fixed((True,), "all ranks scale fp8 alike; leave it at True"),
    "fp8_interval": Fixed((1,), "scales are found anew in every step; leave it at 1"),
}
_FP8_FORMATS = {(False, True): "hybrid", (True, False): "e4m3"}


@dataclass
class LibraryKeys:
    """Of a fusion null means: where what it takes is there."""

    transformer_engine: Any = "auto"  # auto: on a GPU, where it is installed; True, False
    gradient_accumulation_fusion: bool | None = None  # apex: weight gradients are added up where they are computed
    bias_activation_fusion: bool | None = None  # torch.compile
    bias_dropout_add_fusion: bool | None = None  # torch.compile
    masked_softmax_fusion: bool = True
    apply_rope_fusion: bool | None = None  # Transformer Engine
    persist_layer_norm: bool | None = None  # apex, for LayerNorm
    fp8: bool = False  # products in 8 bits; takes Transformer Engine
    fp8_e4m3: bool = False
    fp8_hybrid: bool = True  # e4m3 forwards, e5m2 backwards
    fp8_margin: int = 0
    fp8_interval: int = 1
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: str = "max"  # max or most_recent of the history
    reduce_amax: bool = True

    def check_libraries(self) -> None:
        """What is wrong without a look at the machine. Raises ConfigError."""
        check_fixed(self, _FIXED, "model")
        if self.transformer_engine not in ("auto", True, False):
            raise ConfigError(f"{self.transformer_engine!r} is not auto, True or False", "model.transformer_engine")
        if self.fp8_amax_compute_algo not in ("max", "most_recent"):
            raise ConfigError(
                f"{self.fp8_amax_compute_algo!r} is not max or most_recent", "model.fp8_amax_compute_algo"
            )
        if self.fp8 and self.transformer_engine is False:
            raise ConfigError("it takes Transformer Engine, and model.transformer_engine is False", "model.fp8")
        if self.fp8 and (self.fp8_e4m3, self.fp8_hybrid) not in _FP8_FORMATS:
            raise ConfigError("give one of model.fp8_e4m3 and model.fp8_hybrid", "model.fp8")

    @property
    def fp8_settings(self) -> dict[str, Any]:
        """The settings of Megatron's config that the fp8 keys stand for; none without `fp8`."""
        if not self.fp8:
            return {}
        return {
            "fp8": _FP8_FORMATS[self.fp8_e4m3, self.fp8_hybrid],
            "fp8_recipe": "delayed",
            "fp8_margin": self.fp8_margin,
            "fp8_amax_history_len": self.fp8_amax_history_len,
            "fp8_amax_compute_algo": self.fp8_amax_compute_algo,
        }
