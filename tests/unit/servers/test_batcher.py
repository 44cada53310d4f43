"""Concurrent requests: each gets its own rewards, together they are few batches."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_aligner.servers.reward_server import Batcher
from nemo_aligner.servers.wire import Texts


def texts(*firsts: int) -> Texts:
    return Texts([[first] for first in firsts], [False] * len(firsts))


def test_every_request_gets_the_rewards_of_its_own_rows() -> None:
    batches: list[int] = []

    def score(rows: list[list[int]]) -> list[float]:
        batches.append(len(rows))
        return [2.0 * row[0] for row in rows]

    batcher, stopped = Batcher(score, max_rows=16, delay_s=0.01), threading.Event()
    runner = threading.Thread(target=batcher.run, args=(stopped.is_set,))
    runner.start()
    requests = [[i, i + 1, i + 2][: 1 + i % 3] for i in range(300)]
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda rows: batcher.rewards(texts(*rows)), requests))
    stopped.set()
    runner.join()
    assert found == [[2.0 * first for first in rows] for rows in requests]
    assert sum(batches) == sum(map(len, requests))
    assert len(batches) < len(requests)
    assert max(batches) <= 16


def test_a_fault_in_scoring_reaches_those_who_wait_and_ends_the_run() -> None:
    def score(rows: list[list[int]]) -> list[float]:
        raise RuntimeError("out of memory")

    batcher = Batcher(score, max_rows=4, delay_s=0.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(batcher.rewards, texts(1))
        with pytest.raises(RuntimeError, match="out of memory"):
            batcher.run(lambda: False)
        with pytest.raises(RuntimeError, match="out of memory"):
            waiting.result()
