"""The pretend GPU refuses what a GPU refuses, allows what it allows, and counts what makes the host wait."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.pretend_gpu import CPU, DeviceFault, PretendGPU, pretend_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> Iterator[PretendGPU]:
    with pretend_gpu() as gpu:
        yield gpu


def one(device: torch.device = GPU) -> torch.Tensor:
    return torch.ones(3, device=device)


REFUSED: dict[str, Callable[[], object]] = {
    "a sum of both": lambda: one() + one(CPU),
    "in place": lambda: one().add_(one(CPU)),
    "in a list": lambda: torch.cat([one(), one(CPU)]),
    "in a function of Python": lambda: F.layer_norm(one(), (3,), one(CPU)),
    "as a keyword": lambda: torch.where(one() > 0, one(), other=one(CPU)),
    "a GPU's number beside a CPU's row": lambda: one(CPU) * one()[0],
    "a GPU's indices": lambda: one(CPU)[torch.zeros(1, dtype=torch.int64, device=GPU)],
    "a CPU's value at indices": lambda: one().__setitem__(torch.tensor([0, 1], device=GPU), one(CPU)[:2]),
    "numpy": lambda: one().numpy(),
    "numpy of a view": lambda: one()[1:].detach().numpy(),
    "numpy, unasked": lambda: np.asarray(one()),
    "a gradient": lambda: setattr(torch.nn.Parameter(one()), "grad", one(CPU)),
    "to pin a GPU's": lambda: one().pin_memory(),
    "NCCL of a CPU's": lambda: torch.distributed.all_reduce(one(CPU)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_refuses_is_refused(what: str, gpu: PretendGPU) -> None:
    with pytest.raises(DeviceFault):
        REFUSED[what]()


def test_what_a_gpu_allows_is_allowed(gpu: PretendGPU) -> None:
    row, indices = one(), torch.tensor([0, 2])
    assert (row * torch.tensor(2.0)).device == GPU
    assert row[indices].device == GPU
    row[:2] = torch.zeros(2)
    assert row.cpu().tolist() == [0, 0, 1]
    assert one(CPU).copy_(row).numpy().tolist() == [0, 0, 1]


def test_a_tensor_remembers_its_device_however_it_came_to_be(gpu: PretendGPU) -> None:
    found = [
        *(torch.zeros(2, device="cuda"), torch.empty(2, device=0), torch.arange(2, device=GPU), torch.ones(2).cuda()),
        *(one().new_zeros(2), torch.empty_like(one()), one().view(3, 1)[1:], one().half(), one().to(one(CPU).dtype)),
        *(copy.deepcopy(torch.nn.Linear(2, 2).cuda()).weight, one().exp(), one().unbind()[0], one(CPU).to(one())),
    ]
    assert [t.device for t in found] == [GPU] * len(found)
    assert all(t.is_cuda and not t.is_cpu and t.get_device() == 0 and ".cuda." in t.type() for t in found)
    back = [
        one().cpu(),
        one().to("cpu"),
        one().to(one(CPU)),
        torch.zeros_like(one(), device="cpu"),
        torch.from_numpy(np.ones(2)),
    ]
    assert [t.device for t in back] == [CPU] * len(back)


def test_gradients_are_where_their_parameters_are(gpu: PretendGPU) -> None:
    seen: list[torch.device] = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(value)  # type: ignore[attr-defined]
            return value * 2

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            [saved] = ctx.saved_tensors  # type: ignore[attr-defined]
            seen.extend([gradient.device, saved.device])
            return gradient * torch.full_like(saved, 2)

    weight = torch.nn.Parameter(one())
    (Doubled.apply(weight) * one()).sum().backward()
    assert weight.grad is not None
    assert [*seen, weight.grad.device] == [GPU] * 3
    weight.grad += one()


def test_the_gpus_random_numbers_are_its_own(gpu: PretendGPU) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device=GPU).cpu()
    assert torch.equal(torch.rand(3), expected)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=GPU).cpu(), first)


def test_what_makes_the_host_wait_is_counted(gpu: PretendGPU) -> None:
    row, mask = one(), one() > 0
    assert not gpu.waits
    for wait in (row[0].item, row.tolist, lambda: bool(row[0]), row.cpu, lambda: row[mask], mask.nonzero):
        before = sum(gpu.waits.values())
        wait()
        assert sum(gpu.waits.values()) == before + 1
    gpu.waits.clear()
    torch.ones(2).pin_memory().to(GPU, non_blocking=True)
    assert not gpu.uploads
    for upload in (lambda: torch.ones(2).to(GPU), lambda: torch.tensor([1], device=GPU), lambda: row[[0, 1]]):
        before = sum(gpu.uploads.values())
        upload()
        assert sum(gpu.uploads.values()) == before + 1
    assert not gpu.waits


def test_nothing_is_left_of_it() -> None:
    before = torch.cuda.is_available, torch.zeros, torch.Tensor.cuda, torch.distributed.all_reduce
    with pretend_gpu():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available, torch.zeros, torch.Tensor.cuda, torch.distributed.all_reduce) == before
    assert torch.zeros(2).device == CPU
