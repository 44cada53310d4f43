"""A network that fails as it is told to: a TCP proxy between a client and a server, one connection at a time.

reset           the connection is accepted, and reset once the request has come
half-open       the request is taken, and nothing ever comes back
slow            the answer comes in small pieces with pauses
500             the answer is HTTP status 500
garbage         the answer is no HTTP
lies            the answer is HTTP status 200 with a body that is none
cut             the answer ends in the middle
refused         nobody listens (as long as the proxy is `down`)
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

FAULTS = ("reset", "half-open", "slow", "500", "garbage", "lies", "cut")
_FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n"
_LIES = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"outputs": 7'


class FaultyProxy:
    """Listens on `port` for the server at `target`; `fault(path)` says what happens to a request, None: nothing."""

    def __init__(self, port: int, target: int, fault: Callable[[str], str | None]) -> None:
        self.port, self.target, self._fault = port, target, fault
        self.met: list[str] = []
        self._over, self._held, self._open = threading.Event(), list[socket.socket](), set[socket.socket]()
        self._listener: socket.socket | None = None

    def up(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        """From now on connections are refused, and those that there are have ended."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for client in list(self._open):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._over.set()
        self.down()
        for one in self._held:
            one.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._over.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Requests of one connection, until it or the server's ends."""
        self._open.add(client)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target), timeout=20) as server:
            while not self._over.is_set():
                request = _message(client)
                if not request:
                    break
                fault = self._fault(request.split(b" ", 2)[1].decode())
                if fault is not None:
                    self.met.append(fault)
                if fault == "half-open":
                    self._held.append(client)
                    return
                if not self._answer(client, server, request, fault):
                    break
        self._open.discard(client)
        client.close()

    def _answer(self, client: socket.socket, server: socket.socket, request: bytes, fault: str | None) -> bool:
        """Whether the connection goes on."""
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault in ("500", "garbage", "lies"):
            made = {
                "500": _FAILED + b'{"error": "oops"}',
                "garbage": b"\x16\x03\x01\xff\xfe no HTTP\r\n\r\n",
                "lies": _LIES,
            }
            client.sendall(made[fault])
            return False
        server.sendall(request)
        answer = _message(server)
        for piece in _pieces(answer[: len(answer) // 2] if fault == "cut" else answer, slow=fault == "slow"):
            client.sendall(piece)
        return bool(answer) and fault != "cut"


def _message(source: socket.socket) -> bytes:
    """One HTTP message with its body; empty where the connection ended before it was whole."""
    found = b""
    while b"\r\n\r\n" not in found:
        piece = source.recv(65536)
        if not piece:
            return b""
        found += piece
    head = found.partition(b"\r\n\r\n")[0]
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    size = len(head) + 4 + int(fields.get(b"content-length", b"0"))
    while len(found) < size:
        piece = source.recv(65536)
        if not piece:
            return b""
        found += piece
    return found


def _pieces(answer: bytes, *, slow: bool) -> Iterator[bytes]:
    size = max(1, len(answer) // 8) if slow else max(1, len(answer))
    for start in range(0, len(answer), size):
        yield answer[start : start + size]
        if slow:
            time.sleep(0.05)
