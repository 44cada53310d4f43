"""Which ways a model can be cut over processes: the rules of every run, of conversions and of the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """Over how many ranks a run wants its model cut; tensor and pipeline -1: as stored, for this many processes.

    `prefix` is what stands before the keys of tensor, pipeline and virtual in its config: "model." or nothing.
    """

    tensor: int = -1
    pipeline: int = -1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    prefix: str = ""


AS_STORED, WHOLE = Sizes(), Sizes(tensor=1, pipeline=1)


def passes(check: Callable[[], object]) -> bool:
    """Whether `check` has nothing to refuse: it raises no ConfigError."""
    try:
        check()
    except ConfigError:
        return False
    return True


def uneven(arch: Architecture, tensor: int) -> Iterator[str]:
    """What of the layers `tensor` ranks cannot share out evenly, in words."""
    layers = range(arch.num_layers)
    sizes = {
        f"{arch.num_attention_heads} heads": arch.num_attention_heads,
        # Megatron would cut the heads of a group apart, and whoever decodes reads whole groups
        f"{arch.query_groups} key/value groups": arch.query_groups,
    }
    if not all(arch.has_experts(layer) for layer in layers):
        sizes[f"FFN size {arch.ffn_hidden_size}"] = arch.ffn_hidden_size
    if any(arch.has_experts(layer) for layer in layers):
        sizes[f"experts' FFN size {arch.expert_ffn_hidden_size}"] = arch.expert_ffn_hidden_size
    return (name for name, size in sizes.items() if size % tensor)


def check_cut(
    arch: Architecture,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    prefix: str = "",
    of: str | Path = "the model",
) -> None:
    """Raises ConfigError where layers cannot be shared out among `tensor` ranks, or not into `virtual` stages on each
    of `pipeline`. It names the key, behind `prefix`: "model." or nothing, and the model as `of`.
    """
    for name in uneven(arch, tensor):
        raise ConfigError(f"{tensor} does not divide the {name} of {of}", f"{prefix}tensor_model_parallel_size")
    if virtual > 1 and pipeline == 1:
        raise ConfigError(
            f"{virtual} stages on a rank take {prefix}pipeline_model_parallel_size above 1, and it is 1",
            f"{prefix}virtual_pipeline_model_parallel_size",
        )
    if arch.num_layers % pipeline:
        raise ConfigError(
            f"{pipeline} does not divide the {arch.num_layers} layers of {of}", f"{prefix}pipeline_model_parallel_size"
        )
    if arch.num_layers % (pipeline * virtual):
        raise ConfigError(
            f"{virtual} stages on each of {pipeline} ranks do not divide the {arch.num_layers} layers of {of}",
            f"{prefix}virtual_pipeline_model_parallel_size",
        )


def can_cut(arch: Architecture, *, tensor: int = 1, pipeline: int = 1, virtual: int = 1) -> bool:
    """Whether `check_cut` lets it through."""
    return passes(lambda: check_cut(arch, tensor=tensor, pipeline=pipeline, virtual=virtual))


def chosen_sizes(
    arch: Architecture, world: int, *, tensor: int = -1, pipeline: int = -1, virtual: int = 1
) -> tuple[int, int]:
    """Tensor- and pipeline-parallel sizes for `world` ranks, where -1 is the stored size, reduced until it divides them
    and the model."""
    if tensor == -1:
        room = world if pipeline == -1 else world // pipeline
        tensor = _largest(arch.tensor_model_parallel_size, room, lambda size: can_cut(arch, tensor=size))
    if pipeline == -1:
        stored = arch.pipeline_model_parallel_size
        pipeline = _largest(stored, world // tensor, lambda size: can_cut(arch, pipeline=size, virtual=virtual))
    return tensor, pipeline


def _largest(stored: int, room: int, fits: Callable[[int], bool]) -> int:
    """The largest size up to `stored` that divides `room` and fits; 1 where none does."""
    sizes = range(min(stored, room), 1, -1)
    return next((size for size in sizes if room % size == 0 and fits(size)), 1)
