"""A GPU that is not there: everything is computed on the CPU, and every tensor remembers where it claims to be.

The claim lies with a tensor's storage, so views, parameters and what autograd saved have it too. A fault is what would
be one on a GPU: tensors of two devices in one operation, numpy over a GPU's tensor, NCCL over a CPU's. What makes the
host wait is counted. Not seen: what autograd computes by itself, between the operations that Python calls, and ctypes.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_aligner.engine.processes import cuda_on_cpu

CPU = torch.device("cpu")
_PLAIN = (torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
_HERE = torch.zeros(1)  # as a list or an array is
_RANDOM = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "rand_like",
    "randn_like",
    "bernoulli",
    "multinomial",
    "exponential_",
}
_RANDOM |= {"normal", "normal_", "uniform_", "trunc_normal_", "dropout", "dropout_", "scaled_dot_product_attention"}
_WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__repr__", "__format__", "__contains__"}
_WAITS |= {"equal", "nonzero", "masked_select", "unique", "allclose"}
_REFUSED = {"numpy", "__array__", "__dlpack__"}
_ASIDE = {"_has_compatible_shallow_copy_type", "is_same_size", "is_set_to", "is_floating_point"}
_COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "_all_gather_base")
_COLLECTIVES += ("reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all_single", "send", "recv")


class DeviceFault(RuntimeError):
    """What torch would refuse on a GPU."""


class PretendGPU(TorchFunctionMode):
    """`waits`: what made the host wait for the device, by name; `uploads`: copies to it that wait for their turn."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self._chosen = threading.local()
        self.recording: list[tuple[Callable[[], Any], Any]] | None = None
        self.replays = 0  # of graphs
        self.waits, self.uploads = Counter[str](), Counter[str]()
        self.generators = tuple(torch.Generator() for _ in range(count))

    @property
    def current(self) -> torch.device:
        """Every thread has its own, and begins with the first."""
        return getattr(self._chosen, "device", torch.device("cuda", 0))

    def choose(self, device: Any) -> None:
        self._chosen.device = self.named(device)

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where it claims to be. What autograd made during a backward pass has had no chance to say so: on the GPU."""
        unsaid = CPU if torch._C._current_graph_task_id() == -1 else self.current
        return getattr(tensor.untyped_storage(), "claimed", unsaid)

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        tensor.untyped_storage().claimed = device  # type: ignore[attr-defined]
        return tensor

    def named(self, device: Any) -> torch.device:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cuda", self.current.index) if found == torch.device("cuda") else found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.recording is None:
            return self._computed(func, types, args, kwargs)
        waited = sum(self.waits.values()) + sum(self.uploads.values())
        result = self._computed(func, types, args, kwargs)
        if sum(self.waits.values()) + sum(self.uploads.values()) > waited:
            raise DeviceFault(f"{func.__name__}: not permitted while a graph is recorded")
        self.recording.append((functools.partial(self._computed, func, types, args, kwargs), result))
        return result

    def _computed(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ == "record_stream":
            return None
        if any(kind.__torch_function__ not in _PLAIN for kind in types):
            return func(*args, **kwargs)  # what consists of tensors, as torch's ShardedTensor does
        name = func.__name__
        if name in ("__get__", "__set__"):
            return self._attribute(func, func.__self__.__name__, args)
        own = self.device_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if name in ("to", "cuda", "cpu", "copy_", "type", "get_device", "pin_memory", "is_pinned") and own is not None:
            return getattr(self, f"_{name}")(func, own, *args, **kwargs)
        if own is not None and own != CPU and name in _REFUSED:
            raise DeviceFault(f"can't convert {own} tensor to numpy: use Tensor.cpu() first")
        met = own if name in _ASIDE else self._meeting(name, args, kwargs)
        device = self.named(kwargs["device"]) if kwargs.get("device") is not None else met
        if "device" in kwargs:
            kwargs["device"] = CPU
        pinned = kwargs.pop("pin_memory", False)
        self._note(name, own, args, device if met is None else CPU)
        with self._random_state(device) if name in _RANDOM and device not in (None, CPU) else nullcontext():
            result = func(*args, **kwargs)
        for made in _tensors((result,)):
            if device is not None and not hasattr(made.untyped_storage(), "claimed"):
                self.put(made, device)
            if pinned:
                made.untyped_storage().pinned = True  # type: ignore[attr-defined]
        return result

    def _attribute(self, func: Any, name: str, args: tuple[Any, ...]) -> Any:
        own = self.device_of(args[0])
        if name == "device":
            return own
        if name in ("is_cuda", "is_cpu"):
            return own.type == name.removeprefix("is_")
        if name == "grad" and len(args) > 1 and isinstance(args[1], Tensor) and self.device_of(args[1]) != own:
            raise DeviceFault(f"a gradient on {self.device_of(args[1])} for a parameter on {own}")
        result = func(*args)
        if name in ("grad", "data", "T", "mT") and isinstance(result, Tensor):
            self.put(result, own)
        return result

    def _meeting(self, name: str, args: Any, kwargs: Any) -> torch.device | None:
        """The one device of all tensors but a CPU's scalars; None where there are none."""
        if name in ("__getitem__", "__setitem__"):
            self._index(args)
            # without indices a value is copied, which knows no border
            args, kwargs = (args[0], *(args[2:] if _has_indices(args[1]) else ())), {}
        found = list(_tensors((args, kwargs)))
        devices = {self.device_of(t) for t in found if t.dim() or self.device_of(t) != CPU}
        if len(devices) > 1:
            raise DeviceFault(f"{name}: expected all tensors on one device, found {sorted(map(str, devices))}")
        return next(iter(devices)) if devices else CPU if found else None

    def _index(self, args: Any) -> None:
        """A CPU's indices are copied to a GPU, not the other way round."""
        own, indices = self.device_of(args[0]), list(_tensors((args[1],)))
        if own == CPU and any(self.device_of(t) != CPU for t in indices):
            raise DeviceFault("indices should be on the CPU as the indexed tensor is")
        if (
            own != CPU
            and _has_indices(args[1])
            and any(self.device_of(t) == CPU and t.dim() for t in indices or [_HERE])
        ):
            self.uploads["index"] += 1

    def _note(self, name: str, own: torch.device | None, args: Any, made_on: torch.device | None) -> None:
        masked = name == "__getitem__" and any(t.dtype == torch.bool for t in _tensors((args[1],)))
        one_sided = name == "where" and len(args) == 1
        if own not in (None, CPU) and (name in _WAITS or masked or one_sided):
            self.waits[name] += 1
        if name in ("tensor", "as_tensor") and made_on not in (None, CPU):
            self.uploads[name] += 1

    @contextmanager
    def _random_state(self, device: torch.device) -> Iterator[None]:
        """The device's own, not the CPU's."""
        generator, before = self.generators[device.index], torch.get_rng_state()
        torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)

    def _to(self, func: Any, own: torch.device, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = bool(kwargs.pop("copy", False))
        if args and isinstance(args[0], Tensor):
            args = (self.device_of(args[0]), args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device = own if device is None else self.named(device)
        if device != own:
            self._crossing(own, device, "to", non_blocking and hasattr(tensor.untyped_storage(), "pinned"))
        made = func(
            tensor, dtype=dtype, copy=copy or device != own, memory_format=memory_format or torch.preserve_format
        )
        return self.put(made, device)

    def _cuda(self, func: Any, own: torch.device, tensor: Tensor, device: Any = "cuda", **kwargs: Any) -> Tensor:
        return self._to(torch.Tensor.to, own, tensor, self.named(device or "cuda"), **kwargs)

    def _cpu(self, func: Any, own: torch.device, tensor: Tensor, **kwargs: Any) -> Tensor:
        return self._to(torch.Tensor.to, own, tensor, CPU, **kwargs)

    def _copy_(self, func: Any, own: torch.device, tensor: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
        given = self.device_of(source)
        if given != own:
            pinned = hasattr((source if given == CPU else tensor).untyped_storage(), "pinned")
            self._crossing(given, own, "copy_", non_blocking and pinned)
        return func(tensor, source)

    def _crossing(self, start: torch.device, end: torch.device, name: str, unwaited: bool) -> None:
        if not unwaited:
            (self.waits if end == CPU else self.uploads)[name] += 1

    def _type(self, func: Any, own: torch.device, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.put(func(tensor, *args, **kwargs), own)
        return func(tensor) if own == CPU else func(tensor).replace("torch.", "torch.cuda.", 1)

    def _get_device(self, func: Any, own: torch.device, tensor: Tensor) -> int:
        return -1 if own == CPU else own.index

    def _pin_memory(self, func: Any, own: torch.device, tensor: Tensor) -> Tensor:
        if own != CPU:
            raise DeviceFault("only dense CPU tensors can be pinned")
        made = tensor.clone()
        made.untyped_storage().pinned = True  # type: ignore[attr-defined]
        return made

    def _is_pinned(self, func: Any, own: torch.device, tensor: Tensor) -> bool:
        return hasattr(tensor.untyped_storage(), "pinned")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _has_indices(index: Any) -> bool:
    """Whether an index is more than slices and numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor | np.ndarray | list) for part in parts)


class _Stream:
    """A stream or an event of a device that does everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at, self.cuda_stream = 0.0, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: _Stream() if name == "record_event" else None


class _Graph:
    """What was called while it was recorded, called again on the same memory."""

    gpu: PretendGPU

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        self.gpu.replays += 1
        with torch._C.DisableTorchFunction():
            for call, recorded in self.calls:
                for old, new in zip(_tensors((recorded,)), _tensors((call(),)), strict=True):
                    old.copy_(new)


@contextmanager
def pretend_gpu(count: int = 1) -> Iterator[PretendGPU]:
    """torch sees `count` GPUs; nothing is left of them afterwards, nor is the CPU in CUDA's place meanwhile."""
    gpu = PretendGPU(count)
    patch = pytest.MonkeyPatch()
    properties = SimpleNamespace(name="pretend", major=9, minor=0, total_memory=2**36, multi_processor_count=1)

    def wait(*_: Any) -> None:
        gpu.waits["synchronize"] += 1

    @contextmanager
    def record(graph: _Graph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        wait()
        graph.gpu, gpu.recording = gpu, graph.calls
        try:
            yield
        finally:
            gpu.recording = None

    of_cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_initialized": True,
        "device_count": lambda: count,
        "current_device": lambda: gpu.current.index,
        "set_device": gpu.choose,
        "synchronize": wait,
        "empty_cache": lambda: None,
        "default_generators": gpu.generators,
        "is_bf16_supported": lambda *_: True,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: "pretend",
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (2**36, 2**36),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "CUDAGraph": _Graph,
        "graph": record,
        "graph_pool_handle": lambda: None,
    }
    # a process in which the CPU stood in CUDA's place before
    for (owner, name), original in cuda_on_cpu.replaced.items():
        patch.setattr(owner, name, original)
    patch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER", None)
    patch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False)
    for name, value in of_cuda.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.cuda.random, "current_device", of_cuda["current_device"])
    patch.setattr(torch.cuda.nccl, "version", lambda: (2, 0, 0))
    _gloo_for_nccl(gpu, patch)
    # torch looks away within `backward`, and in other threads
    for owner, name in ((torch.autograd, "_engine_run_backward"), (threading.Thread, "run")):
        patch.setattr(owner, name, _watched(getattr(owner, name), gpu))
    try:
        with gpu:
            yield gpu
    finally:
        patch.undo()


def _watched(call: Callable[..., Any], gpu: PretendGPU) -> Callable[..., Any]:
    def watched(*args: Any, **how: Any) -> Any:
        with gpu:
            return call(*args, **how)

    return watched


def _gloo_for_nccl(gpu: PretendGPU, patch: pytest.MonkeyPatch) -> None:
    """Groups of NCCL are gloo's, call themselves NCCL's, and take nothing but a GPU's tensors; gloo's take a CPU's."""
    init, new_group = dist.init_process_group, dist.new_group
    on_cpu: set[Any] = set()

    def new(*args: Any, backend: str | None = None, **how: Any) -> Any:
        made = new_group(*args, backend="gloo" if backend else None, **how)
        if backend == "gloo":
            on_cpu.add(made)
        return made

    def checked(name: str) -> Callable[..., Any]:
        collective = getattr(dist, name)

        @functools.wraps(collective)
        def call(*args: Any, **how: Any) -> Any:
            groups = [one for one in (*args, *how.values()) if isinstance(one, dist.ProcessGroup)]
            wanted = "cpu" if any(one in on_cpu for one in groups) else "cuda"
            for tensor in _tensors((args, how)):
                if gpu.device_of(tensor).type != wanted:
                    raise DeviceFault(f"{name}: a tensor on {gpu.device_of(tensor)} in a group of the other backend")
            return collective(*args, **how)

        return call

    patch.setattr(dist, "init_process_group", lambda backend, **how: init("gloo", **how))
    patch.setattr(dist, "new_group", new)
    patch.setattr(dist, "get_backend", lambda group=None: "gloo" if group in on_cpu else "nccl")
    for name in _COLLECTIVES:
        patch.setattr(dist, name, checked(name))
