"""Parquet files, folders and data sets of the Hub give the rows that JSONL gives, wherever a JSONL file is read."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest

from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig, SFTDatasetConfig
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.data.prompts import open_prompts
from nemo_aligner.data.sources import source_sum
from nemo_aligner.errors import DataError
from nemo_aligner.stages.offline.data import data_fingerprint, open_rows
from nemo_aligner.stages.serving.prompts import read_prompts
from nemo_aligner.stages.supervised import reward_training, sft
from tests.chats import assistant, user

pytestmark = pytest.mark.processes  # none, but files take their seconds

ROWS: list[dict[str, Any]] = [
    {"messages": [user("q0")], "id": 0, "tags": ["é", "b"]},
    {"messages": [user("q1"), {**assistant("a1"), "weight": 0}, user("q2")], "score": 0.5},
]
PAIRS = [{"prompt": f"q{i}: ", "chosen": f"a{i}", "rejected": f"b{i}", "text": f"t{i}"} for i in range(3)]


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def table_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_list([{**names, **row} for row in rows])


def parquet(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table_of(rows).to_parquet(path)
    return path


def sources(rows: list[dict[str, Any]]) -> list[str]:
    """The same rows in every form, as the names that the config gives them."""
    parquet("parquet/data/train-00000-of-00001.parquet", rows)
    parquet("parquet/data/test-00000-of-00001.parquet", rows[:1])
    Path("lines").mkdir()
    Path("lines/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = table_of(rows)
    table.save_to_disk("saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk("split")
    return [
        parquet("alone.parquet", rows), "parquet", "hf:parquet", "hf:parquet:train", "hf:parquet:default:train",
        "lines", "hf:lines", "saved", "hf:saved", "hf:split", "hf:split:train",
    ]  # fmt: skip


def test_every_form_gives_the_rows_as_jsonl_has_them() -> None:
    for name in sources(ROWS):
        found = load_rows(name, required={}, hf_dataset=True)
        assert list(found) == ROWS, name
        assert (str(found.path), list(found.numbers)) == (name, [1, 2])
    for name in ("hf:parquet:test", "hf:split:test"):
        assert list(load_rows(name, required={})) == ROWS[:1]


def test_they_are_read_wherever_a_jsonl_is() -> None:
    name = parquet("pairs/train-0.parquet", PAIRS).rpartition("/")[0]
    data = OfflineDataConfig(file_names=[f"hf:{name}:train"], input_key="prompt", output_key="chosen")
    rows = open_rows(data, {"prompt": "data.input_key", "chosen": "data.output_key"})
    assert list(rows) == PAIRS
    assert rows.where(2) == ("hf:pairs:train", 3)
    assert data_fingerprint(data)["data"] == [["hf:pairs:train", source_sum(name)]]

    rm = RMConfig()
    rm.model.data.data_prefix = {"train": [f"hf:{name}"]}
    assert [chosen.row["answer"] for chosen, _ in reward_training.open_pairs(rm, "train")] == ["a0", "a1", "a2"]
    ds = SFTDatasetConfig(
        file_path=name, prompt_template="{prompt}{chosen}", label_key="chosen", truncation_field="prompt"
    )
    assert list(sft.open_rows(SFTConfig(), ds, "k")) == PAIRS
    prompts = open_prompts({"train": [f"hf:{name}:train"]}, "train", "k")
    assert prompts is not None
    given = [prompt.row["input"] for prompt in read_prompts(Path(name))]
    assert [row["text"] for row in prompts] == given == ["t0", "t1", "t2"]


def test_a_sum_is_that_of_the_rows_and_of_a_file_of_its_bytes() -> None:
    first, second = parquet("a/train-0.parquet", PAIRS), parquet("b/train-0.parquet", PAIRS[:2])
    assert source_sum("a") == source_sum("hf:a:train") != source_sum("b")
    assert source_sum(first) != source_sum(second)


def test_times_are_texts_and_a_column_that_jsonl_cannot_hold_is_named() -> None:
    assert list(load_rows(parquet("a.parquet", [{"day": date(2024, 5, 1)}]), required={})) == [{"day": "2024-05-01"}]
    with pytest.raises(DataError, match=r"^b\.parquet:1: raw: no text, number, list or object; take that column away$"):
        load_rows(parquet("b.parquet", [{"raw": b"\0", "text": "a"}]), required={})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hf:split:other", "hf:split:other: there is no split 'other', but train, test"),
        ("hf:parquet:other", 'hf:parquet:other: datasets cannot read it: Unknown split "other". Should be one of'),
        ("hf:parquet:none:train", "hf:parquet:none:train: datasets cannot read it: BuilderConfig 'none' not found"),
        ("hf:no/such:train", "hf:no/such:train: datasets cannot read it: Couldn't reach 'no/such' on the Hub"),
        ("hf:json:train", "hf:json:train: no such folder; a data set of the Hub is called organisation/name"),
        ("damaged.parquet", "damaged.parquet: datasets cannot read it: Parquet magic bytes not found in footer"),
        ("hf:saved", "hf:saved:2: no field 'id' (data.id_key); the row has 'messages', 'score'"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    name: str, line: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    sources(ROWS)
    Path("damaged.parquet").write_bytes(b"PAR1damaged")
    capfd.readouterr()

    def check(row: dict[str, Any], path: Path, number: int) -> None:
        if "id" not in row:
            raise DataError(f"no field 'id' (data.id_key); the row has {', '.join(map(repr, row))}", path, number)

    with pytest.raises(DataError) as fault:
        load_rows(name, required={}, check=check)
    assert str(fault.value).startswith(line)
    assert "\n" not in str(fault.value)
    assert (caplog.messages, capfd.readouterr().err) == ([], "")
