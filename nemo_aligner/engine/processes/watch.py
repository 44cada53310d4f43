"""Ranks that watch over one another: the death of one ends the job in seconds, and the last line says whose and why.

    rank r ── its fault, or silence ──▶ rank 0 ── the first fault ──▶ the other ranks, which leave

A collective waits for a dead rank for half an hour (over gloo it fails, and blames whoever it spoke to last). So each
rank has a connection to rank 0 while the process group lives, with a thread at each end: it ends with its process,
whatever that died of, and with its machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from nemo_aligner.engine.processes.launch import end_process, how_sibling_ended
from nemo_aligner.errors import AlignerError, StoppedEarly

log = logging.getLogger(__name__)

_SETTLE_S = 3.0  # from the first sign of a fault to the judgement which one was the first
_LAST_WORDS_S = 5.0  # for another rank to say more of its fault before rank 0 does
_LEAVE_S = 30.0  # for a rank that failed to clean up: it may wait for others, who are gone
_CONNECT_S = 20.0
_MOST_SAID = 500  # characters
_WAITED_IN_VAIN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class _Cluster(Protocol):
    rank: int
    world_size: int

    def broadcast(self, value: Any) -> Any: ...

    def gather_ranks(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Fault:
    """What ends a run: said by the rank itself, or seen of it."""

    rank: int
    said: str
    follows: bool = False  # from another rank's: it waited in vain
    shared: bool = False  # a user's mistake, which every rank may have met

    def __str__(self) -> str:
        return f"rank {self.rank} {self.said}"


def _fault_of(rank: int, found: BaseException) -> Fault:
    said, users = " ".join(str(found).split())[:_MOST_SAID], isinstance(found, AlignerError)
    follows = _waited_in_vain(found)
    return Fault(
        rank, f"failed: {said if users else f'{type(found).__name__}: {said}'}", follows, users and not follows
    )


def _waited_in_vain(found: BaseException | None) -> bool:
    """Whether a fault, or what it came from, says no more than that another rank was not there."""
    while found is not None:
        # torch raises plain RuntimeErrors of gloo's
        if isinstance(found, dist.DistError) or (
            isinstance(found, RuntimeError) and any(word in str(found) for word in _WAITED_IN_VAIN)
        ):
            return True
        found = found.__cause__ or found.__context__
    return False


@contextlib.contextmanager
def watching(cluster: _Cluster) -> Iterator[None]:
    """End this process soon after another rank fails or dies in the block, and the others when this one does."""
    if cluster.world_size == 1:
        yield
        return
    watch = _connected(cluster)
    try:
        yield
    except (StoppedEarly, GeneratorExit):
        watch.leave()
        raise
    except BaseException as found:
        fault = _fault_of(cluster.rank, found)
        if not fault.follows:
            _tell_torchrun(fault)
        watch.fail(fault)
        raise
    else:
        watch.leave()


def _connected(cluster: _Cluster) -> Hub | Spoke:
    watch = Hub() if cluster.rank == 0 else Spoke(cluster.rank)
    invitation = cluster.broadcast(watch.invitation if isinstance(watch, Hub) else None)
    for alone in cluster.gather_ranks(watch.connect(*invitation) if isinstance(watch, Spoke) else None):
        if alone and cluster.rank == 0:
            log.warning("%s: its death would be noticed only by who waits for it", alone)
    return watch


def _tell_torchrun(fault: Fault) -> None:
    """Where torchrun started this rank: what it says of it in its last lines, in the form that it reads."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": str(fault), "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as stream:
            json.dump({"message": {"message": str(fault), "extraInfo": extra}}, stream)


