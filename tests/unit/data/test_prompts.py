"""The prompts of REINFORCE: which field is the prompt, and that a choice between two is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from nemo_aligner.data.prompts import field_of, open_prompts
from nemo_aligner.errors import DataError


def test_text_is_the_prompt_where_a_row_has_input_too_and_the_log_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"text": "a", "input": "b"}, {"input": "c"}, {"text": "d", "input": 1}, {"text": "e", "input": "f"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level(logging.INFO):
        rows = open_prompts({"train": [str(path)]}, "train", "model.data.data_prefix.train")
    assert rows is not None
    assert [field_of(rows[i], rows, i) for i in range(4)] == ["a", "c", "d", "e"]
    assert caplog.messages == ["model.data.data_prefix.train: 2 rows have both text and input; text is the prompt"]


def test_a_row_without_a_prompt_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "a"}\n\n{"input": 1}\n')
    with pytest.raises(DataError, match=r'prompts\.jsonl:3: no text in field "text" or "input"'):
        open_prompts({"train": [str(path)]}, "train", "k")
