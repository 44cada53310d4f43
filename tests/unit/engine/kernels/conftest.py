"""The C kernels, compiled for each dtype and for each kind of processor that this one can stand in for."""

from __future__ import annotations

import itertools
import platform
from pathlib import Path

import pytest
import torch

from nemo_aligner.engine.kernels import library
from nemo_aligner.engine.kernels.library import CpuKernels


def kinds() -> list[tuple[torch.dtype, str]]:
    """What to compile for: this processor, and lesser ones of its kind, which it can stand in for."""
    processors, flags = ["native"], set()
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        lesser = {
            "x86-64": set(),
            "x86-64-v3": {"avx2", "fma", "bmi2"},
            "x86-64-v4": {"avx512f", "avx512bw", "avx512vl"},
        }
        processors += [name for name, needed in lesser.items() if needed <= flags]
        if "amx_bf16" in flags:  # the like without units for matrices
            processors.append("cooperlake")
    return list(itertools.product((torch.bfloat16, torch.float32), processors))


@pytest.fixture(scope="module", params=kinds(), ids=str)
def kind(request: pytest.FixtureRequest) -> tuple[torch.dtype, str]:
    found: tuple[torch.dtype, str] = request.param
    return found


@pytest.fixture(scope="module")
def dtype(kind: tuple[torch.dtype, str]) -> torch.dtype:
    return kind[0]


@pytest.fixture(scope="module")
def kernels(kind: tuple[torch.dtype, str]) -> CpuKernels:
    found = library._compiled(*kind)
    assert found is not None, "a C compiler is needed for these tests"
    return found
