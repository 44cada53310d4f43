"""What each technique of the decode step gives: a step of all rows, with one technique off at a time, and all off.

    .venv/bin/python scripts/bench/techniques.py --model results/bench/smollm2/model.nemo

Also what torch.compile makes of the feed-forward halves of the layers, and the cost of n samples of a long prompt
beside that of n prompts. Everything is timed several times over; figures are of the fastest, since whatever else runs
on a machine only adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.algorithms.sampling import Drawn, SamplingParams, draw
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import CachedPrompt, KVCache
from nemo_aligner.engine.interfaces import GenerationRequest
from nemo_aligner.engine.kernels.packed_weights import layout_for

OFF = {
    "packed weights": ("nemo_aligner.engine.kernels.packed_weights.layout_for", lambda *_: None),
    "our own layout": (
        "nemo_aligner.engine.kernels.packed_weights.layout_for",
        lambda weight, _: layout_for(weight, None),
    ),
    "shared prompts": (
        "nemo_aligner.engine.generation.decode.KVCache",
        lambda *sizes, **_: KVCache(*sizes, shares_prompts=False),
    ),
    "layers in two calls": ("nemo_aligner.engine.generation.decode.CachedForward._whole_layer", lambda *_: None),
    "C kernels": ("nemo_aligner.engine.generation.decode.cpu_kernels", lambda *_: None),
    "drawing in C": ("nemo_aligner.engine.kernels.library.CpuKernels.draw", lambda _, *args: drawn_by_torch(*args)),
}


def drawn_by_torch(logits: Tensor, temperature: float, noise: Tensor, forbidden: tuple[Tensor, Tensor] | None) -> Drawn:
    return draw(logits, SamplingParams(temperature=temperature), noise, None, forbidden)


@contextmanager
def without(names: tuple[str, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(*OFF[name]))
        yield


def best_of(repeats: int, run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def step_s(policy: Any, rows: int, positions: int, off: tuple[str, ...]) -> float:
    """Seconds of a decode step of `rows` rows that have `positions` positions, drawing included."""
    arch = policy.arch
    with without(off):
        forward = CachedForward(policy.module, arch)
        cache, weight = forward.new_cache(rows), next(policy.module.parameters())
        shape = (arch.num_layers, 2, arch.num_query_groups, positions - 1, arch.head_dim)
        prompt = CachedPrompt(torch.randn(shape, dtype=weight.dtype), None)
        for slot in range(rows):
            cache.add(slot, prompt)
        tokens, where = torch.full((rows,), 5), torch.full((rows,), positions - 1)
        noise = torch.rand(rows, dtype=torch.float64)

        def once() -> None:
            logits = forward.step(tokens, where, cache)
            assert logits is not None
            (forward.kernels.draw if forward.kernels else drawn_by_torch)(logits, 1.0, noise, None)

        with forward.ready(), torch.no_grad():
            once()
            return best_of(10, once)


def feed_forward_halves_s(policy: Any, rows: int) -> tuple[float, float, float]:
    """Seconds of the feed-forward halves of all layers (RMS norm, SiLU gate, no biases): ours, compiled by
    torch.compile, and of its first call."""
    forward, eps = CachedForward(policy.module, policy.arch), policy.arch.layernorm_epsilon
    hidden = torch.randn(rows, policy.arch.hidden_size).bfloat16()
    delta = torch.zeros_like(hidden)

    def half(hidden: Tensor, delta: Tensor, norm: Tensor, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden + delta
        gate, value = F.linear(F.rms_norm(hidden, norm.shape, norm, eps), fc1).chunk(2, dim=-1)
        return hidden, F.linear(F.silu(gate) * value, fc2)

    torch._inductor.config.force_disable_caches = True  # a first call is one
    compiled = torch.compile(half, dynamic=False)

    def once() -> None:
        for layer in forward.layers:
            compiled(hidden, delta, layer.mlp_norm.rms_weight, layer.fc1.weight, layer.fc2.weight)

    with torch.no_grad():
        first = best_of(1, once)
        theirs = best_of(10, once)
        with forward.ready():
            halves = [layer.feed_forward for layer in forward._whole_layers if layer is not None]
            ours = best_of(10, lambda: [one(hidden, delta) for one in halves]) if halves else float("nan")
    return ours, theirs, first


def samples_s(policy: Any, prompts: int, samples: int, width: int = 512, new_tokens: int = 32) -> float:
    """Seconds of drawing `samples` responses to each of `prompts` prompts."""
    sampling = SamplingParams(min_tokens=new_tokens, max_tokens=new_tokens)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(5, policy.arch.vocab_size, (prompts, width), generator=rng).tolist()
    requests = [GenerationRequest(p, s, tuple(ids[p])) for p in range(prompts) for s in range(samples)]
    return best_of(2, lambda: sum(1 for _ in policy.generate(requests, sampling, 64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=".nemo archive of a policy")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--positions", type=int, default=128, help="cached positions of each row")
    args = parser.parse_args()

    from nemo_aligner.engine.loading import start_for_archive
    from nemo_aligner.engine.policy import load_policy

    with start_for_archive(TrainerConfig(precision="bf16", accelerator="cpu"), args.model, key="--model") as cluster:
        policy = load_policy(args.model, cluster, precision="bf16", key="--model")
        variants: list[tuple[str, ...]] = [(), *((name,) for name in OFF), tuple(OFF)]
        print(f"{'milliseconds of a decode step, rows':<38}" + "".join(f"{rows:>9}" for rows in args.rows))
        for off in variants:
            name = "everything on" if not off else "all of them off" if len(off) > 1 else f"without {off[0]}"
            times = [1e3 * step_s(policy, rows, args.positions, off) for rows in args.rows]
            print(f"{name:<38}" + "".join(f"{spent:>9.1f}" for spent in times), flush=True)
        print("\nfeed-forward halves of the layers, milliseconds: ours, by torch.compile, its first call")
        for rows in args.rows:
            print(
                f"{rows:>4} rows:" + "".join(f"{1e3 * s:>9.1f}" for s in feed_forward_halves_s(policy, rows)),
                flush=True,
            )
        print("\n16 responses of 32 tokens to prompts of 512")
        for prompts, samples in ((1, 1), (1, 4), (1, 16), (16, 1)):
            print(f"{prompts:>3} prompts x {samples:>2}: {samples_s(policy, prompts, samples):.2f} s", flush=True)


if __name__ == "__main__":
    main()
