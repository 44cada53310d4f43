"""Blending against its definition, computed row by row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from nemo_aligner.data.blending import blend, check_weights, split_chunk
from nemo_aligner.data.jsonl import Rows, load_rows
from nemo_aligner.errors import ConfigError


def files(tmp_path: Path, *sizes: int) -> list[Rows]:
    loaded = []
    for name, size in enumerate(sizes):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"input": f"{name}:{i}"}) + "\n" for i in range(size)))
        loaded.append(load_rows(path, required={"input": "k"}))
    return loaded


def test_one_file_is_the_identity(tmp_path: Path) -> None:
    [file] = files(tmp_path, 7)
    assert list(blend([file], [0.3])) == list(file)


def test_every_prefix_is_as_near_the_weights_as_rows_allow(tmp_path: Path) -> None:
    weights = [0.5, 0.3, 0.2]
    drawn = [row["input"].split(":")[0] for row in blend(files(tmp_path, 40, 40, 40), weights)]
    for end in range(1, len(drawn) + 1):
        counts = Counter(drawn[:end])
        assert all(abs(counts[str(d)] - w * end) < 1.5 for d, w in enumerate(weights))


def test_each_file_is_read_in_order_and_again_when_used_up(tmp_path: Path) -> None:
    drawn = [row["input"] for row in blend(files(tmp_path, 3, 20), [1.0, 1.0])]
    first = [text for text in drawn if text.startswith("0:")]
    assert len(drawn) == 23
    assert first == [f"0:{i % 3}" for i in range(len(first))]
    assert len(first) > 3


@pytest.mark.parametrize(("weights", "count"), [([1.0], 2), ([1.0, -1.0], 2), ([0.0, 0.0], 2), ([float("nan")], 1)])
def test_unusable_weights_are_refused_with_their_key(weights: list[float], count: int) -> None:
    with pytest.raises(ConfigError, match=r"^data\.weights: "):
        check_weights(weights, count, "data.weights")


def test_chunks_tile_the_data_and_go_on_past_its_end() -> None:
    assert [p % 10 for i in range(5) for p in split_chunk(10, 4, i)] == [i % 10 for i in range(20)]
    assert split_chunk(10, None, 3) == range(10)


@pytest.mark.parametrize("weights", [[0, 1, 0], [0, 0, 2.5], [1, 0, 3]])
@pytest.mark.parametrize("count", [None, 50])
def test_a_file_of_weight_0_gives_no_row(tmp_path: Path, weights: list[float], count: int | None) -> None:
    given = files(tmp_path, 4, 3, 5)
    found = blend(given, weights, count)
    assert {row["input"][0] for row in found} == {str(i) for i, weight in enumerate(weights) if weight}
    assert len(found) == (count or sum(len(file) for file, weight in zip(given, weights, strict=True) if weight))


def test_as_many_rows_are_blended_as_are_asked_for_and_each_is_named_by_its_file_and_line(tmp_path: Path) -> None:
    given = files(tmp_path, 3, 4)
    for number in (1, 5, 20):
        drawn = blend(given, [1.0, 1.0], number)
        assert len(drawn) == number
        for index, row in enumerate(drawn):
            file, place = map(int, row["input"].split(":"))
            assert drawn.where(index) == (str(given[file].path), place + 1)
    assert len(blend(given, [1.0, 1.0])) == 7


@pytest.mark.parametrize(("total", "size", "iteration", "chunk"), [(10, 4, 0, range(4)), (10, 10, 1, range(10, 20))])
def test_a_chunk_begins_where_the_one_before_it_ends(total: int, size: int, iteration: int, chunk: range) -> None:
    assert split_chunk(total, size, iteration) == chunk


def test_an_infinite_weight_is_refused() -> None:
    with pytest.raises(ConfigError):
        check_weights([1.0, float("inf")], 2, "weights")
