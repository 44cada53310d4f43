"""The fault of one rank ends the others, and rank 0 says whose it was and what; a rank that is done ends nobody."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_aligner.engine.processes import watch
from nemo_aligner.errors import StoppedEarly, TrainingError
from tests.fakes import RankOfSeveral, on_ranks

pytestmark = pytest.mark.processes  # it waits for threads, seconds in all

GLOO = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:54321"


class Ended(BaseException):
    pass


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the processes say that are ended; `watch` ends a thread where it would end a process."""
    found: list[str] = []

    def end(last: str | None) -> None:
        if last is not None:
            found.append(last)
        raise Ended

    monkeypatch.setattr(watch, "end_process", end)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    for name, seconds in (("_SETTLE_S", 0.1), ("_LAST_WORDS_S", 0.1), ("_LEAVE_S", 0.3)):
        monkeypatch.setattr(watch, name, seconds)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    before = set(threading.enumerate())
    yield found
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def ended(said: list[str], *wanted: str) -> None:
    until = time.monotonic() + 5
    while len(said) < len(wanted) and time.monotonic() < until:
        time.sleep(0.01)
    assert said == list(wanted)


def watched(work: Callable[[int], None], world: int = 3) -> list[BaseException | None]:
    """What ends each rank; a rank that is to wait for its end waits as long as the others."""

    def one(cluster: RankOfSeveral) -> BaseException | None:
        try:
            with watch.watching(cluster):
                work(cluster.rank)
        except BaseException as fault:
            return fault
        return None

    return on_ranks(world, one)


def raises(fault: BaseException, on: int) -> Callable[[int], None]:
    def work(rank: int) -> None:
        if rank == on:
            raise fault
        time.sleep(0.4)  # in a collective

    return work


@pytest.mark.parametrize(
    ("fault", "words"),
    [(ValueError("no such\nthing"), "ValueError: no such thing"), (TrainingError("loss is nan"), "loss is nan")],
)
def test_rank_0_says_what_ended_another(fault: BaseException, words: str, said: list[str]) -> None:
    assert watched(raises(fault, on=1))[1] is fault
    ended(said, f"error: rank 1 failed: {words}")


def test_what_rank_0_meets_it_says_itself(said: list[str]) -> None:
    fault = ValueError("x")
    assert watched(raises(fault, on=0))[0] is fault
    ended(said, "error: rank 0 failed: ValueError: x")  # where its own cleaning up does not end


def test_the_first_fault_counts_and_no_complaint_about_who_is_gone(said: list[str]) -> None:
    def work(rank: int) -> None:
        if rank < 2:
            raise RuntimeError(GLOO)
        time.sleep(0.05)
        raise ValueError("the cause")

    watched(work)
    ended(said, "error: rank 2 failed: ValueError: the cause")


def test_a_complaint_alone_is_said_by_who_makes_it(said: list[str]) -> None:
    fault = RuntimeError(GLOO)
    assert watched(raises(fault, on=0))[0] is fault


def test_a_mistake_that_all_ranks_meet_is_said_by_rank_0(said: list[str]) -> None:
    def work(rank: int) -> None:
        time.sleep(0.05 * (rank == 0))
        raise TrainingError("wrong everywhere")

    assert all(isinstance(fault, TrainingError) for fault in watched(work))


def test_who_is_done_or_stops_on_purpose_ends_nobody(said: list[str]) -> None:
    def done(rank: int) -> None:
        time.sleep(0.2 * rank)

    def stops(rank: int) -> None:
        time.sleep(0.2 * (2 - rank))
        raise StoppedEarly("SIGTERM")

    assert watched(done) == [None] * 3
    assert all(isinstance(fault, StoppedEarly) for fault in watched(stops))
    time.sleep(0.4)
    assert said == []


def joined(rank: int, hub: watch.Hub) -> watch.Spoke:
    spoke = watch.Spoke(rank)
    assert spoke.connect(*hub.invitation) is None
    return spoke


def test_silence_is_a_fault_and_who_dies_is_named(said: list[str]) -> None:
    hub = watch.Hub()
    first, _ = joined(1, hub), joined(2, hub)
    assert first._peer is not None
    first._speaks.set()  # this end is to be silent
    first._peer.close()
    ended(said, "error: rank 1 is gone without a word; was it killed?")


def test_when_rank_0_dies_the_others_leave_and_one_of_them_says_so(said: list[str]) -> None:
    hub = watch.Hub()
    joined(1, hub), joined(2, hub)
    for guest in list(hub._guests.values()):
        guest.close()
    ended(said, "[rank 1] error: rank 0 is gone without a word; was it killed?")
    hub._faults.clear()  # that it was only this end of its connections is not the hub's to know
    hub.leave()


def test_a_stranger_is_not_listened_to(said: list[str]) -> None:
    hub = watch.Hub()
    [address], port, _ = hub.invitation
    for says in (b'{"rank": 1, "token": "guessed"}\n', b"GET / HTTP/1.1\r\n\r\n", b"[1]\n"):
        with socket.create_connection((address, port)) as stranger:
            stranger.sendall(says)
            assert stranger.recv(10) == b""
    friend = joined(1, hub)
    assert said == []
    assert (
        watch.Spoke(2).connect([address], port, "guessed") == f"rank 2 cannot reach rank 0 at port {port} of {address}"
    )
    friend.leave()
    hub.leave()


def test_torchrun_is_told_what_to_say(said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    watched(raises(ValueError("boom"), on=1))
    read = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(tmp_path / "error.json")).message
    assert json.loads(json.dumps(read))["extraInfo"]["py_callstack"] == "rank 1 failed: ValueError: boom"
