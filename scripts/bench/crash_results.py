"""What a command left, as lines that two runs of it must have alike, and how two such results differ.

Kept out of it is what two whole runs differ in as well: the time of day, seconds, the number of ranks, and which rank
wrote what of a journal.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Lines = Mapping[str, list[str]]
"""Of each result by its name."""

_EVENTS = "events.out.tfevents."
_JOURNAL = "rank_"
_OTHERS = ("wandb-artifacts", "wandb-media", "torchinductor_root")
"""Empty folders that W&B makes when it is imported, and torch's cache."""


@dataclass
class Differences:
    """Lines that are missing, lines that are there too often, and all else that is not as it should be."""

    lost: int = 0
    duplicated: int = 0
    different: int = 0
    found: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.lost or self.duplicated or self.different)

    def add(self, other: Differences) -> None:
        self.lost += other.lost
        self.duplicated += other.duplicated
        self.different += other.different
        self.found += other.found

    def other(self, said: str) -> None:
        self.different += 1
        self.found.append(said)


def compare(wanted: Lines, own: Lines) -> Differences:
    """How `own` differs from `wanted`, the result of a run that was not killed."""
    result = Differences()
    for name in sorted(wanted.keys() | own.keys()):
        if name not in own:
            result.other(f"{name}: not there")
        elif name not in wanted:
            result.other(f"{name}: left over")
        elif wanted[name] != own[name]:
            result.add(_compare_lines(name, wanted[name], own[name]))
    return result


def _compare_lines(name: str, wanted: list[str], own: list[str]) -> Differences:
    there, here = Counter(wanted), Counter(own)
    missing, more = there - here, here - there
    doubled = sum(count for line, count in more.items() if line in there)
    changed = sum(more.values()) - doubled
    lost = max(0, sum(missing.values()) - changed)
    result = Differences(lost, doubled, changed or int(not lost and not doubled))
    result.found.append(f"{name}: " + (_shown(sorted(missing), sorted(more)) or "in another order"))
    return result


def _shown(missing: list[str], more: list[str]) -> str:
    """The first lines of each, from shortly before the place where the first ones part."""
    pairs = enumerate(zip(missing[0], more[0], strict=False)) if missing and more else ()
    begin = max(0, next((i for i, (a, b) in pairs if a != b), 0) - 40)
    both = (("-", missing), ("+", more))
    return "; ".join(f"{sign} {line[begin : begin + 160]}" for sign, lines in both for line in lines[:3])


def results(out: Path, temporary: Path) -> Lines:
    """Everything below `out`, and the names that are left in `temporary`."""
    found: dict[str, list[str]] = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir() or any((parent / "state.json").is_file() for parent in path.parents if parent != out):
            continue
        for name, lines in _read(path, out):
            found.setdefault(str((path.parent / name).relative_to(out)), []).extend(lines)
    for state in sorted(out.rglob("state.json")):
        found[f"{state.parent.relative_to(out)}/"] = list(_checkpoint(state.parent))
    for name in (name for name in found if name.split("/")[-1] in (_EVENTS, _JOURNAL)):
        found[name].sort()
    left = (path.name for path in sorted(temporary.iterdir()) if not path.name.endswith(_OTHERS))
    return found | {f"$TMPDIR/{name}": [] for name in left}


def _read(path: Path, out: Path) -> Iterator[tuple[str, Iterable[str]]]:
    if path.suffix == ".nemo":
        yield path.name, _archive(path)
    elif path.name.startswith(_EVENTS):
        yield _EVENTS, _events(path)
    elif path.name.startswith(_JOURNAL) and path.parent.name.endswith("_temp"):
        yield _JOURNAL, path.read_text().splitlines()
    elif path.name == "metrics.jsonl":
        yield path.name, (_without(json.loads(line), "timers/") for line in path.read_text().splitlines())
    elif path.name == "iterations.jsonl":
        yield path.name, (_without(json.loads(line), "seconds/") for line in path.read_text().splitlines())
    elif path.name.endswith(".meta.json") or path.name == "run.json":
        yield path.name, [_provenance(json.loads(path.read_text()), out)]
    elif path.name == "seconds.log":  # a stage that was begun twice took the time of both
        yield path.name, []
    else:
        yield path.name, path.read_bytes().decode("latin-1").splitlines(keepends=True)


def _without(row: dict[str, Any], prefix: str) -> str:
    """The row as text, with the names alone of what begins with `prefix`."""
    return json.dumps({name: None if name.startswith(prefix) else value for name, value in row.items()})


def _provenance(meta: dict[str, Any], out: Path) -> str:
    """Without the hash of an archive of the run itself: each rank writes a part, so that its bytes depend on them."""
    del meta["config"]["trainer"]["devices"]
    if str(meta["config"].get("gpt_model_file")).startswith(f"{out}/"):
        del meta["archive_sha256"]
    return json.dumps({name: value for name, value in meta.items() if name not in ("created", "started")})


def _events(path: Path) -> Iterator[str]:
    """One line for each scalar that TensorBoard finds."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            number = "" if value.tag.startswith(("timers/", "seconds/")) else value.tensor.float_val
            yield f"{event.step} {value.tag} {number}"


def _archive(path: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
        for file in sorted(entry for entry in Path(folder).iterdir() if entry.is_file() and entry.name != "SHA256SUMS"):
            yield f"{file.name} {_sum(file.read_bytes())}"
        yield from _tensors(Path(folder) / "model_weights")


def _checkpoint(folder: Path) -> Iterator[str]:
    state = json.loads((folder / "state.json").read_text())
    for name in ("files", "metrics_bytes"):  # follow from seconds, and from the number of ranks
        state.pop(name, None)
    state["values"] = sorted(state.get("values", {}).items())
    yield json.dumps(state, sort_keys=True)
    yield from _tensors(folder / "shards")


def _tensors(folder: Path) -> Iterator[str]:
    """Name, type, shape and sum of the bytes of every tensor, whichever ranks wrote which parts of it."""
    import torch
    from torch.distributed import checkpoint  # noqa: TID251 (nobody else is asked)
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: TID251

    reader = checkpoint.FileSystemReader(folder)
    about = reader.read_metadata().state_dict_metadata
    whole = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in about.items()
        if isinstance(found, TensorStorageMetadata)
    }
    checkpoint.load(whole, storage_reader=reader, no_dist=True)
    for name, tensor in sorted(whole.items()):
        bits = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
        yield f"{name} {tensor.dtype} {list(tensor.shape)} {_sum(bits.numpy().tobytes())}"


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
