"""What each technique of a training step on a CPU gives: an optimizer step with one of them off at a time, and all off.

    .venv/bin/python scripts/bench/training_techniques.py --threads 1

on the workloads of training.py, by the time that the process computes. Everything is timed several times over; figures
are of the fastest, since whatever else runs on a machine only adds.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import training_workloads
import worker_training_ours
from generation import ROOT, make_models, reviews
from tokenizers import Tokenizer
from training import DTYPES
from worker_training_ours import make_run
from workload import CLOCKS

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.loading import start_for_archive
from nemo_aligner.engine.model import forward

OFF: dict[str, tuple[tuple[str, Any], ...]] = {
    "attention of a stream in one kernel": (
        ("nemo_aligner.engine.model.fused.StreamSelfAttention._is_plain", lambda _: False),
    ),
    "norm and gate in one pass each": (
        ("nemo_aligner.engine.model.fused.FusedRMSNorm.forward", torch.nn.RMSNorm.forward),
        ("nemo_aligner.engine.model.fused.SiluGate.apply", lambda inner, _: _gated(inner)),
    ),
    "shared prefixes": (("nemo_aligner.engine.model.forward.MIN_SHARED", sys.maxsize),),
}


def _gated(inner: torch.Tensor) -> torch.Tensor:
    gate, value = inner.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def step_s(step: Callable[[], object], off: tuple[str, ...], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of `step` with the techniques `off` switched off."""
    with ExitStack() as stack:
        for name in off:
            for target, value in OFF[name]:
                stack.enter_context(mock.patch(target, value))
        step()
        best = float("inf")
        for _ in range(repeats):
            begin = clock()
            step()
            best = min(best, clock() - begin)
        return best


def preparation_s(run: worker_training_ours.Supervised, clock: Callable[[], float]) -> float:
    """Seconds of what comes before a step's first product, which could be done beside the step before."""
    begin = clock()
    for microbatch in run.batches(run.examples):
        forward._stream(microbatch, run.model.module)
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["llama_24m", "smollm2"], default="llama_24m")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    folder = ROOT / "results" / "bench" / args.model
    folder.mkdir(parents=True, exist_ok=True)
    make_models(args.model, folder)
    model = str(folder / "model.nemo")
    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    with start_for_archive(TrainerConfig(accelerator="cpu"), model, key="--model", seed=1) as cluster:
        for key in ("sft", "rm"):
            rng = random.Random(key)
            texts = training_workloads.Reviews(reviews("imdb", "rotten_tomatoes"), encode, rng)
            work = training_workloads.make(key, texts, rng, 0.0)
            given = argparse.Namespace(key=key, model=model, dtype=DTYPES[args.dtype], clock="cpu")
            run = make_run(key, work, given, cluster)
            assert isinstance(run, worker_training_ours.Supervised)
            prepared = min(preparation_s(run, CLOCKS["cpu"]) for _ in range(args.repeats))
            print(f"{key:<4}{'preparing its micro-batches':<50}{prepared:8.3f} s", flush=True)
            step = functools.partial(run.model.train_step, run.batches(run.examples), run.objective)
            for off in ((), *((name,) for name in OFF), tuple(OFF)):
                seconds = step_s(step, off, args.repeats, CLOCKS["cpu"])
                said = "everything on" if not off else "all of them off" if len(off) > 1 else f"without {off[0]}"
                print(f"{key:<4}{said:<50}{seconds:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
