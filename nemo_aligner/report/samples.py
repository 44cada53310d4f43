"""Prompts, samples and rewards of one file, as columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.statistics import finite
from nemo_aligner.records import Keys, Turns, part_name
from nemo_aligner.report.figures import quantiles, summary

Row = dict[str, Any]

ROWS = 100_000
"""Of one set in a page; of a larger one whole prompts are taken, evenly spread."""

_OWN = ("kept", "trained", "prompt_index", "sample_index")


@dataclass
class Columns:
    """Samples, one an entry in every list; `prompt` are places in `prompts`, each of which stands there once."""

    prompts: list[str] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    reward: list[float | None] = field(default_factory=list)
    functions: dict[str, list[float | None]] = field(default_factory=dict)  # rewards by the name of what gave them
    kept: list[bool | None] = field(default_factory=list)  # trained on; empty where nothing says so
    others: dict[str, list[Any]] = field(default_factory=dict)  # the rows' other fields

    def __len__(self) -> int:
        return len(self.output)


@dataclass
class SampleSet:
    """The samples of one policy, in a series of them: those of an evaluation, a loop, a training run."""

    series: str  # evaluation, iterations, rollouts, validation, or the name of a file
    name: str  # iteration 2
    at: float  # its place in the series
    source: str  # file that it was read from, below the results folder
    columns: Columns
    of: int  # samples that there were, of which these are some
    is_whole: bool = True  # False: its run has not come to the end of it

    def figures(self) -> dict[str, Any]:
        """What charts need of it, without the samples."""
        columns = self.columns
        tokens, logprob, kl = (_known(columns.others.get(name, [])) for name in ("num_tokens", "logprob", "kl"))
        kept = [kept for kept in columns.kept if kept is not None]
        return {
            "series": self.series,
            "name": self.name,
            "at": self.at,
            "source": self.source,
            "whole": self.is_whole,
            "samples": len(columns),
            "of": self.of,
            "prompts": len(columns.prompts),
            "kl": _mean(kl),
            "tokens": _mean(tokens),
            "characters": _mean([float(len(text)) for text in columns.output]),
            "empty": _mean([float(not text) for text in columns.output]),
            # per token, estimated from what was drawn
            "entropy": -sum(logprob) / sum(tokens) if logprob and sum(tokens) and len(logprob) == len(tokens) else None,
            "kept": _mean([float(own) for own in kept]),
            "kept_quantiles": quantiles(finite(r for r, own in zip(columns.reward, columns.kept, strict=False) if own)),
            "functions": {
                name: {"mean": _mean(finite(values)), "known": len(finite(values))}
                for name, values in columns.functions.items()
            },
            **summary(columns.reward, columns.prompt),
        }


def _known(values: Iterable[Any]) -> list[float]:
    return finite(v if isinstance(v, int | float) and not isinstance(v, bool) else None for v in values)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def prompt_text(row: Row, keys: Keys) -> str | None:
    """The prompt as a person reads it: its text, or the turns of a conversation; None where it has neither."""
    if isinstance(given := row.get(keys.input), str):
        return given
    turns = Turns.of(row, keys.input)
    return None if turns is None else turns.shown


def columns_of(rows: Iterable[Row], keys: Keys, limit: int = ROWS) -> tuple[Columns, int]:
    """The columns of `rows`, and how many samples there were; rows that are no samples do not count.

    Fields that no row has a value for are left out. Rewards of several sources are the fields `<reward key>_<name>`, as
    `records.part_name` has them.
    """
    found = Columns()
    places: dict[str, int] = {}
    extras: list[dict[str, Any]] = []
    kept: list[bool | None] = []
    for row in rows:
        prompt = prompt_text(row, keys)
        if prompt is None or not isinstance(row.get(keys.output), str):
            continue
        found.prompt.append(places.setdefault(prompt, len(places)))
        found.output.append(row[keys.output])
        found.reward.append(_number(row.get(keys.reward)))
        kept.append(row.get("kept", row.get("trained")))
        turns = Turns.of(row, keys.input)
        skipped = {keys.input, keys.output, keys.reward, *_OWN, *([] if turns is None else [turns.field])}
        extras.append({name: value for name, value in row.items() if name not in skipped})
    found.prompts = list(places)
    part = part_name("", keys.reward)
    for name in dict.fromkeys(name for own in extras for name in own):
        values = [own.get(name) for own in extras]
        is_part = name.startswith(part) and all(value is None or _number(value) is not None for value in values)
        if any(value is not None for value in values):
            if is_part:
                found.functions[name.removeprefix(part)] = [_number(value) for value in values]
            else:
                found.others[name] = [_shown(value) for value in values]
    if any(own is not None for own in kept):
        found.kept = kept
    return _thinned(found, limit), len(found)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _shown(value: Any) -> Any:
    """Numbers, texts and truth values as they are, other values as JSON."""
    if value is None or isinstance(value, str | bool | int):
        return value
    return _number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _thinned(columns: Columns, limit: int) -> Columns:
    """Every k-th prompt with all its samples, so that about `limit` samples are left at most."""
    every = math.ceil(len(columns) / limit) if limit else 1
    if every <= 1:
        return columns
    rows = [i for i, prompt in enumerate(columns.prompt) if prompt % every == 0]

    def own(values: list) -> list:
        return [values[i] for i in rows] if values else []

    return Columns(
        columns.prompts[::every],
        [columns.prompt[i] // every for i in rows],
        own(columns.output),
        own(columns.reward),
        {name: own(values) for name, values in columns.functions.items()},
        own(columns.kept),
        {name: own(values) for name, values in columns.others.items()},
    )


def file_name(path: Path, folder: Path) -> str:
    """`path` as it is below `folder`; whole, where it is somewhere else."""
    path = path.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
