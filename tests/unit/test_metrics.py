"""Scalars of a run on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_aligner.errors import OutputError
from nemo_aligner.metrics import MetricsLogger


def test_what_was_logged_after_the_checkpoint_is_cut_off_when_the_run_goes_on(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, tensorboard=False)
    first.log(1, "train", {"loss": 2.0})
    position = first.position
    first.log(2, "train", {"loss": 1.0})
    first.close()
    second = MetricsLogger(tmp_path, tensorboard=False, resumed_at=position)
    second.log(2, "train", {"loss": 0.5})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 0.5}]


def test_a_full_disk_ends_in_one_line_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    logger = MetricsLogger(tmp_path, tensorboard=False)
    with pytest.raises(OutputError, match=f"cannot write metrics into {tmp_path}: No space left"):
        logger.log(1, "train", {"loss": 2.0})
