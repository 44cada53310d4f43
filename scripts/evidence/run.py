"""Train with every method from one start, judge all of it alike, and say what the figures support.

Started by scripts/evidence.sh, which makes models and data. Results: results.jsonl, summary.md, figure.png and
report.html; what each run did is in runs/<method>_seed<seed>. After a kill the same command goes on: a run that has
ended is not made again, and one that has not goes on where its commands do.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.data.jsonl import write_jsonl
from nemo_aligner.errors import ConfigError
from nemo_aligner.owner import lock_of, sole_owner
from nemo_aligner.ports import free_port
from scripts.evidence.cells import Cell, Inputs, Start
from scripts.evidence.commands import Server, costs_of, stop
from scripts.evidence.estimates import points_of, reference_of, results_of
from scripts.evidence.methods import SCALES, Method, Scale, methods
from scripts.evidence.page import figure, table_rows, write
from scripts.evidence.scores import REWARDS, judge
from scripts.evidence.words import sections

SEED_STEP = 1000
"""Between the seeds: an iteration of a loop adds 1 to its own."""


def chosen(scale: Scale, names: str | None) -> list[Method]:
    """The methods of `names`, or all. Raises ConfigError."""
    known = {method.name: method for method in methods(scale)}
    if names is None:
        return [*known.values()]
    wanted = names.split(",")
    for name in wanted:
        if name not in known:
            raise ConfigError(f"no method {name!r} at this size; there are {', '.join(known)}", "--methods")
    return [known[name] for name in known if name in wanted]


def attend(futures: Sequence[Future[None]], servers: Sequence[Server]) -> None:
    """Wait for all of them, and keep the servers up meanwhile. Raises the first fault of any."""
    rest: set[Future[None]] = set(futures)
    while rest:
        finished, rest = wait(rest, timeout=1, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
        for server in servers:
            server.keep()


def make(inputs: Inputs, runs: Sequence[Cell | Start], jobs: int) -> None:
    """All runs, `jobs` at a time; the first fault ends them. Raises CommandError, StoppedEarly."""
    waiting = [own for own in runs if not own.samples.exists()]
    print(f"{len(waiting)} of {len(runs)} runs are to be made, {jobs} at a time", flush=True)
    with ExitStack() as stack:
        servers = []
        if any(isinstance(own, Cell) and own.method.family == "reinforce" for own in waiting):
            server = Server(
                inputs.folder / "server", inputs.port, f"rm_model_file={inputs.reward_model}",
                "inference.inference_micro_batch_size=32", "model.reward_standardization.enable=True",
                f"trainer.precision={inputs.scale.precision}",
            )  # fmt: skip
            servers.append(stack.enter_context(server))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        began = time.perf_counter()
        done = []

        def one(own: Cell | Start) -> None:
            own.make()
            done.append(own)
            spent = time.perf_counter() - began
            print(f"[{spent:5.0f} s] {len(done)} of {len(waiting)}: {own.folder.name}", flush=True)

        futures = [pool.submit(one, own) for own in waiting]
        try:
            attend(futures, servers)
        except BaseException:
            stop()
            pool.shutdown(cancel_futures=True)
            raise


def conclude(inputs: Inputs, chosen_methods: Sequence[Method], cells: Sequence[Cell], start: Start) -> None:
    """Judge the samples of all runs; write results, table, figure and page."""
    rows = judge(inputs, [start, *cells])
    points, reference = points_of(rows, [*REWARDS]), reference_of(rows, [*REWARDS])
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    seconds = {
        method.name: sum(training_seconds(cell) for cell in cells if cell.method == method) / len(seeds)
        for method in chosen_methods
    }
    write_jsonl(inputs.folder / "results.jsonl", results_of(rows, ["kl", *REWARDS]))
    figure(chosen_methods, points, reference, inputs.folder / "figure.png")
    table = table_rows(chosen_methods, points, reference, seconds)
    write(inputs.folder, table, sections(chosen_methods, points, reference, inputs.scale, len(seeds)))
    print((inputs.folder / "summary.md").read_text())
    print(f"look at {inputs.folder / 'report.html'}")


def training_seconds(cell: Cell) -> float:
    """Of a CPU core, in the commands that trained; one that was killed and went on counts from then on."""
    return sum(cost["cpu_s"] for cost in costs_of(cell.folder) if cost["stage"] == "train")


def told_to_stop(number: int, frame: FrameType | None) -> None:
    stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where evidence.sh has put models and data")
    parser.add_argument("--scale", choices=[*SCALES], required=True)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--seeds", type=int, help="runs of each method")
    parser.add_argument("--methods", help="some of them, with commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a core each")
    args = parser.parse_args()

    scale = SCALES[args.scale]
    for name in ("seeds", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{value} is less than 1", f"--{name}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for one another leave the cores to others
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told_to_stop)
    inputs = Inputs(args.folder.resolve(), scale, free_port())
    own = chosen(scale, args.methods)
    seeds = [args.seed + SEED_STEP * i for i in range(args.seeds or scale.seeds)]
    start = Start(inputs, args.seed)
    cells = [Cell(method, seed, inputs) for seed in seeds for method in own]
    with sole_owner(lock_of(inputs.folder / "runs")):
        make(inputs, [start, *cells], args.jobs)
        conclude(inputs, own, cells, start)


if __name__ == "__main__":
    with one_line_errors():
        main()
