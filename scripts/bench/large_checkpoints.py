"""Memory and time of importing and exporting a large checkpoint of random weights.

    .venv/bin/python scripts/bench/large_checkpoints.py --megabytes 3000 --shard-megabytes 500

Writes a Hugging Face folder in several files, then runs scripts/import_hf.py and scripts/export_hf.py as processes of
their own, and reads how much memory they take while they run: all of it, and what it grew by since the same was done
with one layer. Results go to <folder>/large_checkpoints.json; the checkpoints are removed again.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where it is not installed

from nemo_aligner.config.architecture import Architecture

ROOT = Path(__file__).resolve().parents[2]


def write_random_hf_folder(folder: Path, arch: Architecture, shard_bytes: int = 1 << 30) -> None:
    """bf16 weights in the shape of `arch`, in files of `shard_bytes` at most, with the byte tokenizer."""
    import torch

    from nemo_aligner.config.schema import TrainerConfig
    from nemo_aligner.engine.checkpoints.hf_folder import write_hf_folder
    from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors
    from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
    from nemo_aligner.engine.model.build import RunOptions, build_model
    from nemo_aligner.engine.processes.cluster import start_cluster

    def random(shape: torch.Size, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)

    arch = replace(arch, tokenizer=BYTE_TOKENIZER)
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1):
        model = build_model(arch, RunOptions(dtype=torch.bfloat16, shapes_only=True))
    parts = {
        name: LazyTensor(parameter.detach(), lambda shape=parameter.shape, seed=seed: random(shape, seed))
        for seed, (name, parameter) in enumerate(model.named_parameters())
    }
    write_hf_folder(folder, arch, LazyTensors(parts), FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER), shard_bytes)


def shape_of(megabytes: int) -> Architecture:
    """Layers of Llama's proportions, as many as make about so many megabytes in bf16."""
    hidden = 1024 if megabytes < 1000 else 2048
    layer = 2 * hidden * (hidden * 2 + hidden // 2 + 3 * 4 * hidden)
    return Architecture(
        num_layers=max(1, round((megabytes * 1e6 - 4 * 4096 * hidden) / layer)),
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 256,
        vocab_size=4096,
        encoder_seq_length=512,
        max_position_embeddings=512,
    )


def watched(script: str, arguments: dict[str, list[str]], result: Path) -> None:
    """Run a script of scripts/ in this process, with the small checkpoint and then, watched, with the large one."""
    import psutil

    process, peak, over = psutil.Process(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    sys.argv = [script, *arguments["small"]]
    runpy.run_path(script, run_name="__main__")
    before = process.memory_info().rss
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    sys.argv = [script, *arguments["large"]]
    started = time.perf_counter()
    runpy.run_path(script, run_name="__main__")
    seconds = time.perf_counter() - started
    over.set()
    thread.join()
    figures = {"peak_mb": peak / 1e6, "grown_mb": (peak - before) / 1e6, "seconds": seconds}
    result.write_text(json.dumps(figures))


def measured(work: Path, script: str, source: str, target: str) -> dict[str, Any]:
    result = work / "figures.json"
    arguments = {
        size: ["--input", str(work / size / source), "--output", str(work / size / target)]
        for size in ("small", "large")
    }
    own = [sys.executable, str(Path(__file__).resolve()), "--watched", script, json.dumps(arguments), str(result)]
    subprocess.run(own, check=True, cwd=ROOT)
    return json.loads(result.read_text())


def main() -> None:
    if "--watched" in sys.argv[:2]:
        watched(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=3000, help="of the weights in bf16")
    parser.add_argument("--shard-megabytes", type=int, default=500, help="of a file of the folder to be imported")
    parser.add_argument("--folder", type=Path, default=ROOT / "results/bench/large_checkpoints")
    args = parser.parse_args()
    work = args.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        shape = shape_of(args.megabytes)
        for size, arch in (("small", replace(shape, num_layers=1)), ("large", shape)):
            write_random_hf_folder(work / size / "hf", arch, args.shard_megabytes * 1_000_000)
        sizes = [path.stat().st_size / 1e6 for path in (work / "large/hf").glob("*.safetensors")]
        figures: dict[str, Any] = {"model_mb": sum(sizes), "files": len(sizes), "largest_file_mb": max(sizes)}
        figures["import"] = measured(work, "scripts/import_hf.py", "hf", "model.nemo")
        figures["export"] = measured(work, "scripts/export_hf.py", "model.nemo", "back")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    (args.folder / "large_checkpoints.json").write_text(json.dumps(figures, indent=1))
    bound = 2 * figures["largest_file_mb"] + 2000
    print(f"{figures['model_mb']:.0f} MB in {figures['files']} files, the largest {figures['largest_file_mb']:.0f} MB")
    for step in ("import", "export"):
        found = figures[step]
        print(
            f"{step}: {found['peak_mb']:.0f} MB at most ({found['grown_mb']:.0f} MB more than with one layer; "
            f"twice the largest file and 2 GB are {bound:.0f}), {found['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
