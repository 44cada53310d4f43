"""Our engine as a worker of scripts/bench/generation.py; also measures the roofline: the matrix products alone."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
import workload

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.kv_cache import KVCache
from nemo_aligner.engine.interfaces import GenerationRequest


class Watch:
    """Counts what decode steps do, by standing in front of `CachedForward.step`."""

    def __init__(self) -> None:
        self.rows: Counter[int] = Counter()  # how many steps had so many rows
        self.most_positions = 0  # cached at once
        step = CachedForward.step

        def watched(forward: CachedForward, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> Any:
            self.rows[len(tokens)] += 1
            self.most_positions = max(self.most_positions, int(positions.sum()) + len(tokens))
            return step(forward, tokens, positions, cache)

        CachedForward.step = watched  # type: ignore[method-assign]


def products_s(policy: Any, rows: int, repeats: int = 3) -> float:
    """Seconds of one decode step's matrix products with `rows` rows, as fast as the engine does them."""
    forward = CachedForward(policy.module, policy.arch)
    weights = [(weight, weight.shape[1]) for weight in forward.product_weights()]  # packed weights have no shape
    first = weights[0][0]
    inputs = {width: torch.randn(rows, width, dtype=first.dtype, device=first.device) for _, width in weights}

    def once() -> None:
        for weight, width in weights:
            forward._weights.product(inputs[width], weight)
        if first.is_cuda:
            torch.cuda.synchronize()

    best = float("inf")
    with torch.no_grad(), forward.ready():
        once()
        for _ in range(repeats):
            begin = time.perf_counter()
            once()
            best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--dtype", choices=["32", "bf16"], required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()

    from nemo_aligner.engine.loading import start_for_archive
    from nemo_aligner.engine.policy import load_policy

    begin, work = time.perf_counter(), workload.load(args.workload)
    longest = max(max(item["lengths"]) for item in work)
    requests = [
        GenerationRequest(p, s, tuple(item["prompt"]), length)
        for p, item in enumerate(work)
        for s, length in enumerate(item["lengths"])
    ]
    # EOS is not drawn before the length asked for, so every response has exactly that
    sampling = SamplingParams(min_tokens=longest, max_tokens=longest)
    watch = Watch()
    trainer = TrainerConfig(precision=args.dtype, accelerator="gpu" if args.device == "cuda" else "cpu")
    with start_for_archive(trainer, args.model, key="--model") as cluster:
        policy = load_policy(args.model, cluster, precision=args.dtype, key="--model")
        arch, itemsize = policy.arch, next(policy.module.parameters()).element_size()
        weights = itemsize * sum(parameter.numel() for parameter in policy.module.parameters())
        position = itemsize * 2 * arch.num_layers * arch.num_query_groups * arch.head_dim
        workload.forget_loading()
        program = 1024 * workload.memory_kb("VmRSS") - weights  # libraries and all the rest of the process

        def run() -> dict[str, Any]:
            watch.rows.clear()
            tokens = sum(len(response.tokens) for response in policy.generate(requests, sampling, args.slots))
            return {"tokens": tokens, "samples": len(requests)}

        def aside() -> dict[str, Any]:
            peak = 1024 * workload.memory_kb("VmHWM") - program
            grid = [rows for rows in (1, 4, 8, 16, 32, 64, 128, 256) if rows <= max(64, args.slots)]
            times = [products_s(policy, rows) for rows in grid]
            steps = sorted(watch.rows)
            counts = np.array([watch.rows[rows] for rows in steps])
            return {
                "products_s": float(np.interp(steps, grid, times) @ counts),
                "memory_ratio": peak / (weights + position * watch.most_positions),
            }

        loaded_in = time.perf_counter() - begin
        workload.serve(f"ours {args.dtype}", loaded_in, run, aside)


if __name__ == "__main__":
    main()
