"""What one rank cannot do, no rank goes on without, and each says why."""

from __future__ import annotations

import pickle

import pytest

from nemo_aligner.errors import AlignerError, CheckpointError, ConfigError, DataError
from nemo_aligner.ranks import together
from tests.fakes import RankOfSeveral, on_ranks


def test_every_rank_raises_what_the_first_of_those_that_fail_raised() -> None:
    def work(cluster: RankOfSeveral) -> str:
        try:
            with together(cluster):
                if cluster.rank > 0:
                    raise CheckpointError(f"said by rank {cluster.rank}")
        except CheckpointError as fault:
            return str(fault)
        return "nothing"

    assert on_ranks(3, work) == ["said by rank 1"] * 3


def test_where_no_rank_fails_all_go_on() -> None:
    def work(cluster: RankOfSeveral) -> int:
        with together(cluster):
            done = cluster.rank
        return done

    assert on_ranks(2, work) == [0, 1]


@pytest.mark.parametrize(
    "fault", [ConfigError("is wrong", "a.key"), DataError("is wrong", "f", 3), CheckpointError("x")]
)
def test_a_fault_says_the_same_at_the_other_end(fault: AlignerError) -> None:
    there = pickle.loads(pickle.dumps(fault))
    assert (type(there), str(there), vars(there)) == (type(fault), str(fault), vars(fault))
