"""What recomputing activations saves of memory in an optimizer step on a CPU, and what it costs of time.

    .venv/bin/python scripts/bench/recomputation.py --threads 1

trains rows of 1,024 tokens, one to a micro-batch. Memory is what a step adds at its peak to what the process held
before; seconds are those that the process computes, of the fastest step.
"""

from __future__ import annotations

import argparse
import gc

import torch
from checkpoints import add_common, with_policy
from workload import CLOCKS, forget_loading, memory_kb

from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.stages.batches import microbatches
from nemo_aligner.stages.supervised.loop import sft_objective

WAYS = {"nothing": None, "selective": "selective", "full": "full"}


def measured(policy: MegatronPolicy, tokens: int, repeats: int) -> tuple[float, float]:
    """MB that a step adds, and its seconds."""
    row = torch.randint(100, 4000, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    examples = [Example((row,), ([0] + [1] * (tokens - 1),))]
    batch = microbatches(examples, [0], size=1, dp_rank=0, dp_size=1, pad_id=0)
    policy.train_step(batch, sft_objective)
    forget_loading()
    before, best = memory_kb("VmRSS"), float("inf")
    for _ in range(repeats):
        begin = CLOCKS["cpu"]()
        policy.train_step(batch, sft_objective)
        best = min(best, CLOCKS["cpu"]() - begin)
    return (memory_kb("VmHWM") - before) / 1024, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for said, granularity in WAYS.items():
        method = "uniform" if granularity == "full" else None
        sizes = {"activations_checkpoint_granularity": granularity, "activations_checkpoint_method": method}
        with with_policy(args, **sizes) as policy:
            memory, seconds = measured(policy, args.tokens, args.repeats)
        print(f"{said + ' recomputed':<24}{memory:8.0f} MB{seconds:8.2f} s", flush=True)
        del policy
        gc.collect()


if __name__ == "__main__":
    main()
