"""Batches of requests: each gets its own rewards, and one that is refused takes no other with it."""

from __future__ import annotations

import json
import os
import socket
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_aligner.config.serving import ServingConfig
from nemo_aligner.errors import ServerError
from nemo_aligner.ports import free_port
from nemo_aligner.rewards.interfaces import Candidate, Judgement
from nemo_aligner.servers import reward_server, triton
from nemo_aligner.servers.reward_server import (
    Heartbeat,
    MainThread,
    answer_requests,
    serve,
)
from nemo_aligner.servers.wire import SERVER_FAILED, RequestReader
from tests.fakes import ByteTokenizer, FakeTriton

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


def test_what_is_refused_costs_nothing_else_its_reward_and_says_why() -> None:
    bad = {"sentences": np.array([[b"a", b"b"]] * 2, dtype=object)}
    found = answer_requests([sentences(b"abc"), sentences(b"ok", b""), bad, sentences(b"a")], READER, length)
    assert [answer["rewards"][:, 0].tolist() for answer in (found[0], found[3])] == [[3.0], [1.0]]
    assert [answer["error"].tolist() for answer in (found[0], found[3])] == [[[b""]], [[b""]]]
    assert found[1]["rewards"][0, 0] == 2.0
    assert np.isnan(found[1]["rewards"][1, 0])
    assert found[1]["exceeded"].tolist() == [[0], [-1]]
    assert found[1]["error"].tolist() == [[b""], [b"sentences: row 1 is empty"]]
    assert np.isnan(found[2]["rewards"]).all()
    assert found[2]["error"].tolist() == [[b"sentences: shape [2, 2] is not [B, 1]"]] * 2


def test_with_functions_each_answer_tells_what_each_source_says_of_its_own_row() -> None:
    reader = RequestReader(ByteTokenizer(), 8, 258, False, 100, lambda fields: None)

    def judge(candidates: list[Candidate], rows: list[list[int]]) -> list[Judgement]:
        assert [list((c.prompt + c.response).encode()) for c in candidates] == rows
        known = [None if c.response == "?" else float(c.fields["n"]) for c in candidates]
        return [Judgement(reward, {"n": reward}) for reward in known]

    def request(*rows: tuple[bytes, bytes, bytes]) -> dict[str, np.ndarray]:
        names = ("prompts", "responses", "fields")
        return {name: np.array([[row[i]] for row in rows], dtype=object) for i, name in enumerate(names)}

    first = request((b"p", b"a", b'{"n": 1}'), (b"p", b"?", b""), (b"", b"", b""))
    found = answer_requests([first, request((b"q", b"b", b'{"n": 2}'))], reader, length, judge)
    assert [json.loads(raw or b"null") for raw in found[0]["parts"][:, 0]] == [
        {"reward": 1.0, "parts": {"n": 1.0}, "failed": []},
        {"reward": None, "parts": {"n": None}, "failed": []},
        None,
    ]
    assert found[0]["error"][:, 0].tolist() == [b"", b"", b"responses: row 2 is empty"]
    assert (found[0]["rewards"][0, 0], found[1]["rewards"].tolist()) == (1.0, [[2.0]])
    assert np.isnan(found[0]["rewards"][1:]).all()


def test_of_a_fault_in_scoring_clients_hear_that_there_was_one_and_nothing_of_its_insides() -> None:
    def fail(rows: list[list[int]]) -> list[float]:
        raise RuntimeError("/home/somebody/secret.py")

    found = answer_requests([sentences(b"abc", b"d"), sentences(b"e")], READER, fail)
    assert [answer["error"].tolist() for answer in found] == [
        [[SERVER_FAILED.encode()]] * 2,
        [[SERVER_FAILED.encode()]],
    ]
    assert all(np.isnan(answer["rewards"]).all() and (answer["exceeded"] == -1).all() for answer in found)


def test_the_main_thread_answers_the_handler_until_it_is_stopped() -> None:
    main, stopped, beats = MainThread(length), threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        asked = [pool.submit(main.score, [[1] * n]) for n in range(1, 20)]
        asked[-1].add_done_callback(lambda _: stopped.set())
        main.run(stopped.is_set, lambda: beats.append(1))
    assert [future.result() for future in asked] == [[float(n)] for n in range(1, 20)]


def failing(bad: Callable[[list[list[int]]], bool]) -> Callable[[list[list[int]]], list[float]]:
    """Scores all but those rows together that are `bad`."""

    def score(rows: list[list[int]]) -> list[float]:
        if bad(rows):
            raise RuntimeError("out of\nmemory")
        return length(rows)

    return score


