"""What is wrong with a training run's model is said before torch is imported."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine import checks
from nemo_aligner.errors import ConfigError
from tests.tiny import ARCH


def test_rows_longer_than_a_table_of_learned_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "model.restore_from_path"
    for kind, length, fits in (("rope", 65, True), ("learned_absolute", 64, True), ("learned_absolute", 65, False)):
        monkeypatch.setattr(checks, "read_architecture", lambda *_, **__: replace(ARCH, position_embedding_type=kind))  # noqa: B023
        model = ModelOverrides(restore_from_path="m.nemo", encoder_seq_length=length)
        if fits:
            checks.check_training(TrainerConfig(), model, key=key)
            continue
        with pytest.raises(ConfigError, match=r"^model\.encoder_seq_length: 65 is above the 64 positions of the model"):
            checks.check_training(TrainerConfig(), model, key=key)
