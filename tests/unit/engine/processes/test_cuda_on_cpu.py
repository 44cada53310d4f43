"""The CPU stands in CUDA's place where it is asked for, be there a GPU or not."""

from __future__ import annotations

import pytest
import torch

from nemo_aligner.engine.processes import cuda_on_cpu


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_run_on_the_cpu_sees_no_gpu(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_on_cpu, "replaced", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    try:
        cuda_on_cpu.enable_cpu()
        before = dict(cuda_on_cpu.replaced)
        assert not torch.cuda.is_available()
        assert torch.zeros(2, device=torch.cuda.current_device()).cuda().device.type == "cpu"
        assert torch.empty(2, device="cuda").device.type == "cpu"
        cuda_on_cpu.enable_cpu()
        assert cuda_on_cpu.replaced == before
    finally:
        for (owner, name), original in cuda_on_cpu.replaced.items():
            setattr(owner, name, original)
