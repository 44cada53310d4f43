"""Rows come out as they stand in the file, and every bad file is named with its line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

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
        (b'{"input": "a"}\r{"input": 1}\r', ":2: field 'input' is int"),
        (b'{"input": "a", "note": ["\\ud83d"]}\n', ":1: field 'note' holds \\ud83d, one half of a character"),
        (b'{"input": "\\uDE00"}\n', ":1: field 'input' holds \\ude00, one half"),
        (b'{"input": "a", "n": ' + b"9" * 5000 + b"}\n", ":1: a number has more digits than Python reads"),
        (b'{"input": "a", "n": ' + b"[" * 100000 + b"]" * 100000 + b"}\n", ":1: lists or objects are nested over 100"),
        (b'{"input": "a", "n": ' + b"[" * 101 + b"]" * 101 + b"}\n", ":1: lists or objects are nested over 100 deep"),
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


def test_brackets_that_are_text_or_stand_beside_each_other_are_no_depth(tmp_path: Path) -> None:
    row = {"input": "[{" * 300, "beside": [[] for _ in range(200)], "deep": json.loads("[" * 99 + "]" * 99)}
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row])
    assert list(load_rows(path, required=REQUIRED)) == [row]


PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("hf_dataset", [False, True])
@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_packed_and_plain_files_of_any_line_ends_hold_the_same_rows(
    tmp_path: Path, hf_dataset: bool, suffix: str, end: str
) -> None:
    rows = [{"input": "a"}, {"input": "\u2028\x85 \U0001f600", "deep": json.loads("[" * 99 + "]" * 99)}, {"input": "b"}]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](end.join([*map(dump_row, rows), "", dump_row(rows[0])]).encode()))
    loaded = load_rows(path, required=REQUIRED, hf_dataset=hf_dataset, cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == [*rows, rows[0]]
    assert list(loaded.numbers) == [1, 2, 3, 5]


@pytest.mark.parametrize("hf_dataset", [False, True])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_part_of_a_file_that_was_packed_in_parts_is_read(tmp_path: Path, hf_dataset: bool, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    parts = [f"{dump_row({'input': text})}\n".encode() for text in "abc"]
    path.write_bytes(b"".join(map(PACKERS[suffix], parts)))
    loaded = load_rows(path, required=REQUIRED, hf_dataset=hf_dataset, cache_dir=str(tmp_path / "cache"))
    assert [row["input"] for row in loaded] == ["a", "b", "c"]


@pytest.mark.parametrize("hf_dataset", [False, True])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_packed_file_is_one_line(tmp_path: Path, hf_dataset: bool, suffix: str, damage: str) -> None:
    whole = PACKERS[suffix](dump_row({"input": "".join(map(chr, range(33, 3000)))}).encode())
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"plain text")
    with pytest.raises(DataError, match=r"rows\.jsonl\S+: ") as caught:
        load_rows(path, required=REQUIRED, hf_dataset=hf_dataset, cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}/none\.jsonl: no such file$"):
        load_rows(tmp_path / "none.jsonl", required=REQUIRED)


@pytest.mark.parametrize("hf_dataset", [False, True])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, hf_dataset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret.jsonl"
    path.write_text('{"input": "a"}\n')
    monkeypatch.setattr("os.access", lambda of, mode: (of, mode) != (path, os.R_OK))  # root may read everything
    with pytest.raises(DataError, match=rf"^{path}: no permission to read it$"):
        load_rows(path, required=REQUIRED, hf_dataset=hf_dataset)


def test_what_is_no_number_is_written_as_null_however_deep() -> None:
    row = {"a": [{"b": float("inf")}, (float("-inf"), 1.5)], "c": {"d": [float("nan")]}}
    assert json.loads(dump_row(row)) == {"a": [{"b": None}, [None, 1.5]], "c": {"d": [None]}}


def test_nan_is_written_as_null() -> None:
    assert dump_row({"reward": float("nan"), "input": "é"}) == '{"reward": null, "input": "é"}'
    assert dump_row({"reward": 0.5, "input": "é"}) == '{"reward": 0.5, "input": "é"}'


def test_a_folder_that_is_a_file_is_one_clear_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_jsonl(tmp_path / "file" / "out.jsonl", [])
