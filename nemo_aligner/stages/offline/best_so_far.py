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
from pathlib import Path
from typing import Any

from nemo_aligner.config.offline import LabelerConfig
from nemo_aligner.data.jsonl import Row, load_rows
from nemo_aligner.data.provenance import META
from nemo_aligner.errors import ConfigError, DataError, OutputError
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
    if cfg.best_so_far_file == cfg.output_file:
        raise OutputError(f"output_file={cfg.output_file} is also {KEY}")


def best_so_far(cfg: LabelerConfig, keys: Keys) -> list[ScoredSample]:
    """The samples of `best_so_far_file`, none where it is not given.

    Raises DataError for a row without a reward, and where other functions gave them than this run's.
    """
    if cfg.best_so_far_file is None:
        return []
    path = Path(cfg.best_so_far_file)
    texts = {keys.input: "data.input_key", keys.output: "data.output_key"}
    rows = load_rows(path, required={}, check=RowCheck(cfg.data, texts))
    if (had := _meta(path)["config"].get("reward_function")) != cfg.reward_function:
        raise DataError(f"its rewards are those of reward_function={had}, this run has {cfg.reward_function}", path)
    return [_sample(row, keys, path, number) for row, number in zip(rows, rows.numbers, strict=True)]


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


def _sample(row: Row, keys: Keys, path: Path, number: int) -> ScoredSample:
    reward = row.get(keys.reward)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise DataError(
            f"field {keys.reward!r} (data.reward_key) is no number; the labeler writes it with export_reward=True",
            path,
            number,
        )
    sample = Sample.of(row, keys)
    return ScoredSample(sample.input, sample.output, sample.extra, float(reward), turns=sample.turns)
