"""The web server on a thread of its own: the thread that draws has the signals, the collectives and the GPU."""

from __future__ import annotations

import base64
import logging
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from nemo_aligner.errors import ServerError

log = logging.getLogger(__name__)

_CLOSING_S = 5
"""How long open connections have to end when the server closes."""


@dataclass(frozen=True)
class Door:
    """An address to listen on; with a password everybody who comes in here is asked for it (HTTP basic)."""

    host: str
    port: int
    key: str  # the config key of the port, for messages
    username: str | None = None
    password: str | None = None


class Guard:
    """Lets those in who come by an open door, and those who know the password of theirs."""

    def __init__(self, app: ASGIApp, doors: list[Door]) -> None:
        self._app = app
        self._wanted = {
            door.port: "Basic " + base64.b64encode(f"{door.username or ''}:{door.password}".encode()).decode()
            for door in doors
            if door.password is not None
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = self._wanted.get((scope.get("server") or ("", 0))[1])
        if scope["type"] == "http" and wanted is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, wanted.encode()):
                ask = {"WWW-Authenticate": 'Basic realm="NeMo-Aligner"'}
                await PlainTextResponse("password needed", 401, ask)(scope, receive, send)
                return
        await self._app(scope, receive, send)


@contextmanager
def open_doors(app: FastAPI, doors: list[Door]) -> Iterator[None]:
    """Answer clients at every door inside the block. Raises ServerError where one is taken."""
    sockets = [_listen(door) for door in doors]
    server = uvicorn.Server(
        uvicorn.Config(Guard(app, doors), log_level="warning", lifespan="off", timeout_graceful_shutdown=_CLOSING_S)
    )
    thread = threading.Thread(target=server.run, args=(sockets,), name="web server", daemon=True)
    thread.start()
    for door in doors:
        log.info("serving on http://%s:%d", door.host, door.port)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=2 * _CLOSING_S)
        log.info("server stopped")


def _listen(door: Door) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
        return socket.create_server((door.host, door.port), family=family, backlog=1024)
    except OSError as fault:
        raise ServerError(f"host={door.host}, {door.key}={door.port}: {fault.strerror}; choose another") from None
