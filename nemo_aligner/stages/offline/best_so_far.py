"""Samples that were best in earlier iterations, which compete with those of this one (`best_so_far_file`).

Llama 2 chose from the samples of the latest policy alone at first, lost abilities, and from then on chose from those of
all iterations (Touvron et al. 2023, arXiv 2307.09288, section 3.2.3):

    y*_t(x) = argmax of r(x, y) over y in D_t(x) and {y*_{t−1}(x)}

of every prompt x seen so far, also of those without samples in iteration t. The file is what the labeler wrote for
iteration t − 1, with rewards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_aligner.config.offline import LabelerConfig
from nemo_aligner.data.jsonl import Row, load_rows
from nemo_aligner.data.provenance import META
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.files import refuse_overwriting
from nemo_aligner.records import Keys, Sample, ScoredSample
from nemo_aligner.stages.offline.data import RowCheck

KEY = "best_so_far_file"


def check_best_so_far(cfg: LabelerConfig) -> None:
    """The key fits the others. Raises ConfigError, OutputError."""
    if cfg.best_so_far_file is None:
        return
    if cfg.processor != "rs":
        raise ConfigError(f"it is for processor=rs, not {cfg.processor or 'null'}", KEY)
    if cfg.reward_standardization.enable:
        raise ConfigError(
            "rewards of several iterations are compared as they were given, which is all the same to processor=rs; "
            "leave it out",
            "reward_standardization.enable",
        )
    refuse_overwriting(cfg.output_file, f"output_file={cfg.output_file}", {KEY: [cfg.best_so_far_file]})


class EarlierSample(ScoredSample):
    """A sample that was best before."""


class Earlier(Sequence[ScoredSample]):
    """The samples of `best_so_far_file`, none where it is not given, and after them those of this iteration.

    Raises DataError for a row that is no sample or has no reward, and where other functions gave them than this run's.
    """

    def __init__(self, cfg: LabelerConfig, keys: Keys, now: Sequence[ScoredSample] = ()) -> None:
        self._keys, self._now = keys, now
        self._rows: Sequence[Row] = ()
        if cfg.best_so_far_file is None:
            return
        path = Path(cfg.best_so_far_file)
        is_sample = RowCheck(cfg.data, {keys.input: "data.input_key", keys.output: "data.output_key"})

        def check(row: Row, path: Path, line: int) -> None:
            is_sample(row, path, line)
            _check_reward(row, keys, path, line)

        self._rows = load_rows(path, required={}, check=check)
        had = _meta(path)["config"].get("reward_function")
        if had != cfg.reward_function:
            raise DataError(f"its rewards are those of reward_function={had}, this run has {cfg.reward_function}", path)

    def __len__(self) -> int:
        return len(self._rows) + len(self._now)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self._rows):
            return self._now[index - len(self._rows)]
        row = self._rows[index]
        sample = Sample.of(row, self._keys)
        extra = {name: value for name, value in sample.extra.items() if name != self._keys.reward}
        return EarlierSample(sample.input, sample.output, extra, float(row[self._keys.reward]), turns=sample.turns)


def check_archive_of(cfg: LabelerConfig, archive: str | None) -> None:
    """The rewards of `best_so_far_file` are those of the reward model `archive`. Raises DataError."""
    if cfg.best_so_far_file is None:
        return
    path = Path(cfg.best_so_far_file)
    if _meta(path)["archive_sha256"] != archive:
        raise DataError("its rewards are those of another reward model than gpt_model_file", path)


def _meta(path: Path) -> dict[str, Any]:
    beside = Path(f"{path}{META}")
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        return {"config": dict(found["config"]), "archive_sha256": found["archive_sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{beside.name} should lie beside it and say whose its rewards are, as the labeler writes it", path
        ) from None


def _check_reward(row: Row, keys: Keys, path: Path, line: int) -> None:
    reward = row.get(keys.reward)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise DataError(
            f"field {keys.reward!r} (data.reward_key) is no number; the labeler writes it with export_reward=True",
            path,
            line,
        )
