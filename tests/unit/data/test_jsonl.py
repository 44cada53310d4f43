"""Rows come out as they stand in the file, and every bad file is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_aligner.data.jsonl import dump_row, load_rows, write_jsonl
from nemo_aligner.errors import DataError, OutputError

REQUIRED = {"input": "data.input_key"}


@pytest.mark.parametrize("hf_dataset", [False, True])
def test_rows_keep_every_field_whatever_the_loader(tmp_path: Path, hf_dataset: bool) -> None:
    rows = [
        {"input": "a\u2028b", "id": 1},
        {"input": "é", "tags": ["x"], "none": None},
        {"input": "", "id": "not a number"},
    ]
    text = "\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\r\n\n  \n"
    path = tmp_path / "rows.jsonl"
    path.write_bytes((text + "".join(json.dumps(row) + "\n" for row in rows[1:])).encode())
    loaded = load_rows(path, required=REQUIRED, hf_dataset=hf_dataset, cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == rows
    assert list(loaded.numbers) == [1, 4, 5]


@pytest.mark.parametrize("hf_dataset", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"input": "a"}\n{"input": \n', ":2: not valid JSON"),
        (b'{"input": "a"}\n\n["a"]\n', ":3: a list where an object"),
        (b'{"input": "a"}\n{"text": "b"}\n', ":2: no field 'input' (data.input_key); the row has 'text'"),
        (b'{"input": 3}\n', ":1: field 'input' is int, a string is needed"),
        (b'{"input": null}\n', ":1: field 'input' is null"),
        (b'{"input": "\xff"}\n', ":1: not valid UTF-8"),
        (b"", "the file holds no rows"),
        (b"\n \n", "the file holds no rows"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, hf_dataset: bool, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(path, required=REQUIRED, hf_dataset=hf_dataset, cache_dir=str(tmp_path / "cache"))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_rows(tmp_path / "none.jsonl", required=REQUIRED)


def test_nan_is_written_as_null() -> None:
    assert json.loads(dump_row({"reward": float("nan"), "input": "é"})) == {"reward": None, "input": "é"}


def test_a_folder_that_is_a_file_is_one_clear_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_jsonl(tmp_path / "file" / "out.jsonl", [])
