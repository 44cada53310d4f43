"""Figures, printed and kept as soon as they are there."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_aligner.files import write_atomically


@dataclass(frozen=True)
class Figure:
    shape: str
    name: str
    value: float | None  # None: not measured
    unit: str
    note: str = ""


class Report:
    """All figures of a run; the JSON at `path` is whole after each."""

    def __init__(self, path: Path, about: dict[str, Any], minutes: float) -> None:
        self._path, self._about, self._begin, self._limit = path, about, time.monotonic(), 60 * minutes
        self.figures: list[Figure] = []
        self.faults: list[str] = []

    @property
    def is_late(self) -> bool:
        """Whether nothing new should be begun."""
        return time.monotonic() - self._begin > self._limit

    def add(self, shape: str, name: str, value: float | None, unit: str, note: str = "") -> None:
        self.figures.append(Figure(shape, name, value, unit, note))
        print(_line(self.figures[-1]), flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {**self._about, "faults": self.faults, "figures": [asdict(figure) for figure in self.figures]}
        write_atomically(self._path, json.dumps(content, indent=1))

    def compared(self, name: str, gap: float, tolerance: float) -> None:
        """How far the device is from the CPU."""
        good = gap <= tolerance  # False for NaN
        if not good:
            self.faults.append(name)
        self.add("equality", name, gap, "", f"{'ok' if good else 'FAULT'}, at most {tolerance:g}")

    def table(self) -> str:
        """In Markdown."""
        about = ", ".join(f"{key} {value}" for key, value in self._about.items())
        rows = [
            f"| {f.shape} | {f.name} | {'' if f.value is None else f'{f.value:.4g} {f.unit}'.strip()} | {f.note} |"
            for f in self.figures
        ]
        return "\n".join([about, "", "| shape | figure | value | |", "|---|---|---|---|", *rows])


def _line(figure: Figure) -> str:
    value = "not measured" if figure.value is None else f"{figure.value:.4g} {figure.unit}"
    return f"{figure.shape:<9} {figure.name:<44} {value:<22} {figure.note}".rstrip()
