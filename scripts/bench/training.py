"""Scoring and training, ours against transformers and TRL: same weights, rows and number of tokens, in one invocation.

    bash scripts/bench/setup_peers.sh        # once: transformers and TRL into .venv-peers
    .venv/bin/python scripts/bench/training.py --threads 1 --clock cpu --json results/training.json

Every engine is a process that loads once and then takes turns with the other, as in generation.py; the first round
warms up and is not counted, figures are those of the median round. `--clock cpu` counts the time that a process
computes, which holds on a machine that others use too. Peers are set up as they are fastest, see
worker_training_peers.py: weights of TRL are bf16 where it computes in bf16, without the float32 ones that ours keep
beside them; with `--peer-weights fp32` they are float32. Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generation import PEERS, ROOT, Worker, make_models, reviews
from training_workloads import KEYS, PRODUCTS_GOAL, TRAINING, Reviews, make

DTYPES = {"bf16": "bf16", "fp32": "32"}


def make_workload(key: str, folder: Path, texts: list[str], args: argparse.Namespace) -> tuple[Path, int]:
    """The file of a workload, and what it has of its unit."""
    from tokenizers import Tokenizer

    rng = random.Random(f"{args.seed} {key}")
    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    work = make(key, Reviews(texts, encode, rng), rng, args.scale)
    path = folder / f"training_{key}.json"
    path.write_text(json.dumps(work))
    return path, work["items"]


def measure(key: str, dtype: str, folder: Path, workload: Path, args: argparse.Namespace) -> dict[str, Worker]:
    """Both engines after all rounds."""
    common = ["--workload", str(workload), "--key", key, "--dtype", DTYPES[dtype]]
    common += ["--threads", str(args.threads), "--clock", args.clock]
    commands = {"ours": [sys.executable, "worker_training_ours.py", "--model", str(folder / "model.nemo"), *common]}
    if PEERS.exists():
        common += ["--weights", args.peer_weights]
        commands["peer"] = [str(PEERS), "worker_training_peers.py", "--model", str(folder / "hf"), *common]
    workers = {name: Worker(f"{key} {dtype} {name}", command, folder) for name, command in commands.items()}
    for number in range(args.rounds + 1):
        for worker in workers.values():
            worker.run()
            print(f"round {number}: {worker.name} {worker.rounds[-1]['seconds']:.1f} s", flush=True)
    for worker in workers.values():
        worker.close()
    return workers


def median(worker: Worker, name: str) -> float | None:
    """Of the counted rounds; None where the worker does not say it."""
    counted = worker.rounds[1:] or worker.rounds
    return statistics.median(one[name] for one in counted) if name in counted[0] else None


def figures(key: str, dtype: str, items: int, workers: dict[str, Worker]) -> dict[str, Any]:
    """One line of the table; figures of the peer are None where there is none."""
    ours, peer = workers["ours"], workers.get("peer")
    speeds = {name: items / (median(worker, "seconds") or 1.0) for name, worker in workers.items()}
    found: dict[str, Any] = {
        "key": key,
        "dtype": dtype,
        "unit": KEYS[key].unit,
        "goal": KEYS[key].goal,
        "ours": speeds["ours"],
        "peer": speeds.get("peer"),
        "ratio": speeds["ours"] / speeds["peer"] if peer else None,
        "ours_gb": max(one["peak_gb"] for one in ours.rounds),
        "peer_gb": max(one["peak_gb"] for one in peer.rounds) if peer else None,
        "rounds": {name: worker.rounds for name, worker in workers.items()},
    }
    if peer:
        found[f"memory_{key}"] = found["ours_gb"] / found["peer_gb"]
    if key in TRAINING:
        products, step = median(ours, "products_s"), median(ours, "step_s")
        found["products_fraction"] = products / step if products and step else None
    return found


def table(results: list[dict[str, Any]]) -> str:
    def number(value: float | None, places: int = 2) -> str:
        return "-" if value is None else f"{value:.{places}f}"

    lines = [("key", "", "ours", "peer", "ratio", "goal", "ours GB", "peer GB", "memory", "products")]
    for r in results:
        speeds = (number(r["ours"], 1), number(r["peer"], 1), number(r["ratio"]), number(r["goal"], 1))
        memory = (number(r["ours_gb"]), number(r["peer_gb"]), number(r.get(f"memory_{r['key']}")))
        products = number(r.get("products_fraction"))
        lines.append((f"{r['key']} {r['dtype']}", r["unit"], *speeds, *memory, products))
    return "\n".join(f"{name:<22}{unit:<12}" + "".join(f"{cell:>10}" for cell in cells) for name, unit, *cells in lines)


def summary(results: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """key → ratio, memory_<key>, and the smallest products_fraction."""
    mine = [r for r in results if r["dtype"] == dtype]
    found = {r["key"]: r["ratio"] for r in mine}
    found |= {name: value for r in mine for name, value in r.items() if name.startswith("memory_")}
    fractions = [r["products_fraction"] for r in mine if r.get("products_fraction")]
    return {**found, "products_fraction": min(fractions, default=None)}


def write(path: Path, results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(args, name) for name in ("model", "scale", "rounds", "threads", "clock", "peer_weights", "seed")
    }
    found = {dtype: summary(results, dtype) for dtype in args.dtypes}
    path.write_text(json.dumps({**found, "settings": settings, "results": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["llama_24m", "smollm2"], default="llama_24m")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "bench")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--keys", nargs="+", choices=KEYS, default=list(KEYS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--scale", type=float, default=0.1, help="part of the workloads, which in full take hours")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--peer-weights", choices=["same", "fp32"], default="same", help="fp32: TRL's bf16 by autocast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not PEERS.exists():
        print("no .venv-peers: only our own engine is measured; see scripts/bench/setup_peers.sh")
    folder = args.folder.resolve() / args.model
    folder.mkdir(parents=True, exist_ok=True)
    make_models(args.model, folder)
    texts, results = reviews("imdb", "rotten_tomatoes"), []
    for dtype in args.dtypes:
        for key in args.keys:
            path, items = make_workload(key, folder, texts, args)
            results.append(figures(key, dtype, items, measure(key, dtype, folder, path, args)))
            if args.json:
                write(args.json, results, args)
    print("\n" + table(results))
    for dtype in args.dtypes:
        print(f"{dtype}: products_fraction {summary(results, dtype)['products_fraction']} (goal {PRODUCTS_GOAL})")


if __name__ == "__main__":
    main()
