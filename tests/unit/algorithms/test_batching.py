"""Who computes which rows: each once, like ones together, nobody more than the limits allow."""

from __future__ import annotations

import math
import random

import pytest

from nemo_aligner.algorithms.batching import deal, pad_rows, stream_length
from nemo_aligner.algorithms.shared_prefix import MIN_SHARED


def prompts_with_responses(seed: int, prompts: int, responses: int) -> list[list[list[int]]]:
    """One row an item, in any order: `responses` to each of `prompts`."""
    rng = random.Random(seed)
    items = []
    for p in range(prompts):
        prompt = [p] * rng.randint(MIN_SHARED, 40)
        items += [[[*prompt, 100 + r, *rng.choices(range(100), k=rng.randint(0, 20))]] for r in range(responses)]
    rng.shuffle(items)
    return items


def rows_of(items: list[list[list[int]]], batch: list[int]) -> list[list[int]]:
    return [row for i in batch for row in items[i]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("budget", [None, 60, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_item_is_dealt_once_within_the_limits_in_as_many_batches_to_each_rank(
    seed: int, ranks: int, size: int, budget: int | None
) -> None:
    items = prompts_with_responses(seed, prompts=5, responses=4)
    dealt = deal(items, ranks=ranks, size=size, budget=budget)
    assert len(dealt) == ranks
    assert len({len(batches) for batches in dealt}) == 1
    batches = [batch for part in dealt for batch in part]
    assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
    for batch in batches:
        assert len(batch) <= size
        assert budget is None or len(batch) <= 1 or stream_length(rows_of(items, batch)) <= budget


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_that_begin_alike_meet_in_one_batch(ranks: int) -> None:
    items = prompts_with_responses(0, prompts=4, responses=4)
    batches = [batch for part in deal(items, ranks=ranks, size=4) for batch in part]
    assert sorted(len({items[i][0][0] for i in batch}) for batch in batches) == [1, 1, 1, 1]


def test_a_group_larger_than_a_batch_is_cut_evenly() -> None:
    items = [[[7] * 20 + [r]] for r in range(10)]
    assert sorted(len(batch) for batch in deal(items, ranks=1, size=4)[0]) == [3, 3, 4]
    parts = deal(items, ranks=4, size=99)
    assert sorted(len(batch) for part in parts for batch in part) == [2, 2, 3, 3], "no rank stands idle"


def test_ranks_have_as_much_to_do() -> None:
    items = prompts_with_responses(2, prompts=24, responses=1)
    loads = [sum(stream_length(rows_of(items, b)) for b in part) for part in deal(items, ranks=3, size=4)]
    assert max(loads) - min(loads) <= max(len(item[0]) for item in items)


def test_a_rank_without_items_has_empty_batches() -> None:
    assert deal([[[1, 2]], [[3]]], ranks=3, size=2) == [[[0]], [[1]], [[]]]


def test_rows_of_an_item_stay_together() -> None:
    pairs = [[[p] * 9 + [1], [p] * 9 + [2, 3]] for p in range(3)]
    batches = deal(pairs, ranks=1, size=2)[0]
    assert sorted(map(sorted, batches)) == [[0, 1], [2]]
    assert stream_length(rows_of(pairs, [0])) == 9 + 1 + 2


def test_without_like_beginnings_rows_of_like_length_share_a_batch() -> None:
    rows = [[i] * length for i, length in enumerate((3, 9, 1, 7, 8, 2, 5))]
    [batches] = deal([[row] for row in rows], ranks=1, size=3)
    assert [[len(rows[i]) for i in batch] for batch in batches] == [[9, 8, 7], [5, 3, 2], [1]]
    assert len(batches) == math.ceil(7 / 3)


def test_padding_is_on_the_right_and_lengths_are_true() -> None:
    tokens, lengths = pad_rows([[1, 2, 3], [4]], 0)
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert lengths.tolist() == [3, 1]
