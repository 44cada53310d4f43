"""cpu_kernels.c, compiled for this machine on first use, and its functions on torch tensors.

Compiled rather than shipped, so that it uses what the processor has. Without a C compiler the decode step runs on
torch's own kernels, with one line in the log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    # sums may be reordered to make vectors of them; infinities and NaN stay what they are
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)


class CpuKernels:
    """The functions of cpu_kernels.c; tensors are bf16 and contiguous, the caller sees to that."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        self._add_rms_norm, self._silu_mul, self._attend = library.add_rms_norm, library.silu_mul, library.attend_cached
        self._add_rms_norm.argtypes = [pointer] * 4 + [number] * 2 + [ctypes.c_float]
        self._silu_mul.argtypes = [pointer] * 2 + [number] * 2
        self._attend.argtypes = [
            *(pointer, pointer, pointer, number, pointer, pointer),
            *(number, number, pointer, number, number, number, number, ctypes.c_float),
        ]
        self._add_rms_norm.restype = self._silu_mul.restype = None

    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """`hidden` `[N, H]` += `delta`, in place; returns its root-mean-square norm times `weight` `[H]`."""
        out = torch.empty_like(hidden)
        added = None if delta is None else delta.data_ptr()
        self._add_rms_norm(hidden.data_ptr(), added, weight.data_ptr(), out.data_ptr(), *hidden.shape, eps)
        return out

    def silu_mul(self, inner: Tensor) -> Tensor:
        """silu(first half) · second half of the columns of `inner` `[N, 2F]`: `[N, F]`."""
        out = inner.new_empty(len(inner), inner.size(1) // 2)
        self._silu_mul(inner.data_ptr(), out.data_ptr(), *out.shape)
        return out

    def attend(
        self,
        mixed: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        places: Tensor,
        positions: Tensor,
        *,
        layer: int,
        window: int,
        scale: float,
    ) -> Tensor:
        """Rotary embedding, storing of the new keys and values, and attention over what is cached.

        `mixed` is `[N, G, R + 2, D]`: R query heads, key and value of each group. `rotary` is cos and signed sin,
        `[positions, D_rot]`; `places` `[N, 4]` int64 as KVCache.places gives them; `positions` `[N]` int64. A `window`
        of 0 sees everything. Returns `[N, G·R·D]`. Raises MemoryError.
        """
        rows, groups, heads, width = mixed.shape
        out = mixed.new_empty(rows, groups * (heads - 2) * width)
        cos, sin, turned = (None, None, 0) if rotary is None else (*(t.data_ptr() for t in rotary), rotary[0].size(1))
        if self._attend(
            *(mixed.data_ptr(), cos, sin, turned, places.data_ptr(), positions.data_ptr()),
            *(layer, window, out.data_ptr(), rows, groups, heads - 2, width, scale),
        ):
            raise MemoryError("attention over the cache")
        return out


def cpu_kernels(dtype: torch.dtype, device: torch.device, head_dim: int) -> CpuKernels | None:
    """The kernels where they apply: bf16 on a CPU, heads of whole vectors."""
    if device.type != "cpu" or dtype != torch.bfloat16 or head_dim % 16 or head_dim > 256:
        return None
    return _compiled()


@functools.cache
def _compiled() -> CpuKernels | None:
    """Compile, or find what was compiled before."""
    compiler = _compiler()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_aligner"
    identity = "\n".join([_SOURCE.read_text(), compiler, *_FLAGS, _processor()])
    library = cache / f"cpu_kernels_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            cache.mkdir(parents=True, exist_ok=True)
            # a private name first: several processes may compile at once
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / library.name
                command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True)
                made.replace(library)
        return CpuKernels(ctypes.CDLL(str(library)))
    except subprocess.CalledProcessError as fault:
        reason = next((line for line in fault.stderr.splitlines() if "error" in line), str(fault))
    except OSError as fault:
        reason = str(fault)
    log.warning("generation runs on torch's kernels, slower: cannot compile %s (%s)", _SOURCE.name, reason)
    return None


def _compiler() -> str:
    """$CC, else the one Python was built with if it is here, else cc."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])[0]
    pythons = shlex.split(sysconfig.get_config_var("CC") or "")[:1]
    return next((name for name in pythons if shutil.which(name)), "cc")


def _processor() -> str:
    """What -march=native looks at: folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
