"""What a results folder tells: sample sets, curves, seconds by stage, configuration, provenance, who writes there."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner.config.secrets import is_secret
from nemo_aligner.data.provenance import META, RUN_RECORD
from nemo_aligner.errors import DataError
from nemo_aligner.report.samples import SampleSet, file_name
from nemo_aligner.report.scalars import Scalars, read_scalars, whole_lines
from nemo_aligner.report.sources import find_sets, folders_below, read_json

_NESTED_TIMERS = ("rollout_time", "validation_time")  # hold the phases that are timed by themselves
_BARS = 40


@dataclass
class Run:
    """One results folder."""

    name: str
    path: str
    writers: list[str]  # who writes in it now; empty where nobody does
    sets: list[SampleSet]
    scalars: dict[str, Scalars]  # by the log folder
    times: list[dict[str, Any]]  # {title, unit, labels: [...], stages: {name: [seconds, ...]}}
    tables: list[dict[str, Any]]  # {title, rows: [{...}, ...]}
    configs: list[dict[str, Any]]  # {title, values: {"data.n": 4}}
    provenance: list[dict[str, Any]]  # {title, values}
    faults: list[str] = field(default_factory=list)


def read_run(root: Path, name: str, limit: int) -> Run:
    """Raises DataError where there is no such folder, or nothing in it that a report could show."""
    if not root.is_dir():
        raise DataError("no such folder", root)
    folders = list(folders_below(root))
    found = find_sets(root, limit)
    scalars = {
        _title(folder, root): own for folder in folders if (own := read_scalars(folder)) is not None and own.curves
    }
    run = Run(
        name, str(root.resolve()), list(_writers(root, folders)), found.sets, scalars,
        times=[*_loop_times(root, folders), *_timers(scalars)],
        tables=list(_tables(root, folders)), configs=[], provenance=[], faults=found.faults,
    )  # fmt: skip
    for folder in folders:
        for path in sorted((*folder.glob(f"*{META}"), *folder.glob(RUN_RECORD))):
            _read_meta(run, root, path)
    if not (run.sets or run.scalars or run.times or run.tables or run.writers):
        raise DataError(
            "holds no results: neither samples with rewards or provenance, nor event files, nor seconds.log", root
        )
    return run


def head_of(run: Run) -> dict[str, Any]:
    """All of it but the samples."""
    return {
        "name": run.name,
        "path": run.path,
        "writers": run.writers,
        "curves": {
            part: {tag: asdict(curve) for tag, curve in own.curves.items()} for part, own in run.scalars.items()
        },
        "seconds": {part: own.seconds for part, own in run.scalars.items()},
        "times": run.times,
        "tables": run.tables,
        "configs": run.configs,
        "provenance": run.provenance,
        "faults": run.faults,
    }


def _title(path: Path, root: Path) -> str:
    return "" if path == root else file_name(path, root)


def _writers(root: Path, folders: list[Path]) -> Iterator[str]:
    """Who holds a lock there, as far as can be told without touching it: a process of this machine must be alive."""
    locks = [lock for folder in folders for lock in sorted(folder.glob("*.lock"))]
    for lock in [*root.parent.glob(f"{root.name}.lock"), *locks]:
        try:
            owner = read_json(lock)
            host, pid, started = str(owner["host"]), int(owner["pid"]), str(owner["started"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if host != socket.gethostname() or Path(f"/proc/{pid}").exists():
            what = file_name(lock, root) if lock.is_relative_to(root) else lock.name
            yield f"{what.removesuffix('.lock')}: process {pid} on {host}, started {started}"


def _loop_times(root: Path, folders: list[Path]) -> Iterator[dict[str, Any]]:
    """Of a loop's seconds.log, `<iteration> <stage> <seconds>`; a stage run twice, after a kill, counts twice."""
    for folder in folders:
        path = folder / "seconds.log"
        spent: dict[int, dict[str, float]] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            words = line.split()
            if len(words) == 3 and words[0].isdigit() and words[2].isdigit():
                own = spent.setdefault(int(words[0]), {})
                own[words[1]] = own.get(words[1], 0.0) + float(words[2])
        if spent:
            stages = dict.fromkeys(stage for own in spent.values() for stage in own)
            yield {
                "title": _title(folder, root),
                "unit": "iteration",
                "labels": sorted(spent),
                "stages": {stage: [spent[i].get(stage, 0.0) for i in sorted(spent)] for stage in stages},
            }


def _timers(scalars: Mapping[str, Scalars]) -> Iterator[dict[str, Any]]:
    """Of the scalars `timers/<phase>`, seconds by step; steps next to one another share a bar where there are many."""
    for part, own in scalars.items():
        timers = {tag.removeprefix("timers/"): curve for tag, curve in own.curves.items() if tag.startswith("timers/")}
        steps = sorted({step for curve in timers.values() for step in curve.steps})
        if not steps:
            continue
        of_step = {
            name: dict(zip(curve.steps, curve.values, strict=True))
            for name, curve in timers.items()
            if name not in _NESTED_TIMERS
        }
        size = -(-len(steps) // _BARS)
        bars = [steps[i : i + size] for i in range(0, len(steps), size)]
        yield {
            "title": part,
            "unit": "step",
            "labels": [bar[0] if len(bar) == 1 else f"{bar[0]}–{bar[-1]}" for bar in bars],
            "stages": {
                name: [sum(values.get(step) or 0.0 for step in bar) for bar in bars] for name, values in of_step.items()
            },
        }


def _tables(root: Path, folders: list[Path]) -> Iterator[dict[str, Any]]:
    """Figures that stages and loops wrote: one row an iteration or a policy."""
    for folder in folders:
        if (folder / "iterations.jsonl").is_file():
            rows = list(whole_lines(folder / "iterations.jsonl"))
            if rows:
                yield {"title": file_name(folder / "iterations.jsonl", root), "rows": rows}
        for path in sorted(folder.glob("*.json")):
            try:
                rows = read_json(path)
            except (OSError, ValueError):
                continue
            if isinstance(rows, list) and rows and all(isinstance(row, dict) and "policy" in row for row in rows):
                yield {"title": file_name(path, root), "rows": [_figures(row) for row in rows]}


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a policy: numbers by their full names, intervals as they are."""
    intervals = {name: value for name, value in row.items() if isinstance(value, list)}
    return {**dict(flat(dict(row))), **intervals, "policy": Path(str(row["policy"])).name}


def _read_meta(run: Run, root: Path, path: Path) -> None:
    try:
        meta = read_json(path)
        training = f"training in {_title(path.parent, root) or run.name}"
        title = training if path.name == RUN_RECORD else file_name(path, root).removesuffix(META)
        config = dict(flat(meta.pop("config", {})))
        if config:
            run.configs.append({"title": title, "values": config})
        if meta:
            run.provenance.append({"title": title, "values": dict(flat(meta))})
    except (OSError, ValueError, AttributeError) as fault:
        run.faults.append(f"{path}: {fault}")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested objects as full keys, lists as one value; what a key says is secret is not shown."""
    if isinstance(value, dict) and value:
        for name, own in value.items():
            yield from flat(own, f"{prefix}.{name}" if prefix else str(name))
    elif is_secret(prefix, value):
        yield prefix, "(not shown)"
    else:
        yield prefix, value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=str)
