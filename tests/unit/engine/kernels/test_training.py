"""What training runs between its products, and the gradients of it, against their definitions in float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.algorithms.shared_prefix import Layout, lay_out
from nemo_aligner.engine.kernels.library import CpuKernels
from nemo_aligner.engine.kernels.pointwise import RmsNorm, SiluGate
from nemo_aligner.engine.kernels.stream_attention import StreamAttention, attend_alike, spans_of
from tests.unit.engine.kernels.numbers import normal


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Within what numbers of the dtype of `found` can say, of the largest."""
    share = 1e-5 if found.dtype == torch.float32 else 2**-6
    assert (found.double() - wanted).abs().max() <= share * wanted.abs().max()


def checked(found: Tensor, wanted: Tensor, inputs: list[Tensor], exact: list[Tensor]) -> None:
    """Outputs, and gradients of `inputs` beside those of their float64 copies `exact`, agree."""
    given = normal(found.dtype, *found.shape)
    assert_near(found.detach(), wanted.detach())
    gradients = torch.autograd.grad(found, inputs, given)
    for gradient, right in zip(gradients, torch.autograd.grad(wanted, exact, given.double()), strict=True):
        assert_near(gradient, right)


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("shape", [(1, 1, 200), (70, 1, 200), (3, 41, 7)])
def test_norm_and_its_gradient(kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = [normal(dtype, *shape).requires_grad_(), normal(dtype, shape[-1]).requires_grad_()]
    exact = doubled(inputs)
    found = RmsNorm.apply(*inputs, 1e-5, kernels)
    checked(found, F.rms_norm(exact[0], shape[-1:], exact[1], 1e-5), inputs, exact)


@pytest.mark.parametrize("shape", [(1, 1, 160), (70, 1, 160), (3, 5, 14)])
def test_gate_and_its_gradient(kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = [normal(dtype, *shape, scale=4.0).requires_grad_()]
    exact = doubled(inputs)
    gate, value = exact[0].chunk(2, dim=-1)
    checked(SiluGate.apply(*inputs, kernels), F.silu(gate) * value, inputs, exact)


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 1), (3, 300, 257), (40, 320, 320), (5, 17, 3)])
def test_log_sums_and_the_gradient_of_log_probabilities(
    kernels: CpuKernels, dtype: torch.dtype, rows: int, width: int, vocabulary: int
) -> None:
    logits = normal(dtype, rows, width, scale=4.0)
    logits[:, vocabulary:] = 99.0  # padding, not looked at
    logits[0, vocabulary - 1] = 40.0  # as good as certain
    exact = logits[:, :vocabulary].double().requires_grad_()
    log_sums = kernels.log_sums(logits, vocabulary)
    torch.testing.assert_close(log_sums.double(), exact.detach().logsumexp(1), rtol=1e-6, atol=1e-6)
    targets, given = torch.arange(rows) % vocabulary, normal(torch.float32, rows)
    targets[-1] = -1  # in another rank's part
    found = kernels.logprobs_backward(logits, log_sums, given, targets, vocabulary)
    wanted = exact.gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * (targets >= 0) - exact.logsumexp(1)
    [right] = torch.autograd.grad(wanted, exact, given.double())
    share = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[:, :vocabulary].double(), right, rtol=share, atol=1e-6)
    assert not found[:, vocabulary:].any()


@pytest.mark.parametrize(("places", "inputs", "outputs"), [(0, 16, 32), (5, 80, 48), (100, 16, 16), (2100, 48, 272)])
def test_gradients_of_a_weight_are_added_up(
    kernels: CpuKernels, dtype: torch.dtype, places: int, inputs: int, outputs: int
) -> None:
    if not kernels.has_units:
        pytest.skip("there are no units for matrices, or not for this dtype")
    x, given, before = normal(dtype, places, inputs), normal(dtype, places, outputs), torch.randn(outputs, inputs)
    found, wanted = before.clone(), before.double() + given.double().T @ x.double()
    kernels.add_weight_gradient(x, given, found)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = before.clone()
    kernels.add_weight_gradient(x, given, again)
    torch.set_num_threads(threads)
    assert torch.equal(again, found)


def rows_of_all_kinds() -> list[list[int]]:
    """Long and short, alike at first in two ways, one that others begin with, and more than one block of queries."""
    rng = random.Random(1)
    long, short = rng.choices(range(250), k=61), rng.choices(range(250), k=9)
    alike = [[*long, *rng.choices(range(250), k=k)] for k in (1, 90, 7, 0)]
    alike += [[*short, *rng.choices(range(250), k=k)] for k in (20, 130)]
    return alike + [rng.choices(range(250), k=k) for k in (1, 33, 150)]


