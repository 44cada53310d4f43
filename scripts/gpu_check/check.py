"""The GPU path on one GPU: equal to the CPU's, and how fast, for Llama shapes with random weights.

    bash scripts/gpu_check.sh --json results/gpu_check.json

Every figure is printed as soon as it is there; at the end a table. Exit status 1 where the device does not agree with
the CPU.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from scripts.gpu_check import equality, speed
from scripts.gpu_check.models import SHAPES, TRAINING_BYTES, parameters
from scripts.gpu_check.report import Report

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS: dict[str, Callable[[speed.Task], None]] = {
    "generation": speed.generation,
    "SFT": speed.sft,
    "REINFORCE": speed.reinforce,
}


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "135m", "8b"], help="in this order")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "results" / "gpu_check.json", help="all figures, written here"
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="after so many nothing new is begun")
    return parser.parse_args(given)


def about(device: str) -> dict[str, str]:
    """What the figures belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return {"card": card, "torch": torch.__version__, "commit": commit.stdout.strip() or "unknown"}


def measure(shape: str, cluster: MegatronCluster, device: speed.Device, report: Report) -> None:
    """Every measurement of a shape for which there is memory and time."""
    arch = SHAPES[shape]
    task = speed.Task(shape, arch, cluster, device, speed.TINY if shape == "tiny" else speed.Sizes(), report)
    for name, measurement in MEASUREMENTS.items():
        needed = parameters(arch) * (2 if name == "generation" else TRAINING_BYTES)
        if device.device.type == "cuda" and needed > torch.cuda.get_device_properties(device.device).total_memory:
            report.add(shape, name, None, "", f"needs {needed / 2**30:.0f} GiB for weights and optimizer alone")
        elif report.is_late:
            report.add(shape, name, None, "", "no time was left")
        else:
            with speed.memory(device, report, shape, name):
                measurement(task)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device; --device cpu --shapes tiny runs every line without one")
    report = Report(args.json, about(args.device), args.minutes)
    with start_cluster(TrainerConfig(accelerator=args.device), tensor=1, pipeline=1, seed=1) as cluster:
        equality.check(cluster, report)
        sizes = speed.TINY if args.shapes == ["tiny"] else speed.Sizes()
        device = speed.known(cluster.device, sizes, report)
        for shape in args.shapes:
            measure(shape, cluster, device, report)
    print(f"\n{report.table()}\n\nall figures: {args.json}")
    if report.faults:
        print(f"error: not equal to the CPU: {', '.join(report.faults)}", file=sys.stderr)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
