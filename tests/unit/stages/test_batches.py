"""The order of training and each rank's part of it."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.stages.batches import BatchPlan, collate, microbatches

EXAMPLES = [Example(([100 + i] * (1 + (7 * i) % 5),), ([1] * (1 + (7 * i) % 5),), weight=i + 0.5) for i in range(11)]


@pytest.mark.parametrize(
    ("count", "size", "drop_last", "sizes"),
    [
        (11, 4, False, [4, 4, 3]),
        (11, 4, True, [4, 4]),
        (8, 4, False, [4, 4]),
        (8, 4, True, [4, 4]),
        (3, 4, False, [3]),
        (3, 4, True, [3]),
        (1, 1, True, [1]),
    ],
)
def test_an_epoch_has_whole_batches_and_the_rest_unless_it_is_dropped(
    count: int, size: int, drop_last: bool, sizes: list[int]
) -> None:
    plan = BatchPlan(count, size, seed=1, shuffle=True, drop_last=drop_last)
    assert plan.steps_per_epoch == len(sizes)
    for epoch in range(2):
        batches = [plan.indices(epoch * len(sizes) + step) for step in range(len(sizes))]
        assert [len(batch) for batch in batches] == sizes
        used = [i for batch in batches for i in batch]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(count))


def test_examples_are_consumed_as_they_are_used_and_a_dropped_rest_counts_as_passed() -> None:
    assert [BatchPlan(11, 4, 1, True).consumed(step) for step in range(8)] == [0, 4, 8, 11, 15, 19, 22, 26]
    assert [BatchPlan(11, 4, 1, True, drop_last=True).consumed(step) for step in range(5)] == [0, 4, 11, 15, 22]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("limit", "per_epoch"), [(1, 1), (2, 2), (9, 3), (1.0, 3), (0.34, 2), (0.01, 1)])
def test_a_limited_epoch_is_the_beginning_of_the_whole_one(
    limit: float, per_epoch: int, drop_last: bool, shuffle: bool
) -> None:
    whole = BatchPlan(12, 4, seed=1, shuffle=shuffle, drop_last=drop_last)
    plan = BatchPlan(12, 4, seed=1, shuffle=shuffle, drop_last=drop_last, limit=limit)
    assert plan.steps_per_epoch == per_epoch
    steps = [(epoch, within) for epoch in range(3) for within in range(per_epoch)]
    assert [plan.indices(i) for i in range(len(steps))] == [whole.indices(3 * epoch + i) for epoch, i in steps]
    assert [plan.consumed(step) for step in range(7)] == [4 * step for step in range(7)]
    assert [BatchPlan(11, 4, 1, shuffle, limit=2).consumed(step) for step in range(5)] == [0, 4, 8, 12, 16]


def test_order_depends_on_seed_and_epoch_and_only_when_it_is_shuffled() -> None:
    plan = BatchPlan(40, 40, seed=1, shuffle=True)
    assert plan.indices(0) == BatchPlan(40, 40, seed=1, shuffle=True).indices(0)
    assert plan.indices(0) != plan.indices(1)
    assert plan.indices(0) != BatchPlan(40, 40, seed=2, shuffle=True).indices(0)
    assert plan.indices(0) != list(range(40))
    straight = BatchPlan(5, 2, seed=1, shuffle=False)
    assert [straight.indices(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def real(batches: list[Microbatch]) -> list[tuple[int, ...]]:
    """The rows that count."""
    rows = []
    for batch in batches:
        for row, length, weight in zip(batch.tokens, batch.lengths, batch.fields["weights"], strict=True):
            if weight:
                rows.append(tuple(row[:length].tolist()))
    return rows


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_a_batch_without_overlap_in_as_many_micro_batches_each(dp_size: int, size: int) -> None:
    indices = [9, 0, 4, 7, 2, 1, 10]
    parts = [
        microbatches(EXAMPLES, indices, size=size, dp_rank=rank, dp_size=dp_size, pad_id=0) for rank in range(dp_size)
    ]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == math.ceil(math.ceil(len(indices) / dp_size) / size)
    assert all(len(batch.tokens) <= size for part in parts for batch in part)
    rows = sorted(row for part in parts for row in real(part))
    assert rows == sorted(tuple(EXAMPLES[i].rows[0]) for i in indices)
    counts = [len(real(part)) for part in parts]
    assert max(counts) - min(counts) <= 1


def test_rows_of_a_micro_batch_have_like_lengths_the_longest_first() -> None:
    batches = microbatches(EXAMPLES, range(11), size=3, dp_rank=0, dp_size=1, pad_id=0)
    lengths = [length for batch in batches for length in batch.lengths.tolist()]
    assert lengths == sorted(lengths, reverse=True)


def test_a_budget_of_tokens_bounds_a_micro_batch_and_counts_a_shared_prompt_once() -> None:
    prompt = [7] * 20
    asked = [Example(([*prompt, i],), ([1] * 21,)) for i in range(6)]

    def sizes(budget: int | None) -> list[int]:
        return [
            len(batch.tokens)
            for batch in microbatches(asked, range(6), size=6, budget=budget, dp_rank=0, dp_size=1, pad_id=0)
        ]

    assert sizes(None) == sizes(26) == [6]
    assert sizes(25) == [3, 3]
    assert sizes(1) == [1] * 6


def test_a_place_left_over_counts_for_nothing() -> None:
    [batch] = microbatches(EXAMPLES, [3], size=2, dp_rank=1, dp_size=2, pad_id=0)
    assert len(batch.tokens) == 1
    assert not batch.fields["weights"].any()
    assert not batch.fields["loss_mask"].any()


def test_a_micro_batch_is_padded_at_the_right_and_padding_is_no_target() -> None:
    pair = Example(([5, 6, 7], [8, 9]), ([0, 1, 1], [1, 1]), weight=-2.0)
    batch = collate([pair, Example(([1],), ([1],), weight=3.0)], pad_id=99)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 99], [1, 99, 99]]
    assert batch.lengths.tolist() == [3, 2, 1]
    # the first token is never a target: nothing comes before it
    assert batch.fields["loss_mask"].tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert batch.fields["loss_mask"].dtype == torch.float32
    assert batch.fields["weights"].tolist() == [-2.0, -2.0, 3.0]
    assert batch.fields["targets"].tolist() == [2, 1, 0]
    masked = collate([pair], pad_id=99, masked=True)
    assert masked.tokens.tolist() == [[5, 6, 7], [8, 9, 99]]
    assert not masked.fields["loss_mask"].any()
    assert not masked.fields["weights"].any()
    assert not masked.fields["targets"].any()
    assert collate([Example(([5],), ([0],), targets=7)], pad_id=0).fields["targets"].tolist() == [7]
