"""What a training waits for a checkpoint, at once and in the background, and what each takes of memory.

    .venv/bin/python scripts/bench/checkpoints.py --threads 1

saves a model that has made an optimizer step, in both ways in turn, and goes on with steps until the checkpoint is
there. Seconds are of the clock on the wall; figures are those of the median round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from generation import ROOT, make_models
from training import DTYPES
from workload import forget_loading, memory_kb

from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.loading import start_for_archive
from nemo_aligner.engine.policy import MegatronPolicy, load_policy_for_training
from nemo_aligner.stages.batches import microbatches
from nemo_aligner.stages.supervised.loop import sft_objective


def one_round(policy: MegatronPolicy, step: Callable[[], object], folder: Path, background: bool) -> dict[str, float]:
    forget_loading()
    before, begin = memory_kb("VmRSS"), time.perf_counter()
    saving = None
    if background:
        saving = policy.save_in_background(folder, {"step": 1})
    else:
        policy.save_training_state(folder, {"step": 1})
    waited, steps = time.perf_counter() - begin, 0
    while saving is not None and not saving.done():
        step()
        steps += 1
    trained, ending = time.perf_counter() - begin - waited, time.perf_counter()
    if saving is not None:
        saving.finish()
    return {
        "waited_s": waited + time.perf_counter() - ending,
        "step_s": trained / max(1, steps),
        "memory_mb": (memory_kb("VmHWM") - before) / 1024,
    }


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=["llama_24m", "smollm2"], default="llama_24m")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=1)


@contextmanager
def with_policy(args: argparse.Namespace, **sizes: Any) -> Iterator[MegatronPolicy]:
    """The model of the arguments, ready to be trained; `sizes` are keys of `model`."""
    torch.set_num_threads(args.threads)
    folder = ROOT / "results" / "bench" / args.model
    folder.mkdir(parents=True, exist_ok=True)
    make_models(args.model, folder)
    path, precision = str(folder / "model.nemo"), DTYPES[args.dtype]
    trainer = TrainerConfig(accelerator="cpu", precision=precision)
    overrides = ModelOverrides(restore_from_path=path, precision=precision, **sizes)
    with start_for_archive(trainer, path, key="--model", seed=1) as cluster:
        policy = load_policy_for_training(overrides, trainer, cluster)
        policy.add_optimizer(OptimConfig(), clip_grad=1.0, max_steps=1000)
        yield policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    with with_policy(args) as policy, tempfile.TemporaryDirectory() as place:
        examples = [Example((list(range(100, 228)),), ([0] + [1] * 127,)) for _ in range(4)]
        batch = microbatches(examples, range(4), size=4, dp_rank=0, dp_size=1, pad_id=0)

        def step() -> object:
            return policy.train_step(batch, sft_objective)

        step()
        begin = time.perf_counter()
        step()
        print(f"a step without a save: {time.perf_counter() - begin:.2f} s", flush=True)
        rounds = [
            (background, one_round(policy, step, Path(place) / "checkpoint", background))
            for _ in range(args.rounds)
            for background in (False, True)
        ]
        for background in (False, True):
            found = [one for way, one in rounds if way == background]
            waited, step_s, memory = (
                statistics.median(one[name] for one in found) for name in ("waited_s", "step_s", "memory_mb")
            )
            beside = f", a step beside it {step_s:.2f} s" if background else ""
            print(f"{'background' if background else 'at once':<12}waited {waited:.2f} s, {memory:.0f} MB more{beside}")


if __name__ == "__main__":
    main()
