"""Batches of requests: each gets its own rewards, and one that is refused takes no other with it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nemo_aligner.servers.reward_server import MainThread, answer_requests
from nemo_aligner.servers.wire import RequestError, RequestReader
from tests.fakes import ByteTokenizer

READER = RequestReader(ByteTokenizer(), limit=8, vocab_size=258, append_eod=False, max_text_bytes=100)


def sentences(*texts: bytes) -> dict[str, np.ndarray]:
    return {"sentences": np.array([[text] for text in texts], dtype=object)}


def length(rows: list[list[int]]) -> list[float]:
    return [float(len(row)) for row in rows]


def test_every_request_of_a_batch_gets_the_rewards_of_its_own_texts() -> None:
    batches: list[int] = []

    def score(rows: list[list[int]]) -> list[float]:
        batches.append(len(rows))
        return length(rows)

    tokens = {"tokens": np.array([[1, 2, 3, 0]]), "sequence_lengths": np.array([[3]])}
    found = answer_requests([sentences(b"a", b"abcd"), tokens, sentences(b"123456789")], READER, score)
    assert [answer["rewards"].tolist() for answer in found] == [[[1.0], [4.0]], [[3.0]], [[8.0]]]
    assert [answer["exceeded"].tolist() for answer in found] == [[[0], [0]], [[0]], [[1]]]
    assert batches == [4], "all are scored together"


def test_a_refused_request_costs_the_others_of_its_batch_nothing() -> None:
    found = answer_requests([sentences(b"abc"), sentences(b"ok", b""), sentences(b"a")], READER, length)
    assert [answer["rewards"][:, 0].tolist() for answer in (found[0], found[2])] == [[3.0], [1.0]]
    assert np.isnan(found[1]["rewards"]).all()
    assert found[1]["exceeded"].tolist() == [[-1], [-1]]


def test_a_refused_request_alone_is_an_error() -> None:
    with pytest.raises(RequestError, match="sentences: row 0 is empty"):
        answer_requests([sentences(b"")], READER, length)


def test_the_main_thread_answers_the_handler_until_it_is_stopped() -> None:
    main, stopped, beats = MainThread(length), threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        asked = [pool.submit(main.score, [[1] * n]) for n in range(1, 20)]
        asked[-1].add_done_callback(lambda _: stopped.set())
        main.run(stopped.is_set, lambda: beats.append(1))
    assert [future.result() for future in asked] == [[float(n)] for n in range(1, 20)]


def test_a_fault_in_scoring_reaches_the_one_who_waits_and_ends_the_run() -> None:
    def fail(rows: list[list[int]]) -> list[float]:
        raise RuntimeError("out of memory")

    main = MainThread(fail)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(main.score, [[1]])
        with pytest.raises(RuntimeError, match="out of memory"):
            main.run(lambda: False)
        with pytest.raises(RuntimeError, match="out of memory"):
            waiting.result()
