"""Which sample sets a results folder holds: what the stages wrote, and what a run that is still going has so far.

iterations/<i>.jsonl                       of a loop: drawn by the policy of iteration i
<name>.json.<policy>.jsonl                 of an evaluation, whose figures are <name>.json
validation/step_<s>.jsonl, rollouts/...    of REINFORCE
<output> with <output>.meta.json           of a sampler or labeler
<output>_temp/rank_*.json                  their journals: raw rewards; rows of a run that has not ended
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nemo_aligner.config.evaluation import policy_name
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.data.provenance import META
from nemo_aligner.errors import AlignerError
from nemo_aligner.records import Keys, part_fields
from nemo_aligner.report.samples import Row, SampleSet, columns_of, file_name
from nemo_aligner.report.scalars import whole_lines

log = logging.getLogger(__name__)

JOURNAL, ROWS = "_temp", (".jsonl", ".jsonl.gz", ".jsonl.zst")
_FIGURES = ("metrics.jsonl", "iterations.jsonl")  # JSON lines that are no samples
_NUMBERED = re.compile(r"(?:step_)?(\d+)$")


def folders_below(root: Path) -> Iterator[Path]:
    """`root` and the folders below it that may hold results; none inside a journal, a checkpoint or a hidden one."""
    yield root
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            if entry.name.endswith((JOURNAL, ".nemo")) or entry.name == "checkpoints":
                continue
            yield from folders_below(entry)


def _keys_of(path: Path) -> Keys:
    """The fields of an iteration's samples, or of an evaluation's, as the provenance of its stage says."""
    evaluation = path.with_name(path.name.partition(".json.")[0] + f".json{META}")
    for meta in (path.with_suffix("") / f"label{META}", evaluation):
        try:
            return Keys.of(read_json(meta)["config"]["data"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return Keys()


@dataclass
class Found:
    """The sample sets of a results folder; `faults` say what could not be read, one line each."""

    sets: list[SampleSet] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def find_sets(root: Path, limit: int) -> Found:
    """All sets below `root`, those of a series in their order; of each at most about `limit` samples."""
    reader = _Reader(root, limit)
    for folder in folders_below(root):
        reader.read(folder)
    reader.found.sets.sort(key=lambda own: (_natural(own.series), own.at, _natural(own.name)))
    return reader.found


def read_json(path: Path) -> Any:
    """Raises ValueError, OSError."""
    return json.loads(path.read_text(encoding="utf-8"))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class Place(NamedTuple):
    """Where a sample set belongs."""

    series: str
    name: str
    at: float


@dataclass(frozen=True)
class _Output:
    """What a sampler or labeler writes: its journal, and its output and provenance where it has ended."""

    path: Path
    meta: dict[str, Any]
    entries: dict[int, Row]  # the journal's, by place

    @property
    def config(self) -> dict[str, Any]:
        return self.meta.get("config", {})

    @property
    def keys(self) -> Keys:
        return Keys.of(self.config.get("data", {}))

    @property
    def is_labeler(self) -> bool:
        """A journal without provenance is a labeler's where its rows are rewards alone."""
        first = next(iter(self.entries.values()), {"output": ""})
        return "processor" in self.config or ("reward" in first and self.keys.output not in first)

    @property
    def inputs(self) -> list[str]:
        return self.config.get("data", {}).get("file_names", [])