def attended(mixed: Tensor, rotary: tuple[Tensor, Tensor] | None, layout: Layout, window: int | None) -> Tensor:
    """Row by row, from the definition; `mixed` `[N, G, R + 2, D]` → `[N, G·R·D]`."""
    out = torch.zeros(len(mixed), mixed.size(1) * (mixed.size(2) - 2) * mixed.size(3), dtype=mixed.dtype)
    for places, length in zip(layout.places, map(len, rows_of_all_kinds()), strict=True):
        at = places[:length]
        heads = mixed[at]
        if rotary is not None:
            cos, sin = (table.double()[at][:, None, None] for table in rotary)
            width = cos.size(-1)
            left, right = heads[:, :, :-1, :width].chunk(2, dim=-1)
            turned = torch.cat((left, right), -1) * cos + torch.cat((right, left), -1) * sin
            turned = torch.cat((turned, heads[:, :, :-1, width:]), -1)
            heads = torch.cat((turned, heads[:, :, -1:]), 2)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= (window or length))
        scores = torch.einsum("igrd,jgd->grij", heads[:, :, :-2], heads[:, :, -2]) / mixed.size(3) ** 0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = out.index_copy(0, at, torch.einsum("grij,jgd->igrd", weights, heads[:, :, -1]).flatten(1))
    return out


@pytest.mark.parametrize(
    ("groups", "heads", "width", "turned", "window"),
    [(2, 3, 64, 64, None), (1, 1, 16, 8, None), (3, 2, 80, 0, 5), (1, 4, 128, 128, 40), (2, 1, 32, 16, None)],
)
@pytest.mark.parametrize("multiple", [1, 7])
def test_attention_of_a_stream_and_its_gradient_are_those_of_every_row_by_itself(
    kernels: CpuKernels,
    dtype: torch.dtype,
    groups: int,
    heads: int,
    width: int,
    turned: int,
    window: int | None,
    multiple: int,
) -> None:
    layout = lay_out(rows_of_all_kinds(), multiple=multiple)
    inputs = [normal(dtype, len(layout.tokens), groups, heads + 2, width).requires_grad_()]
    exact = doubled(inputs)
    rotary = None
    if turned:
        angles = (layout.positions[:, None] * torch.logspace(0, -3, turned // 2)).repeat(1, 2)
        sign = torch.tensor([-1.0, 1.0]).repeat_interleave(turned // 2)
        rotary = angles.cos().to(dtype), (angles.sin() * sign).to(dtype)
    options = spans_of(layout.groups), window, width**-0.5, kernels
    checked(StreamAttention.apply(*inputs, rotary, *options), attended(*exact, rotary, layout, window), inputs, exact)


@pytest.mark.parametrize(("width", "window"), [(64, None), (16, 5), (80, 40)])
def test_attention_alike_is_a_function_of_the_row_whatever_it_shares(
    kernels: CpuKernels, dtype: torch.dtype, width: int, window: int | None
) -> None:
    rows = [*rows_of_all_kinds(), *(list(range(k)) for k in (31, 32, 33, 64, 200))]
    table, angles = normal(dtype, 250, 2, 4, width), torch.arange(300)[:, None] * torch.logspace(0, -3, width // 2)
    cos, sin = angles.cos().repeat(1, 2).to(dtype), torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)

    def attended_alike(rows: list[list[int]], minimum: int) -> list[Tensor]:
        layout = lay_out(rows, minimum=minimum)
        rotary, spans = (cos[layout.positions], sin[layout.positions]), spans_of(layout.groups)
        out = attend_alike(table[layout.tokens], rotary, spans, window, width**-0.5, kernels)
        return [out[places[: len(row)]] for places, row in zip(layout.places, rows, strict=True)]

    alone = [attended_alike([row], 1)[0] for row in rows]
    for minimum in (1, 8, 1000):
        assert all(map(torch.equal, attended_alike(rows, minimum), alone))
    assert all(map(torch.equal, attended_alike(rows[::-2], 8), alone[::-2]))


def test_attention_of_a_stream_is_the_same_with_any_number_of_threads(kernels: CpuKernels, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    layout = lay_out(rows_of_all_kinds())
    mixed = normal(dtype, len(layout.tokens), 2, 4, 16).requires_grad_()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = StreamAttention.apply(mixed, None, spans_of(layout.groups), None, 0.25, kernels)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), [mixed])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True))
