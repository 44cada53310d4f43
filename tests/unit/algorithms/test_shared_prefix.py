"""A stream holds every row whole, what rows share once, and says where each of their tokens stands."""

from __future__ import annotations

import random

import pytest

from nemo_aligner.algorithms.shared_prefix import (
    MIN_SHARED,
    Group,
    common_prefix,
    lay_out,
    prefix_groups,
    stream_places,
)


def random_rows(seed: int) -> list[list[int]]:
    """Some with common beginnings of all lengths, some equal, some a beginning of others."""
    rng = random.Random(seed)
    rows = [rng.choices(range(3), k=rng.randint(1, 40)) for _ in range(4)]
    for _ in range(8):
        old = rng.choice(rows)
        cut = old[: rng.randint(1, len(old))]
        rows.append(cut + rng.choices(range(3), k=rng.randint(0, 12)))
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("minimum", [1, 4, MIN_SHARED, 10**6])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_of_every_row_is_found_at_its_position(seed: int, minimum: int, multiple: int) -> None:
    rows = random_rows(seed)
    layout = lay_out(rows, minimum=minimum, multiple=multiple)
    used = set()
    for i, row in enumerate(rows):
        places = layout.places[i, : len(row)]
        assert layout.tokens[places].tolist() == row
        assert layout.positions[places].tolist() == list(range(len(row)))
        used |= set(places.tolist())
    count = stream_places(rows, prefix_groups(rows, minimum=minimum))
    assert used == set(range(count)), "no place is without a row"
    assert count <= len(layout.tokens) < count + multiple
    assert len(layout.tokens) % multiple == 0
    if minimum > 40:
        assert count == sum(map(len, rows)), "nothing is shared"


@pytest.mark.parametrize("seed", range(6))
def test_groups_hold_every_row_once_and_what_they_say_is_shared(seed: int) -> None:
    rows = random_rows(seed)
    groups = prefix_groups(rows, minimum=4)
    assert sorted(i for group in groups for i in group.rows) == list(range(len(rows)))
    for group in groups:
        first = rows[group.rows[0]][: group.prefix]
        assert all(rows[i][: group.prefix] == first for i in group.rows)
        assert (len(group.rows) > 1) == (group.prefix >= 4) == (group.prefix > 0)


def test_a_row_joins_a_group_where_that_saves_places() -> None:
    prompt = list(range(20))
    three = [[*prompt, 1], [*prompt, 2], [*prompt, 3]]
    assert prefix_groups(three) == [Group((0, 1, 2), 20)]
    # the fourth shares 12 tokens: 3·12 saved are less than 2·20
    assert prefix_groups([*three, [*prompt[:12], 99]]) == [Group((0, 1, 2), 20), Group((3,), 0)]
    assert prefix_groups([*three, [*prompt[:14], 99]]) == [Group((0, 1, 2, 3), 14)]
    short = prompt[: MIN_SHARED - 1]
    assert prefix_groups([[*short, 98], [*short, 99]]) == [
        Group((0,), 0),
        Group((1,), 0),
    ]


def test_equal_rows_and_rows_that_others_begin_with_have_no_suffix() -> None:
    row = list(range(10))
    layout = lay_out([row, row, [*row, 1]])
    [group] = layout.groups
    assert (group.prefix, group.lengths) == (10, (0, 0, 1))
    assert len(layout.tokens) == 11
    assert len(lay_out([row, row]).groups[0].padded) == 0


@pytest.mark.parametrize("seed", range(4))
def test_suffixes_stand_in_a_rectangle_in_the_order_of_the_stream(seed: int) -> None:
    layout, at = lay_out(random_rows(seed)), 0
    for group in layout.groups:
        assert group.start == at
        end = at + group.prefix + sum(group.lengths)
        assert group.padded[group.real].tolist() == list(range(at + group.prefix, end))
        assert len(group.padded) == len(group.lengths) * max(group.lengths)
        at = end
    assert at == len(layout.tokens)


def test_a_rectangle_of_rows_that_share_nothing_is_at_most_half_padding() -> None:
    rows = [[i] * length for i, length in enumerate((100, 60, 50, 49, 10, 5, 4))]
    assert [group.lengths for group in lay_out(rows).groups] == [(100, 60, 50), (49,), (10, 5), (4,)]


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 1), ([], [1], 0), ([2], [1], 0), ([1, 2], [1, 2], 2)],
)
def test_a_common_prefix_ends_where_tokens_differ_or_a_row_does(a: list[int], b: list[int], shared: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == shared