class Peer:
    """One end of a connection between ranks, which carries JSON lines."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self._rest = end, b""
        # a machine that is gone closes nothing
        for level, name, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        ):
            end.setsockopt(level, name, value)

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # who is gone need not hear it
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that came, after waiting for some; None when the other end is gone, or is no rank."""
        try:
            came = self.socket.recv(1 << 16)
            *lines, self._rest = (self._rest + came).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if came and all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Spoke:
    """The end of a rank other than 0."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._peer: Peer | None = None
        self._speaks = threading.Event()  # the main thread says what the end of this process is
        self._left = False

    def connect(self, addresses: list[str], port: int, token: str) -> str | None:
        """Reach rank 0 at one of its addresses; what is wrong where that cannot be done."""
        for address in addresses:
            with contextlib.suppress(OSError):
                peer = Peer(socket.create_connection((address, port), timeout=_CONNECT_S))
                peer.send(rank=self._rank, token=token)
                if peer.receive() == [{"welcome": True}]:
                    peer.socket.settimeout(None)
                    self._peer = peer
                    threading.Thread(target=self._watch, args=(peer,), daemon=True).start()
                    return None
        return f"rank {self._rank} cannot reach rank 0 at port {port} of {' or '.join(addresses)}"

    def _watch(self, peer: Peer) -> None:
        end: dict[str, Any] = {"rank": 0, "end": "rank 0 is gone without a word; was it killed?"}
        # one for each log, as far as that can be told
        says = os.environ.get("LOCAL_RANK") == "0" or self._rank == 1
        for messages in iter(peer.receive, None):
            if messages == [{"bye": True}]:
                return
            if messages:
                end = messages[0]
                says = os.environ.get("LOCAL_RANK") == "0"
                break
        if self._left:
            return
        if end["rank"] == self._rank:
            self._speaks.set()
        if self._speaks.is_set():
            time.sleep(_LEAVE_S)
            says = False
        end_process(f"[rank {self._rank}] error: {end['end']}" if says else None)

    def fail(self, fault: Fault) -> None:
        """Tell rank 0; returns when this rank is to say more of its fault."""
        if self._peer is None:
            return
        if not fault.follows:
            self._speaks.set()
        self._peer.send(said=fault.said, follows=fault.follows)
        self._speaks.wait(_LEAVE_S)  # or rank 0 has this process ended, and says what the fault follows from

    def leave(self) -> None:
        if self._peer is not None:
            self._left = True
            self._peer.send(bye=True)
            self._peer.close()


class Hub:
    """The end of rank 0, which judges what the fault was, tells the others, and speaks last."""

    def __init__(self) -> None:
        master = os.environ.get("MASTER_ADDR", "127.0.0.1")
        loopback = master in ("127.0.0.1", "::1", "localhost")
        dual = not loopback and socket.has_dualstack_ipv6()
        self._listener = socket.create_server(
            (master if loopback else "", 0),
            family=socket.AF_INET6 if dual or master == "::1" else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=dual,
        )
        # rank 0 is not at MASTER_ADDR where a launcher keeps the store elsewhere
        addresses = [master] if loopback else [master, socket.getfqdn(), socket.gethostname()]
        self._token = secrets.token_hex(16)
        self.invitation = (addresses, self._listener.getsockname()[1], self._token)
        """What `Spoke.connect` takes."""
        self._wake, self._woken = socket.socketpair()
        self._orders: queue.SimpleQueue[Fault | None] = queue.SimpleQueue()  # of the main thread; None: leave
        self._speaks = threading.Event()  # the main thread says what the end of this process is
        self._guests: dict[int, Peer] = {}
        self._faults: list[Fault] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        deadline = float("inf")
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = selector.select(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        peer = Peer(self._listener.accept()[0])
                        selector.register(peer.socket, selectors.EVENT_READ, (peer, []))
                    elif key.fileobj is self._woken:
                        self._woken.recv(1)
                        own = self._orders.get()
                        if own is None and not self._faults:
                            return
                        deadline = self._ordered(own)
                    elif not self._heard(*key.data):
                        selector.unregister(key.fileobj)
                        key.data[0].close()
                if self._faults:
                    deadline = min(deadline, time.monotonic() + _SETTLE_S)
                if time.monotonic() >= deadline:
                    self._end(min(self._faults, key=lambda fault: fault.follows))

    def _ordered(self, own: Fault | None) -> float:
        """Take in the fault of rank 0, or that it is done; returns when to judge."""
        if own is not None:
            self._faults.insert(0 if own.shared else len(self._faults), own)
        return time.monotonic() + (_SETTLE_S if own is not None and own.follows else 0)

    def _heard(self, peer: Peer, known: list[int]) -> bool:
        """Take in what a rank says (`known` is its number, once it has said it); False: there is no more to come."""
        messages = peer.receive()
        if messages is None:
            if known:
                self._lost(known[0])
            return False
        for message in messages:
            if not known:
                if not secrets.compare_digest(str(message.get("token")), self._token):
                    return False
                known.append(message["rank"])
                self._guests[message["rank"]] = peer
                peer.send(welcome=True)
            elif "bye" in message:
                self._guests.pop(known[0], None)
                return False
            else:
                self._faults.append(Fault(known[0], message["said"], message["follows"]))
        return True

    def _lost(self, rank: int) -> None:
        """A connection ended without a good-bye; a rank that has said why ends so too."""
        del self._guests[rank]
        if all(rank != fault.rank for fault in self._faults):
            self._faults.append(Fault(rank, how_sibling_ended(rank) or "is gone without a word; was it killed?"))

    def _end(self, fault: Fault) -> None:
        for guest in list(self._guests.values()):
            guest.send(rank=fault.rank, end=str(fault))
        if fault.rank == 0:
            self._speaks.set()
            time.sleep(_LEAVE_S)
        elif fault.rank in self._guests:
            guest = self._guests[fault.rank]
            guest.socket.settimeout(_LAST_WORDS_S)
            guest.receive()  # until it has ended
        end_process(f"error: {fault}")

    def _order(self, fault: Fault | None) -> None:
        self._orders.put(fault)
        self._wake.send(b"!")

    def fail(self, fault: Fault) -> None:
        """Tell the others; returns when rank 0 is to say more of its own fault."""
        self._order(fault)
        self._speaks.wait(_LEAVE_S)

    def leave(self) -> None:
        """Raises nothing: where another rank has failed, this process ends here."""
        self._order(None)
        self._thread.join()
        for guest in self._guests.values():
            guest.send(bye=True)
            guest.close()
        for end in (self._listener, self._wake, self._woken):
            end.close()
