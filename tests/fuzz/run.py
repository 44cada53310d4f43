"""Fuzz one of the readers with atheris, coverage-guided; by hand, as a run takes as long as it is given.

    pip install atheris
    python tests/fuzz/run.py jsonl --seconds 600 --keep /tmp/found       (or: archive, importers, requests)

Each fault of another kind, or from another line, is printed once, and its input left in the folder of `--keep`; an
input that takes over a minute, or 4 GB, ends the run and is left there too. What is found belongs into tests/bad_input,
once mended. Exit status 0: nothing was found.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    import atheris

    names = ("jsonl", "archive", "importers", "requests")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=names)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--keep", type=Path, required=True, help="folder for the inputs that were found")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)

    from tests.fuzz.targets import FUZZED

    fuzzed = FUZZED[args.target]
    for seed in fuzzed.seeds():  # imports all that the target does
        with tempfile.TemporaryDirectory() as folder:
            fuzzed.target(seed, Path(folder))
    for name in [name for name in sys.modules if name.startswith(fuzzed.modules)]:
        _instrument(atheris, importlib.import_module(name))

    found, end, count = set[str](), time.monotonic() + args.seconds, 0
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        if time.monotonic() > end:
            print(f"{args.target}: {count} inputs, {len(found)} faults", flush=True)
            folder.cleanup()
            os._exit(1 if found else 0)
        try:
            fuzzed.target(data, Path(folder.name))
        except Exception as fault:
            frames = traceback.extract_tb(fault.__traceback__)
            ours = [frame for frame in frames if "nemo_aligner" in frame.filename] or frames
            where = f"{type(fault).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
            if where not in found:
                found.add(where)
                (args.keep / f"{args.target}_{len(found)}").write_bytes(data)
                print(f"FOUND {where}: {' '.join(str(fault).split())[:200]}", flush=True)

    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(fuzzed.seeds()):
            (Path(corpus) / str(i)).write_bytes(seed)
        limits = ("-max_len=20000", "-timeout=60", "-rss_limit_mb=4000", f"-artifact_prefix={args.keep}/")
        atheris.Setup([sys.argv[0], *limits, corpus], one)
        atheris.Fuzz()


def _instrument(atheris: types.ModuleType, module: types.ModuleType) -> None:
    """Every function and method that the module itself defines."""
    for value in list(vars(module).values()):
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
            atheris.instrument_func(value)
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for function in list(vars(value).values()):
                if isinstance(function, types.FunctionType):
                    atheris.instrument_func(function)


if __name__ == "__main__":
    main()
