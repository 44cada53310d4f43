"""Megatron-core on a machine without a GPU.

Megatron addresses "the current CUDA device" throughout; where there is none, this module makes those addresses mean the
CPU, so that the laptop runs the same engine as the cluster. Nothing is changed where a GPU is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._device

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like")

replaced: dict[tuple[Any, str], Any] = {}
"""What stood where the CPU stands now, by module or class and name."""


def multiplies_bf16() -> bool:
    """Whether torch has fast bf16 products on this CPU."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def hides_gpu() -> bool:
    """Whether the CPU stands where there is a GPU."""
    return bool(replaced) and bool(replaced[torch.cuda, "is_available"]())


def enable_cpu() -> None:
    """Point Megatron's CUDA calls at the CPU, also on a machine with GPUs, which are then not seen; idempotent."""
    if replaced:
        return
    cpu = torch.device("cpu")
    _replace(torch.cuda, "is_available", lambda: False)
    _replace(torch.cuda, "current_device", lambda: cpu)  # used as a `device=` argument
    _replace(torch.cuda, "synchronize", lambda device=None: None)  # a CPU has no queue to wait for
    _replace(torch.cuda, "set_device", lambda device: None)  # one CPU, always current
    _replace(torch.cuda, "empty_cache", lambda: None)
    # what a dispatcher of experts counts is copied on a stream of its own
    from megatron.core.transformer.moe import token_dispatcher

    stream = _Stream()
    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", _counts)
    _replace(token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", stream)
    _replace(torch.cuda, "current_stream", lambda device=None: stream)
    _replace(torch.cuda, "stream", lambda stream: nullcontext())
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, device=None: self)
    # activation recomputation saves and restores the random state of both; here the CPU's alone decides
    from megatron.core.tensor_parallel import random as megatron_random

    _replace(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0))
    _replace(megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None)
    # experts that are cut themselves exchange parts of different sizes
    from megatron.core.tensor_parallel import mappings

    for name, uneven in (("_gather_along_first_dim", _gather), ("_reduce_scatter_along_first_dim", _reduce_scatter)):
        _replace(mappings, name, functools.partial(uneven, getattr(mappings, name)))
    # `with torch.device(...)` knows the factories by what they are when it is first asked
    torch.utils._device._device_constructors()
    for name in _FACTORIES:  # buffers and counters are made with device="cuda"
        _replace(torch, name, _on_cpu(getattr(torch, name)))


class _Stream:
    """The one queue there is, in which everything is done when it is asked for; an event of it is itself."""

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """On a CPU it is there already; collectives take its numbers from an array."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather(
    even: Callable[..., torch.Tensor], part: torch.Tensor, group: Any, sizes: list[int] | None = None, *more: Any
) -> torch.Tensor:
    """`part`, `[sizes[rank], ...]` of each rank, one behind the other; gloo gathers equal `sizes` alone."""
    if group.size() == 1 or sizes is None:
        return even(part, group, sizes, *more)
    whole = part.new_zeros(sum(sizes), *part.shape[1:])
    whole.split(sizes)[group.rank()].copy_(part)
    torch.distributed.all_reduce(whole, group=group)
    return whole


def _reduce_scatter(
    even: Callable[..., torch.Tensor], whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *more: Any
) -> torch.Tensor:
    """This rank's part `[sizes[rank], ...]` of the sum of all ranks' `whole` `[Σ sizes, ...]`."""
    if group.size() == 1 or sizes is None:
        return even(whole, group, sizes, *more)
    total = whole.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()


def _replace(owner: Any, name: str, value: Any) -> None:
    replaced[owner, name] = getattr(owner, name)
    setattr(owner, name, value)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapper


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Let `Tensor.type()` answer `torch.cuda.*` for CPU tensors: Megatron's optimizer sorts parameters by that name.

    Kept to optimizer construction and step, because checkpoints and torch itself must see the truth.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def renamed(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, **kwargs)

    torch.Tensor.type = renamed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
