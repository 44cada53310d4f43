"""The C kernels of the decode step against the same formulas in torch, float32."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nemo_aligner.algorithms.sampling import _at
from nemo_aligner.engine.generation.cached_attention import Rotary, turned_heads
from nemo_aligner.engine.generation.kv_cache import CachedPrompt, KVCache
from nemo_aligner.engine.kernels import library
from nemo_aligner.engine.kernels.layer import CpuLayer, LayerWeights
from nemo_aligner.engine.kernels.library import CpuKernels
from tests.unit.engine.kernels.numbers import assert_close, normal


@pytest.mark.parametrize("rows", [1, 70])
def test_add_rms_norm_adds_in_place_and_normalises(kernels: CpuKernels, dtype: torch.dtype, rows: int) -> None:
    hidden, delta, weight = normal(dtype, rows, 200), normal(dtype, rows, 200, scale=0.5), normal(dtype, 200)
    summed = hidden + delta
    found = kernels.add_rms_norm(hidden, delta, weight, 1e-5)
    assert torch.equal(hidden, summed)
    assert_close(found, F.rms_norm(summed.float(), (200,), weight.float(), 1e-5))
    assert_close(kernels.add_rms_norm(hidden, None, weight, 1e-5), found)


@pytest.mark.parametrize("rows", [1, 70])
def test_silu_mul_gates_the_second_half_by_the_first(kernels: CpuKernels, dtype: torch.dtype, rows: int) -> None:
    inner = normal(dtype, rows, 2 * 160, scale=8.0)
    gate, value = inner.float().chunk(2, dim=-1)
    assert_close(kernels.silu_mul(inner), F.silu(gate).to(dtype).float() * value)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("turned_part", [0.0, 0.5, 1.0])
def test_attend_is_softmax_attention_over_what_is_cached_and_the_new_position(
    kernels: CpuKernels, dtype: torch.dtype, heads: int, width: int, window: int, turned_part: float
) -> None:
    groups, layers, lengths = 2, 2, [3, 40, 70]
    cache = KVCache(3, grain=32, block_rows=2, shares_prompts=True)
    prompts = [normal(dtype, layers, 2, groups, length, width) for length in lengths]
    for slot, prompt in enumerate(prompts):  # the last half of each is the row's own
        shared = lengths[slot] // 2
        cache.add(slot, CachedPrompt(prompt[..., :shared, :].contiguous(), None))
        cache.ensure(np.array([slot]), np.array([lengths[slot] + 1]))
        cache._home[slot].row(slot)[..., : lengths[slot] - shared, :] = prompt[..., shared:, :]
    order = cache.slots
    mixed = normal(dtype, len(order), groups, heads + 2, width)
    positions = torch.tensor([lengths[slot] for slot in order])
    turned = int(width * turned_part)
    rotary = Rotary(normal(dtype, 80, turned), normal(dtype, 80, turned)) if turned else None
    turn = rotary and rotary.at(positions)
    found = kernels.attend(mixed, rotary, cache.places(), positions, layer=1, window=window, scale=width**-0.5).view(
        len(order), groups, heads, width
    )
    query, key, value = turned_heads(mixed, turn)
    query = query.view(len(order), groups, heads, width)
    stored = [cache._home[slot].row(slot)[1] for slot in order]  # of layer 1, [2, G, T, D]
    added = [lengths[slot] - lengths[slot] // 2 for slot in order]
    for row, slot in enumerate(order):
        keys, values = (
            torch.cat((prompts[slot][1, part], new[row][:, None]), 1).float() for part, new in ((0, key), (1, value))
        )
        begin = max(0, lengths[slot] + 1 - window) if window else 0
        scores = query[row].float() @ keys[:, begin:].transpose(1, 2) * width**-0.5
        rtol, atol = (2**-6, 3e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
        torch.testing.assert_close(found[row].float(), scores.softmax(-1) @ values[:, begin:], rtol=rtol, atol=atol)
        stored_key, stored_value = stored[row][:, :, added[row]]
        torch.testing.assert_close(stored_key, key[row], rtol=rtol, atol=atol / 3)
        assert torch.equal(stored_value, value[row])


PRINTING = "#!/bin/sh\necho '%s' >&2\nexit 1\n"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "{folder}/none"}, "[Errno 2] No such file or directory: '{folder}/none'"),
        ({"CC": "'cc"}, "No closing quotation"),
        ({"CC": "{folder}/fails"}, "x.c:3: error: no such thing"),
        ({"CC": "{folder}/full"}, "Cannot create temporary file: No space left on device"),
        ({"XDG_CACHE_HOME": "{folder}/fails"}, "[Errno 20] Not a directory: '{folder}/fails/nemo_aligner'"),
        ({"XDG_CACHE_HOME": "/proc"}, "[Errno 2] No such file or directory: '/proc/nemo_aligner'"),
    ],
)
def test_where_nothing_can_be_compiled_or_kept_torch_does_it_and_one_line_says_so(
    environment: dict[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, said in (("fails", "x.c:3: error: no such thing"), ("full", reason)):
        (tmp_path / name).write_text(PRINTING % said.replace("'", ""))
        (tmp_path / name).chmod(0o700)
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value.format(folder=tmp_path))
    with caplog.at_level(logging.WARNING):
        assert library._compiled.__wrapped__(torch.bfloat16) is None
    [said] = [record.getMessage() for record in caplog.records]
    where = library._SOURCES[0].parent
    assert said == f"torch's kernels are used, slower: cannot compile {where} ({reason.format(folder=tmp_path)})"
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "sum"])
def test_a_damaged_library_is_compiled_again_and_one_line_says_so(
    damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "compiler"  # one that takes no seconds: its library has every name, and does nothing
    names = {name for name in vars(CpuKernels)["__init__"].__code__.co_names}
    functions = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names) if name not in dir(library))
    (tmp_path / "all.c").write_text(functions)
    compiler.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec cc -shared -fPIC -w -o "$2" {tmp_path}/all.c\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library._compiled.__wrapped__(torch.float32) is not None
    [made] = tmp_path.rglob("*.so")
    content = made.read_bytes()
    assert library._compiled.__wrapped__(torch.float32) is not None
    assert caplog.messages == []
    changed = bytearray(content)
    changed[len(content) // 2 if damage == "flipped" else -1] ^= 1
    made.unlink()  # this process has it open as it is
    made.write_bytes({"cut": content[:3000], "empty": b""}.get(damage, bytes(changed)))
    assert library._compiled.__wrapped__(torch.float32) is not None
    assert caplog.messages == [f"{made} is damaged, and compiled again"]
    assert made.read_bytes() == content


@pytest.mark.parametrize("outputs", [32, 100, 7])
def test_packed_weights_give_their_rows_and_come_back(kernels: CpuKernels, dtype: torch.dtype, outputs: int) -> None:
    weight, ids = normal(dtype, outputs, 48), torch.tensor([outputs - 1, 0, outputs // 2])
    packed = weight.clone()
    kernels.pack(packed)
    assert torch.equal(kernels.rows_of(packed, ids), weight[ids])
    assert not torch.equal(packed, weight)
    kernels.pack(packed, back=True)
    assert torch.equal(packed, weight)


@pytest.mark.parametrize("outputs", [32768, 32784])
def test_a_product_larger_than_a_cache_is_that_of_its_rows(
    kernels: CpuKernels, dtype: torch.dtype, outputs: int
) -> None:
    if not kernels.has_products:
        pytest.skip("torch has faster ones there")
    x, weight, bias = normal(dtype, 140, 64), normal(dtype, outputs, 64), normal(dtype, outputs)
    kernels.pack(weight)
    found = kernels.product(x, weight, bias)
    assert torch.equal(found, torch.cat([kernels.product(part, weight, bias) for part in x.split(9)]))


@pytest.mark.parametrize("rows", [1, 13, 29, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (100, 66), (7, 64), (32, 1024)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_that_of_float64_rounded_and_of_every_row_by_itself(
    kernels: CpuKernels, dtype: torch.dtype, rows: int, outputs: int, inputs: int, with_bias: bool
) -> None:
    if not kernels.has_products:
        pytest.skip("torch has faster ones there")
    x, weight, bias = (
        normal(dtype, rows, inputs),
        normal(dtype, outputs, inputs),
        normal(dtype, outputs) if with_bias else None,
    )
    packed = weight.clone()
    kernels.pack(packed)
    found = kernels.product(x, packed, bias)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    rtol, atol = (2**-8, 1e-4) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol * inputs**0.5)
    for row in range(0, rows, 7):
        assert torch.equal(kernels.product(x[row : row + 1], packed, bias)[0], found[row])


@pytest.mark.parametrize("with_delta", [False, True])
def test_the_feed_forward_half_of_a_layer_is_its_parts_one_after_another_for_any_number_of_rows(
    kernels: CpuKernels, dtype: torch.dtype, with_delta: bool
) -> None:
    if not kernels.has_products:
        pytest.skip("torch has faster ones there")
    norm, bias, fc1, fc2 = (normal(dtype, *shape) for shape in ((32,), (128,), (128, 32), (32, 64)))
    kernels.pack(fc1)
    kernels.pack(fc2)
    unused = normal(dtype, 32, 32)
    weights = LayerWeights(norm, unused, unused, norm, fc1, fc2)
    layer = CpuLayer(kernels, weights, (None, bias), None, index=0, groups=1, head_dim=32, window=0, eps=1e-5)
    hidden, delta = normal(dtype, 700, 32), normal(dtype, 700, 32) if with_delta else None
    before = hidden.clone()
    found = layer.feed_forward(hidden, delta)
    normed = kernels.add_rms_norm(before, delta, norm, 1e-5)
    gated = kernels.silu_mul(kernels.product(normed, fc1, bias))
    assert torch.equal(found, kernels.product(gated, fc2, None))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
@pytest.mark.parametrize("forbid", [False, True])
def test_draw_inverts_the_cumulative_distribution(
    kernels: CpuKernels, dtype: torch.dtype, temperature: float, vocabulary: int, forbid: bool
) -> None:
    rows = 200
    logits = normal(dtype, rows, vocabulary + 3, scale=3.0)[:, :vocabulary]
    ids = torch.tensor([vocabulary // 2, 1])
    logits[:50, 1] = 100.0  # what cannot be drawn may have almost all of the probability
    uniform = torch.linspace(0, 1, rows + 2, dtype=torch.float64)[1:-1]
    forbidden = (torch.arange(rows) % 2 == 0, ids) if forbid else None
    found = kernels.draw(logits, temperature, uniform, forbidden)
    allowed = logits.double() / temperature
    if forbid:
        allowed[::2, ids] = -torch.inf
    cumulative = allowed.softmax(-1).cumsum(-1)
    upper = _at(cumulative, found.tokens)
    lower = upper - _at(allowed.softmax(-1), found.tokens)
    assert ((lower - 1e-6 <= uniform) & (uniform <= upper + 1e-6)).all()
    torch.testing.assert_close(
        found.logprobs.double(), _at(logits.double().log_softmax(-1), found.tokens), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        found.sampling_logprobs.double(), _at(allowed.log_softmax(-1), found.tokens), atol=1e-5, rtol=1e-5
    )
