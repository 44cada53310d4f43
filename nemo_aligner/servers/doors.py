"""Who may come in, and with how much: web servers on a thread of their own.

The thread that draws or scores has the signals, the collectives and the GPU.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_aligner.errors import ServerError

log = logging.getLogger(__name__)

_CLOSING_S = 5
"""How long open connections have to end when the server closes."""

_BODY_S = 300.0
"""How long a client may take to send the body of a request."""

_ANSWER_S = 300.0
"""How long a client may take nothing of its answer."""

_SILENT_S = 60.0
"""How long a connection may be open without a request; each is a file of the process."""

_DROPPED = 32
"""Bounds that a body may fill before the connection is closed under it."""

_PROBES = ("/health", "/v2/health/live", "/v2/health/ready")
"""Whether the server lives is no secret: whoever looks after it asks without a token."""


def plain_refusal(said: str, status: int) -> Response:
    """As Triton has it."""
    return JSONResponse({"error": said}, status)


@dataclass(frozen=True)
class Door:
    """An address to listen on.

    With a password everybody who comes in here is asked for it (HTTP basic); with a token, for that (bearer), except
    where the path is a probe.
    """

    host: str
    port: int
    key: str  # the config key of the port, for messages
    username: str | None = None
    password: str | None = None
    token: str | None = None
    max_bytes: int = 16 << 20  # of the body of a request
    max_requests: int = 256  # that are answered at once
    busy: int = 503  # the status of those above it
    host_key: str = "host"
    model: str | None = None  # that is served, where the server has a name for it
    refusal: Callable[[str, int], Response] = plain_refusal  # of a message and a status, as clients here expect it


class Guard:
    """Lets those in who come by an open door, and those who know the password or the token of theirs."""

    def __init__(self, app: ASGIApp, doors: list[Door]) -> None:
        self._app = app
        self._doors = {door.port: door for door in doors}
        self._inside = dict.fromkeys(self._doors, 0)  # requests; touched on the event loop alone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        door = self._doors[scope["server"][1]]
        headers = dict(scope["headers"])
        if door.password is not None and not _authorized(headers, _basic(door)):
            ask = {"WWW-Authenticate": 'Basic realm="NeMo-Aligner"'}
            await PlainTextResponse("password needed", 401, ask)(scope, receive, send)
        elif (
            door.token is not None and scope["path"] not in _PROBES and not _authorized(headers, f"Bearer {door.token}")
        ):
            refusal = door.refusal("bearer token needed", 401)
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, send)
        elif scope["path"] in _PROBES:
            await self._let_in(door, scope, receive, send)
        elif self._inside[door.port] >= door.max_requests:
            refusal = door.refusal(f"more than {door.max_requests} requests at once; send it again", door.busy)
            refusal.headers["Retry-After"] = "1"
            await refusal(scope, receive, send)
        else:
            self._inside[door.port] += 1
            try:
                await self._let_in(door, scope, receive, send)
            finally:
                self._inside[door.port] -= 1

    async def _let_in(self, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(_read(receive, door.max_bytes), _BODY_S)
        except TimeoutError:
            await door.refusal(f"the body did not come within {_BODY_S:.0f} s", 408)(scope, receive, send)
            return
        if isinstance(body, bytes):
            try:
                await self._app(scope, _again(body, receive), _in_time(send))
            except _TooSlow:
                log.warning("a client took nothing of its answer for %.0f s, and is left", _ANSWER_S)
        elif body:
            await door.refusal(f"more than {door.max_bytes} bytes", 413)(scope, receive, send)


def _basic(door: Door) -> str:
    return "Basic " + base64.b64encode(f"{door.username or ''}:{door.password}".encode()).decode()


def _authorized(headers: dict[bytes, bytes], wanted: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(headers.get(b"authorization", b""), wanted.encode())


async def _read(receive: Receive, limit: int) -> bytes | bool:
    """The body of a request; True where it is longer than `limit`, False where the client has gone.

    What is too long is read on, and dropped, for a while: most clients look for an answer when they have sent it all.
    """
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            body += part
        else:
            body.clear()
        if size > _DROPPED * limit:
            return True
        if not message.get("more_body"):
            return bytes(body) if size <= limit else True


def _again(body: bytes, receive: Receive) -> Receive:
    """What the application reads: the body, and then whatever comes."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


class _TooSlow(Exception):
    """A client takes nothing of its answer."""


def _in_time(send: Send) -> Send:
    """What the application sends by, no longer than a client may take."""

    async def in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                await send(message)
        except TimeoutError:
            raise _TooSlow from None

    return in_time


class _Connection(H11Protocol):
    """Closed where no request comes by it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_SILENT_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


@contextmanager
def open_doors(app: ASGIApp, doors: list[Door]) -> Iterator[None]:
    """Answer clients at every door inside the block. Raises ServerError where one is taken.

    Where nobody answers any more, for a fault of the web server's own, the process is told to stop as by SIGTERM, and
    the end of the block raises ServerError.
    """
    sockets = [_listen(door) for door in doors]
    server = uvicorn.Server(
        uvicorn.Config(
            Guard(app, doors),
            http=_Connection,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=_CLOSING_S,
        )
    )

    def answer() -> None:
        try:
            server.run(sockets)
        except BaseException:
            log.exception("the web server fails")
        if not server.should_exit:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=answer, name="web server", daemon=True)
    thread.start()
    for door in doors:
        log.info("serving %son http://%s:%d", f"{door.model} " if door.model else "", door.host, door.port)
    try:
        yield
        if not thread.is_alive():
            raise ServerError("the web server has ended by itself; the log says why")
    finally:
        server.should_exit = True
        thread.join(timeout=2 * _CLOSING_S)
        log.info("server stopped")


def _listen(door: Door) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
        return socket.create_server((door.host, door.port), family=family, backlog=1024)
    except OSError as fault:
        raise ServerError(
            f"{door.host_key}={door.host}, {door.key}={door.port}: {fault.strerror}; choose another"
        ) from None
