"""Several files as one, by weight; and the chunk of it that one iteration of an online loop uses."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)


class File(Protocol):
    """Rows of a file, or pairs of them, whose lines they begin at are `numbers`."""

    @property
    def path(self) -> Path: ...

    @property
    def unit(self) -> str:
        """What there are several of."""

    @property
    def numbers(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Blend(Sequence[Any]):
    """Rows drawn from several files: row i is row `positions[i]` of file `sources[i]`."""

    def __init__(self, files: Sequence[File], sources: np.ndarray, positions: np.ndarray) -> None:
        self._files, self._sources, self._positions = files, sources, positions

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: Any) -> Any:
        return self._files[self._sources[index]][int(self._positions[index])]

    def where(self, index: int) -> tuple[str, int]:
        """File and line number of a row, for messages."""
        file = self._files[self._sources[index]]
        return str(file.path), file.numbers[int(self._positions[index])]


def check_weights(weights: Sequence[float], files: int, key: str) -> None:
    """One positive finite weight per file. Raises ConfigError."""
    if len(weights) != files:
        raise ConfigError(f"{len(weights)} weights for {files} files; give one for each", key)
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
        raise ConfigError(f"{list(weights)} must be numbers ≥ 0 that do not sum to 0", key)


def blend(
    files: Sequence[File], weights: Sequence[float], num_samples: int | None = None, *, key: str = "weights"
) -> Blend:
    """Interleave `files` so that after every row each file's share is as near its weight as it can be.

    Row i comes from the file with the largest deficit w_d · max(i, 1) − taken_d (ties to the first) among those of a
    weight above 0; each is read in order, and again from its start when it is used up. Length: `num_samples`, or the
    sum of the lengths of these files.
    """
    check_weights(weights, len(files), key)
    total = num_samples or sum(len(file) for file, weight in zip(files, weights, strict=True) if weight > 0)
    drawn_from = [source for source, weight in enumerate(weights) if weight > 0]
    share, lengths, taken = [w / sum(weights) for w in weights], [len(file) for file in files], [0] * len(files)
    sources, positions = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int64)
    for i in range(total):  # of plain numbers, which is ten times as fast as small arrays
        seen = max(i, 1)
        source = max(drawn_from, key=lambda s: share[s] * seen - taken[s])
        sources[i], positions[i] = source, taken[source] % lengths[source]
        taken[source] += 1
    for file, used in zip(files, taken, strict=True):
        if used != len(file):
            passes = used / len(file)
            log.info("%s: %d of its %d %s are used (%.2f passes)", file.path, used, len(file), file.unit, passes)
    return Blend(files, sources, positions)


def prefix_files(prefix: Any, split: str, key: str) -> tuple[list[str], list[float]]:
    """Files and weights of one split of `data_prefix`; both empty where the split is not given.

    The prefix is {train: ..., validation: ..., test: ...}, or what stands for `train` alone: a file, [file], or the
    blend [weight, file, weight, file, ...]. Raises ConfigError.
    """
    entries = prefix.get(split) if isinstance(prefix, dict) else prefix if split == "train" else None
    if not entries:
        return [], []
    if isinstance(entries, str):
        entries = [entries]
    if len(entries) == 1:
        return [str(entries[0])], [1.0]
    try:
        return [str(name) for name in entries[1::2]], [float(weight) for weight in entries[0::2]]
    except ValueError:
        raise ConfigError(f"{list(entries)} is neither [file] nor [weight, file, weight, file, ...]", key) from None


def split_chunk(total: int, size: int | None, iteration: int) -> range:
    """Positions `[iteration·size, (iteration + 1)·size)`; all of `[0, total)` when `size` is None.

    Positions past `total` stand for rows modulo `total`: an online loop longer than its data goes round again, and a
    position that is never reused keeps the noise of the second round different from the first's.
    """
    return range(total) if size is None else range(iteration * size, (iteration + 1) * size)
