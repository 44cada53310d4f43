"""The C files of csrc/, compiled for this machine on first use, and their functions on torch tensors.

Compiled rather than shipped, so that it uses what the processor has. Without a C compiler, or a place to keep what it
makes, torch's own kernels do the same, with one line in the log. A library ends with its sum: one that is damaged is
compiled again.
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
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner.algorithms.sampling import Drawn
from nemo_aligner.files import fsync

log = logging.getLogger(__name__)

_SOURCES = sorted(Path(__file__).with_name("csrc").glob("*.[ch]"))
_FLAGS = (
    *("-O3", "-fopenmp", "-fPIC", "-shared"),
    # gcc takes half of what newer processors have
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
    # sums may be reordered to make vectors of them; infinities and NaN stay what they are
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
_SUM_BYTES = hashlib.sha256().digest_size
_DEFINES = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}


def address(tensor: Tensor | None) -> int | None:
    """Where its numbers are, as C takes it; None is C's null."""
    return None if tensor is None else tensor.data_ptr()


class CpuKernels:
    """The functions of the C files. The caller sees to it that tensors are contiguous and of the dtype compiled for."""

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
        self._draw = library.draw_tokens
        self._draw.argtypes = [
            *(pointer, number, ctypes.c_float, pointer, pointer, pointer, number),
            *(pointer, pointer, pointer, number, number),
        ]
        self._rms_norm_backward, self._silu_mul_backward = library.rms_norm_backward, library.silu_mul_backward
        self._rms_norm_backward.argtypes = [pointer] * 5 + [number] * 2 + [ctypes.c_float]
        self._silu_mul_backward.argtypes, self._silu_mul_backward.restype = [pointer] * 3 + [number] * 2, None
        self._log_sums, self._logprobs_backward = library.log_sums, library.logprobs_backward
        self._log_sums.argtypes, self._log_sums.restype = [pointer, number, pointer, number, number], None
        self._logprobs_backward.argtypes, self._logprobs_backward.restype = [pointer] * 5 + [number] * 3, None
        self.stream_attention = library.stream_attention
        self.stream_attention.argtypes = [pointer] * 5
        self.has_units = bool(library.has_units())
        if self.has_units:
            self._add_weight_gradient = library.add_weight_gradient
            self._add_weight_gradient.argtypes = [pointer] * 3 + [number] * 3
        self.has_products = bool(library.has_products())
        self._pack, self._rows_of = library.pack, library.rows_of
        self._pack.argtypes = [pointer, number, number, ctypes.c_int]
        self._rows_of.argtypes, self._rows_of.restype = [pointer] * 3 + [number] * 3, None
        if self.has_products:
            self._product = library.product
            self._product.argtypes = [pointer] * 4 + [number] * 3
            self.attention_half, self.feed_forward_half = library.attention_half, library.feed_forward_half
            self.attention_half.argtypes = [pointer] * 6 + [number]
            self.feed_forward_half.argtypes = [pointer] * 4 + [number]

    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """`hidden` `[N, H]` += `delta`, in place; returns its root-mean-square norm times `weight` `[H]`."""
        out = torch.empty_like(hidden)
        self._add_rms_norm(hidden.data_ptr(), address(delta), weight.data_ptr(), out.data_ptr(), *hidden.shape, eps)
        return out

    def silu_mul(self, inner: Tensor) -> Tensor:
        """silu(first half) · second half of the columns of `inner` `[N, 2F]`: `[N, F]`."""
        out = inner.new_empty(len(inner), inner.size(1) // 2)
        self._silu_mul(inner.data_ptr(), out.data_ptr(), *out.shape)
        return out

    def rms_norm_backward(self, x: Tensor, weight: Tensor, given: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Gradients of `x` `[N, H]` and `weight` `[H]` from that of the norm of `x`. Raises MemoryError."""
        found, weights = torch.empty_like(x), torch.empty_like(weight)
        addresses = (tensor.data_ptr() for tensor in (x, weight, given, found, weights))
        if self._rms_norm_backward(*addresses, *x.shape, eps):
            raise MemoryError("gradient of a norm")
        return found, weights

    def silu_mul_backward(self, inner: Tensor, given: Tensor) -> Tensor:
        """The gradient of `inner` `[N, 2F]` from that of `silu_mul`, `[N, F]`."""
        found = torch.empty_like(inner)
        self._silu_mul_backward(inner.data_ptr(), given.data_ptr(), found.data_ptr(), *given.shape)
        return found

    def log_sums(self, logits: Tensor, vocab_size: int) -> Tensor:
        """log Σ e^logit over the first `vocab_size` of `logits` `[N, V]`: `[N]` float32."""
        out = torch.empty(len(logits))
        self._log_sums(logits.data_ptr(), logits.stride(0), out.data_ptr(), len(logits), vocab_size)
        return out

    def logprobs_backward(
        self, logits: Tensor, log_sums: Tensor, given: Tensor, targets: Tensor, vocab_size: int
    ) -> Tensor:
        """The gradient of `logits` `[N, V]` from those `given` of the log-probabilities of `targets`, all `[N]`.

        `log_sums` `[N]` is over all ranks' parts of the vocabulary; a target below 0 is in another's.
        """
        found = torch.empty_like(logits)
        addresses = (tensor.data_ptr() for tensor in (logits, log_sums, given, targets, found))
        self._logprobs_backward(*addresses, *logits.shape, vocab_size)
        return found

    def add_weight_gradient(self, x: Tensor, given: Tensor, gradient: Tensor) -> None:
        """`gradient` `[O, I]` float32 += `given`ᵀ · `x`, of `[N, O]` and `[N, I]`; O and I are multiples of 16.

        Needs `has_units`. Raises MemoryError.
        """
        addresses = (tensor.data_ptr() for tensor in (x, given, gradient))
        if self._add_weight_gradient(*addresses, *x.shape, given.size(1)):
            raise MemoryError("gradient of a weight")

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
        `[positions, D_rot]`; D is a multiple of 16, at most 256. `places` are as KVCache.places gives them, `positions`
        `[N]` int64. A `window` of 0 sees everything. Returns `[N, G·R·D]`. Raises MemoryError.
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

    def draw(
        self, logits: Tensor, temperature: float, uniform: Tensor, forbidden: tuple[Tensor, Tensor] | None
    ) -> Drawn:
        """algorithms.sampling.draw where nothing but `temperature` is asked for. Raises MemoryError."""
        rows = len(logits)
        tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(2, rows)
        flags, ids, count = (
            (None, None, 0) if forbidden is None else (*(t.data_ptr() for t in forbidden), len(forbidden[1]))
        )
        if self._draw(
            *(logits.data_ptr(), logits.stride(0), 1 / temperature, uniform.data_ptr(), flags, ids, count),
            *(tokens.data_ptr(), logprobs[0].data_ptr(), logprobs[1].data_ptr(), rows, logits.size(1)),
        ):
            raise MemoryError("drawing tokens")
        return Drawn(tokens, logprobs[0], logprobs[1])

    def pack(self, weight: Tensor, back: bool = False) -> None:
        """`weight` `[N, K]`, K even, into the order in which `product` reads it, in its own memory; or `back`.

        Raises MemoryError, and the weight is then as it was.
        """
        if self._pack(weight.data_ptr(), *weight.shape, back):
            raise MemoryError("packing a weight")

    def rows_of(self, packed: Tensor, ids: Tensor) -> Tensor:
        """Rows `ids` `[M]` int64 of a packed weight `[N, K]`: `[M, K]`."""
        out = packed.new_empty(len(ids), packed.size(1))
        self._rows_of(packed.data_ptr(), ids.data_ptr(), out.data_ptr(), len(ids), *packed.shape)
        return out

    def product(self, rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """`rows` `[M, K]` times a packed weight `[N, K]`, plus `bias` `[N]`: `[M, N]`.

        Summed in float32; a row's result does not depend on the other rows. Raises MemoryError.
        """
        out = rows.new_empty(len(rows), len(packed))
        if self._product(rows.data_ptr(), packed.data_ptr(), address(bias), out.data_ptr(), len(rows), *packed.shape):
            raise MemoryError("matrix product")
        return out


def cpu_kernels(dtype: torch.dtype, device: torch.device) -> CpuKernels | None:
    """The kernels for tensors of `dtype`, bf16 or float32, on a CPU; None elsewhere and without a C compiler."""
    return _compiled(dtype) if device.type == "cpu" and dtype in _DEFINES else None


@functools.cache
def _compiled(dtype: torch.dtype, processor: str = "native") -> CpuKernels | None:
    """Compile for a `processor`, as -march names it, or find what was compiled before."""
    try:
        compiler, flags = _compiler(), (*_FLAGS, f"-march={processor}", *_DEFINES[dtype])
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_aligner"
        identity = "\n".join([*(file.read_text() for file in _SOURCES), compiler, *flags, _processor(), "with its sum"])
        library = cache / f"cpu_kernels_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if library.exists() and not _is_whole(library):
            log.warning("%s is damaged, and compiled again", library)
            library.unlink()
        if not library.exists():
            _compile(library, compiler, flags)
        return CpuKernels(ctypes.CDLL(str(library)))
    except subprocess.CalledProcessError as fault:
        lines = [line for line in fault.stderr.splitlines() if line.strip()] or [f"{compiler} failed"]
        reason = next((line for line in lines if "error" in line), lines[-1])
    except (OSError, RuntimeError, ValueError) as fault:  # no home; $CC with half a quotation
        reason = str(fault)
    log.warning("torch's kernels are used, slower: cannot compile %s (%s)", _SOURCES[0].parent, reason)
    return None


def _compile(library: Path, compiler: str, flags: Sequence[str]) -> None:
    """Raises OSError, CalledProcessError."""
    library.parent.mkdir(parents=True, exist_ok=True)
    # a private name first: several processes may compile at once
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        sources = [str(file) for file in _SOURCES if file.suffix == ".c"]
        subprocess.run(
            [compiler, *flags, *sources, "-o", str(made), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": folder},  # /tmp may be full
        )
        with made.open("ab") as stream:  # the loader looks at what the header names, and at nothing behind it
            stream.write(_sum(made.read_bytes()))
        fsync(made)
        made.replace(library)


def _is_whole(library: Path) -> bool:
    """Whether a library is what was compiled: one that was cut short would end the process that calls it."""
    content = library.read_bytes()
    return content[-_SUM_BYTES:] == _sum(content[:-_SUM_BYTES])


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _compiler() -> str:
    """$CC, else the one Python was built with if it is here, else cc."""
    given = shlex.split(os.environ.get("CC") or "")
    if given:
        return given[0]
    pythons = shlex.split(sysconfig.get_config_var("CC") or "")[:1]
    return next((name for name in pythons if shutil.which(name)), "cc")


def _processor() -> str:
    """What -march=native looks at: folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
