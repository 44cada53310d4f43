"""What cannot be read says in one line what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aligner.engine.conversion import read_checkpoint
from nemo_aligner.errors import CheckpointError


def test_a_model_of_the_hub_gets_the_command_that_downloads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(Path("meta-llama/Llama-3"))
    hint = "; is it on the hub? hf download meta-llama/Llama-3 --local-dir Llama-3"
    assert str(caught.value) == f"--input meta-llama/Llama-3: no such file or folder{hint}"
    for path in ("models/mine", "/a/b", "mine", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"no such file or folder$"):
            read_checkpoint(Path(path))