def test_a_fault_in_scoring_reaches_the_one_who_waits_and_nobody_else() -> None:
    main, stopped = MainThread(failing(lambda rows: len(rows[0]) == 3)), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asked = [pool.submit(main.score, [[1] * n]) for n in range(1, 6)]
        asked[-1].add_done_callback(lambda _: stopped.set())
        main.run(stopped.is_set)
    assert isinstance(asked.pop(2).exception(), RuntimeError)
    assert [future.result() for future in asked] == [[1.0], [2.0], [4.0], [5.0]]


@pytest.mark.parametrize("alone", [True, False])
def test_where_nothing_can_be_scored_any_more_or_others_take_part_the_run_ends_in_one_line(alone: bool) -> None:
    main = MainThread(failing(lambda rows: alone or len(rows[0]) == 3), alone=alone)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(main.score, [[1] * 3]) for _ in range(2)]
        with pytest.raises(ServerError, match=r"^the model can score no more: RuntimeError: out of memory$"):
            main.run(lambda: False)
        faults = [future.exception(timeout=20) for future in waiting]
    assert {type(fault) for fault in faults} == {RuntimeError, ServerError}


def test_who_asks_a_thread_that_is_gone_does_not_wait_for_it() -> None:
    main = MainThread(length)
    main.run(lambda: True)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ServerError, match="the server has ended"):
        pool.submit(main.score, [[1]]).result(timeout=20)


def test_a_request_that_cannot_be_scored_takes_none_of_its_batch_along(caplog: pytest.LogCaptureFixture) -> None:
    score = failing(lambda rows: [98] * 3 in rows)
    found = answer_requests([sentences(b"a", b"aaaa"), sentences(b"a", b"bbb"), sentences(b"aa")], READER, score)
    assert [answer["error"].tolist() for answer in found] == [[[b""]] * 2, [[SERVER_FAILED.encode()]] * 2, [[b""]]]
    assert [answer["rewards"][:, 0].tolist() for answer in (found[0], found[2])] == [[1.0, 4.0], [2.0]]
    assert len(caplog.records) == 1


def test_the_main_thread_beats_while_nobody_asks() -> None:
    beats: list[int] = []
    MainThread(length).run(lambda: len(beats) == 2, lambda: beats.append(1))
    assert beats == [1, 1]


def test_refused_requests_of_a_batch_keep_their_number_of_answers_and_nothing_is_scored_for_them() -> None:
    def never(rows: list[list[int]]) -> list[float]:
        raise AssertionError(rows)

    found = answer_requests([sentences(b""), sentences(b"", b"a", b"b")], READER, never)
    assert [answer["rewards"].shape for answer in found] == [(1, 1), (3, 1)]
    assert all(np.isnan(answer["rewards"]).all() and (answer["exceeded"] == -1).all() for answer in found)


def test_the_heart_beats_once_in_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, beats = [0.0], list[float]()
    monkeypatch.setattr(reward_server, "time", SimpleNamespace(monotonic=lambda: now[0]))
    heartbeat = Heartbeat(lambda: beats.append(now[0]), 60.0)
    for now[0] in (0.0, 59.9, 60.0, 60.1, 119.9, 120.0, 300.0):
        heartbeat()
    assert beats == [60.0, 120.0, 300.0]


