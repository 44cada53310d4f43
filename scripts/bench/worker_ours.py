"""Our engine as a worker of scripts/bench/generation.py; also measures the roofline: the matrix products alone."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import workload

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.interfaces import GenerationRequest


def products_s(policy: Any, rows: int, repeats: int = 5) -> float:
    """Seconds of one decode step's matrix products with `rows` rows, and of nothing else."""
    model = policy.module
    weights = []
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        weights += [linear.weight for linear in linears]
    weights.append(model.shared_embedding_or_output_weight())
    first = weights[0]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=first.dtype, device=first.device) for w in weights}

    def once() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    best = float("inf")
    with torch.no_grad():
        once()
        for _ in range(repeats):
            begin = time.perf_counter()
            once()
            if first.is_cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--dtype", choices=["32", "bf16"], required=True)
    parser.add_argument("--slots", type=int, required=True)
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
    with start_for_archive(TrainerConfig(precision=args.dtype), args.model, key="--model") as cluster:
        policy = load_policy(args.model, cluster, precision=args.dtype, key="--model")

        def run() -> dict[str, Any]:
            tokens = sum(len(response.tokens) for response in policy.generate(requests, sampling, args.slots))
            return {"tokens": tokens, "samples": len(requests)}

        loaded_in = time.perf_counter() - begin
        workload.serve(f"ours {args.dtype}", loaded_in, run, lambda: {"products_s": products_s(policy, args.slots)})


if __name__ == "__main__":
    main()