class _Reader:
    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit, self.found = root, limit, Found()

    def read(self, folder: Path) -> None:
        """The sets that lie in `folder` itself."""
        outputs = self._outputs(folder)
        taken = {output.path for output in outputs}
        self._offline(folder, outputs)
        for path in sorted(folder.iterdir()):
            if path.name.endswith(ROWS) and path.name not in _FIGURES and path not in taken and path.is_file():
                self._add(path, self._place_of(path), partial(load_rows, path, required={}), _keys_of(path))

    def _place_of(self, path: Path) -> Place:
        """Of a file that a stage names after what it holds."""
        parent, stem = path.parent, path.name.split(".jsonl")[0]
        below = "" if self.root in (parent, parent.parent) else f" of {file_name(parent.parent, self.root)}"
        numbered = _NUMBERED.search(stem)
        if parent.name == "iterations" and stem.isdigit():
            return Place(f"iterations{below}", f"iteration {int(stem)}", int(stem))
        if parent.name in ("validation", "rollouts") and numbered:
            return Place(f"{parent.name}{below}", f"step {numbered[1]}", int(numbered[1]))
        evaluation, dot, policy = stem.partition(".json.")
        if dot and (parent / f"{evaluation}.json").is_file():
            return self._evaluated(parent / f"{evaluation}.json", policy)
        return Place(file_name(path, self.root), stem, 0)

    def _evaluated(self, figures: Path, policy: str) -> Place:
        """Its place is that among the policies that were evaluated."""
        try:
            order = [policy_name(own["policy"]) for own in read_json(figures)]
        except (OSError, ValueError, KeyError, TypeError):
            order = []
        series = file_name(figures, self.root).removesuffix(".json")
        return Place(series, policy.replace("_", " "), order.index(policy) if policy in order else 0)

    def _outputs(self, folder: Path) -> list[_Output]:
        found = []
        names = {path.name.removesuffix(META) for path in folder.glob(f"*{META}")} | {
            path.name.removesuffix(JOURNAL) for path in folder.glob(f"*{JOURNAL}")
        }
        for name in sorted(names):
            path = folder / name
            if next(folder.glob(f"{glob.escape(name)}.*.jsonl"), None) is not None:  # figures of an evaluation
                continue
            try:
                meta_file = path.with_name(f"{name}{META}")
                meta = read_json(meta_file) if meta_file.is_file() else {}
                entries = {
                    line["index"]: line["row"]
                    for journal in sorted(path.with_name(f"{name}{JOURNAL}").glob("rank_*.json"))
                    for line in whole_lines(journal)
                }
                output = _Output(path, meta if isinstance(meta, dict) else {}, entries)
                if "policy_files" not in output.config:  # an evaluation's are figures
                    found.append(output)
            except (OSError, ValueError, KeyError, TypeError) as fault:
                self._fault(path, fault)
        return found

    def _offline(self, folder: Path, outputs: list[_Output]) -> None:
        """Samples with the rewards that a labeler gave them; the labeler's own rows where they cannot be told."""
        labelers = [output for output in outputs if output.is_labeler]
        samplers = [output for output in outputs if not output.is_labeler]
        judged: set[Path] = set()
        for labeler in labelers:
            source = self._source(labeler, samplers)
            rows = source and self._rows(source)
            if source and rows and labeler.entries and len(rows) >= len(labeler.entries):
                judged.add(source.path)
                place = self._begun_iteration(folder) or Place(
                    file_name(source.path, self.root), labeler.path.name.split(".jsonl")[0], 0
                )
                self._add(
                    source.path, place, partial(self._judged, rows, labeler), labeler.keys,
                    is_whole=labeler.path.is_file(),
                )  # fmt: skip
            elif labeler.path.is_file():
                read = partial(load_rows, labeler.path, required={})
                self._add(labeler.path, self._own_place(labeler.path), read, labeler.keys)
        for sampler in samplers:
            if sampler.path not in judged:
                place = self._begun_iteration(folder) or self._own_place(sampler.path)
                is_whole = sampler.path.is_file()
                self._add(sampler.path, place, partial(self._rows, sampler), sampler.keys, is_whole=is_whole)

    def _own_place(self, path: Path) -> Place:
        """A series of its own."""
        name = file_name(path, self.root)
        return Place(name, name, 0)

    def _begun_iteration(self, folder: Path) -> Place | None:
        """The place of samples that a loop in `folder` is at; None where none runs there."""
        if not (folder / "loop.lock").is_file():
            return None
        count = folder / "iter.log"
        number = int(count.read_text()) if count.is_file() else 0
        return self._place_of(folder / "iterations" / f"{number}.jsonl")

    def _source(self, labeler: _Output, samplers: list[_Output]) -> _Output | None:
        """The samples that a labeler judged: those it names, or the only ones in its folder while it is at it."""
        if len(labeler.inputs) == 1:
            path = Path(labeler.inputs[0])
            for sampler in samplers:
                if sampler.path.name == path.name:
                    return sampler
            here = labeler.path.parent / path.name
            given = path if path.is_file() else here
            return _Output(given, {"config": labeler.config}, {}) if given.is_file() else None
        return samplers[0] if not labeler.inputs and len(samplers) == 1 else None

    def _rows(self, output: _Output) -> list[Row]:
        """Of a sampler: its output, or as much as its journal has."""
        if output.path.is_file():
            try:
                return load_rows(output.path, required={})[:]
            except AlignerError as fault:
                self._fault(output.path, fault)
                return []
        return [output.entries[place] for place in sorted(output.entries)]

    def _judged(self, rows: list[Row], labeler: _Output) -> Iterator[Row]:
        """Samples with their raw rewards, and whether the labeler kept them where it keeps rows as they are."""
        kept: set[tuple[Any, Any]] | None = None
        keys = labeler.keys
        if labeler.path.is_file() and labeler.config.get("processor") in ("rs", "rest"):
            kept = {(row.get(keys.input), row.get(keys.output)) for row in load_rows(labeler.path, required={})}
        for place, row in enumerate(rows):
            judgement = labeler.entries.get(place, {"reward": None})
            own = {**row, keys.reward: judgement["reward"], **part_fields(judgement.get("parts", {}), keys.reward)}
            if kept is not None:
                own["kept"] = (row.get(keys.input), row.get(keys.output)) in kept
            yield own

    def _add(
        self, path: Path, place: Place, rows: Callable[[], Iterable[Row]], keys: Keys, *, is_whole: bool = True
    ) -> None:
        """The set of `rows`, where they are samples and something is known of them: a reward, or how they were made."""
        try:
            columns, of = columns_of(rows(), keys, self.limit)
        except (AlignerError, OSError, ValueError, TypeError) as fault:
            self._fault(path, fault)
            return
        is_told = any(reward is not None for reward in columns.reward) or bool(columns.functions)
        if len(columns) and (is_told or not is_whole or path.with_name(f"{path.name}{META}").is_file()):
            source = file_name(path, self.root)
            self.found.sets.append(SampleSet(*place, source, columns, of, is_whole))

    def _fault(self, path: Path, fault: Exception) -> None:
        told = str(fault) if str(path) in str(fault) else f"{path}: {fault}"
        log.warning("left out: %s", told)
        self.found.faults.append(told)