@pytest.fixture
def at_a_free_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ServingConfig:
    """A server's config; its folders go below `tmp_path`."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return ServingConfig(port=free_port(), model_name="judge", max_batch_size=7, max_queue_delay_microseconds=11)


def test_triton_is_started_at_the_address_with_the_batches_and_tensors_of_the_config(
    at_a_free_port: ServingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tritons, config = FakeTriton.put_in_place(monkeypatch), at_a_free_port
    gone = 2**22 + 1  # above every process number of Linux
    (tmp_path / f"nemo_aligner_server_{gone}_ab").mkdir()
    memory = tmp_path / "memory"
    memory.mkdir()
    for pid in (gone, gone + 1):
        (memory / f"pytrtion{pid}-0123").touch()
    monkeypatch.setattr(triton, "_SHARED_MEMORY", memory)

    def run() -> None:
        [triton], [folder] = tritons, [path for path in tmp_path.iterdir() if path != memory]
        assert [path.name for path in memory.iterdir()] == [f"pytrtion{gone + 1}-0123"], "of servers that are gone"
        assert triton.runs
        given = triton.config
        assert (given.http_address, given.exit_timeout_secs) == ("127.0.0.1", 5)
        assert given.http_port != config.port, "clients come by the gate"
        assert set(triton.security.restricted_endpoints) >= {"inference", "metadata", "model-config", "logging"}
        assert len(triton.security.access_token) > 40
        assert (given.allow_grpc, given.allow_metrics) == (False, False)
        assert (given.log_file, triton.workspace) == (folder / "triton.log", folder / "workspace")
        assert folder.name.startswith(f"nemo_aligner_server_{os.getpid()}_")
        assert triton.model["model_name"] == "judge"
        batching = triton.model["config"]
        assert (batching.max_batch_size, batching.batcher.max_queue_delay_microseconds) == (7, 11)
        assert [(t.name, t.dtype, t.shape, t.optional) for t in triton.model["inputs"]] == [
            ("sentences", bytes, (-1,), True),
            ("tokens", np.int64, (-1,), True),
            ("sequence_lengths", np.int64, (-1,), True),
            ("add_EOS", np.bool_, (-1,), True),
        ]
        assert [(t.name, t.dtype, t.shape, bool(t.optional)) for t in triton.model["outputs"]] == [
            ("rewards", np.float32, (1,), False),
            ("exceeded", np.int32, (1,), False),
            ("error", bytes, (1,), False),
            ("archive", bytes, (1,), False),
        ]
        found = triton.ask(sentences(b"abc"), sentences(b"a"))
        assert [answer["rewards"].tolist() for answer in found] == [[[3.0]], [[1.0]]]

    serve(config, READER, length, run)
    assert (tritons[0].runs, tritons[0].stopped) == (False, 1)
    assert list(tmp_path.iterdir()) == [memory]
    folder, own = os.environ["LD_LIBRARY_PATH"], sysconfig.get_config_var("INSTSONAME")
    assert (Path(folder) / own).exists(), "Triton's Python is this one"


def test_told_to_stop_while_triton_starts_nothing_is_served(
    at_a_free_port: ServingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tritons = FakeTriton.put_in_place(monkeypatch)
    serve(at_a_free_port, READER, length, lambda: pytest.fail("it runs"), start=lambda work: False)
    assert tritons[0].stopped == 1


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), ServerError("of the work")])
def test_triton_is_stopped_when_the_work_ends_in_a_fault_and_no_other_is_started(
    at_a_free_port: ServingConfig, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    tritons = FakeTriton.put_in_place(monkeypatch)

    def run() -> None:
        raise fault

    with pytest.raises(type(fault), match=str(fault)):
        serve(at_a_free_port, READER, length, run)
    assert [triton.stopped for triton in tritons] == [1]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("I1 begins\nE1 no memory\nE2 failed to\tload  model\nI2 ends\n", "E2 failed to load model"),
        ("I1 begins\n", "not ready in time"),
        (None, "not ready in time"),
    ],
)
def test_where_triton_does_not_start_its_own_last_error_is_the_reason(
    at_a_free_port: ServingConfig, monkeypatch: pytest.MonkeyPatch, written: str | None, reason: str
) -> None:
    tritons = FakeTriton.put_in_place(monkeypatch, fault=RuntimeError("not ready\n in time"))
    bind = FakeTriton.bind

    def bound(triton: FakeTriton, **model: object) -> None:
        bind(triton, **model)
        if written is not None:
            triton.config.log_file.write_text(written)

    monkeypatch.setattr(FakeTriton, "bind", bound)
    with pytest.raises(ServerError) as caught:
        serve(at_a_free_port, READER, length, lambda: pytest.fail("it runs"))
    assert str(caught.value) == f"Triton did not start on 127.0.0.1:{at_a_free_port.port}: {reason}"
    assert [triton.stopped for triton in tritons] == [1, 1, 1]


def test_a_triton_that_does_not_start_is_started_again_in_a_place_of_its_own(
    at_a_free_port: ServingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tritons = FakeTriton.put_in_place(monkeypatch)
    run = FakeTriton.run

    def start(triton: FakeTriton) -> None:
        if len(tritons) < 3:
            raise RuntimeError("lock_exception")
        run(triton)

    monkeypatch.setattr(FakeTriton, "run", start)
    ran: list[bool] = []
    serve(at_a_free_port, READER, length, lambda: ran.append(tritons[-1].runs))
    assert ran == [True]
    assert [triton.stopped for triton in tritons] == [1, 1, 1]
    assert len({triton.workspace for triton in tritons}) == len({t.config.http_port for t in tritons}) == 3
    reason = f"Triton did not start on 127.0.0.1:{at_a_free_port.port}: lock_exception; it is started again"
    assert [record.getMessage() for record in caplog.records if "again" in record.getMessage()] == [reason] * 2


def test_a_server_at_a_port_that_is_taken_does_not_start(
    at_a_free_port: ServingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tritons = FakeTriton.put_in_place(monkeypatch)
    with socket.create_server(("127.0.0.1", at_a_free_port.port)), pytest.raises(ServerError, match="Address already"):
        serve(at_a_free_port, READER, length, lambda: pytest.fail("it runs"))
    assert tritons == []
