"""Nobody passes a door without what it asks for, nor with more than it takes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from nemo_aligner.errors import ServerError
from nemo_aligner.ports import free_port
from nemo_aligner.servers import doors as doors_module
from nemo_aligner.servers.doors import Door, open_doors
from nemo_aligner.stages.run_control import StopSignal

TOKEN, LIMIT = "s3cr3t" * 6, 1000
HTTP = httpx.Client(verify=False)  # one, as each reads all of the machine's certificates


@pytest.fixture(scope="module")
def doors() -> Iterator[tuple[str, str]]:
    """Where a token is asked for, and where a password is."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "lives"

    @app.post("/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    ports = free_port(), free_port()
    opened = [
        Door("127.0.0.1", ports[0], "port", token=TOKEN, max_bytes=LIMIT),
        Door("127.0.0.1", ports[1], "web_port", "me", "secret", max_bytes=LIMIT),
    ]
    with open_doors(app, opened):
        yield f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("x"), bearer(TOKEN[:-1]), bearer(f"{TOKEN}x"), {"Authorization": TOKEN}, {"X": f"Bearer {TOKEN}"}],
)
def test_a_door_with_a_token_opens_to_nothing_else(doors: tuple[str, str], headers: dict[str, str]) -> None:
    for path in ("/length", "/docs", "/openapi.json", "/health/", "//health", "/nowhere"):
        answer = HTTP.post(f"{doors[0]}{path}", headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"error": "bearer token needed"})
    assert HTTP.get(f"{doors[0]}/health").json() == "lives"
    assert HTTP.get(f"{doors[1]}/health").status_code == 401, "a password is asked for everywhere"


def test_who_has_it_comes_in_and_it_is_compared_in_constant_time_and_not_logged(
    doors: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    same = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return same(a, b)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    with caplog.at_level(logging.DEBUG):
        assert HTTP.post(f"{doors[0]}/length", content=b"abc", headers=bearer(TOKEN)).json() == 3
        assert HTTP.post(f"{doors[1]}/length", content=b"abc", auth=("me", "secret")).json() == 3
    assert compared[0] == (f"Bearer {TOKEN}".encode(),) * 2
    assert len(compared) == 2
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(("size", "status"), [(0, 200), (LIMIT, 200), (LIMIT + 1, 413), (100 * LIMIT, 413)])
def test_a_body_over_the_bound_is_refused_with_and_without_a_length(
    doors: tuple[str, str], size: int, status: int
) -> None:
    whole, pieces = b"x" * size, iter([b"x"] * min(size, 5 * LIMIT))
    for content in (whole, pieces):
        answer = HTTP.post(f"{doors[0]}/length", content=content, headers=bearer(TOKEN))
        assert answer.status_code == status
        assert answer.json() == (size if status == 200 else {"error": f"more than {LIMIT} bytes"})


@pytest.fixture
def narrow() -> Iterator[tuple[int, threading.Event, threading.Semaphore]]:
    """A door for two at once, what keeps them inside, and what tells of each that came in."""
    app, leave, inside = FastAPI(), threading.Event(), threading.Semaphore(0)

    @app.post("/wait")
    async def wait() -> str:
        inside.release()
        while not leave.is_set():
            await asyncio.sleep(0.01)
        return "done"

    @app.get("/health")
    async def health() -> str:
        return "lives"

    port = free_port()
    with open_doors(app, [Door("127.0.0.1", port, "port", max_requests=2)]):
        yield port, leave, inside
        leave.set()


def test_more_requests_at_once_than_the_bound_are_refused_and_may_be_sent_again(
    narrow: tuple[int, threading.Event, threading.Semaphore],
) -> None:
    port, leave, entered = narrow
    url = f"http://127.0.0.1:{port}"
    with ThreadPoolExecutor(2) as pool:
        inside = [pool.submit(HTTP.post, f"{url}/wait", timeout=20) for _ in range(2)]
        assert all(entered.acquire(timeout=20) for _ in range(2))
        refused = HTTP.post(f"{url}/wait", timeout=20)
        assert refused.status_code == 503
        assert refused.json() == {"error": "more than 2 requests at once; send it again"}
        assert refused.headers["Retry-After"] == "1"
        assert HTTP.get(f"{url}/health").json() == "lives", "whoever looks after it is let in"
        leave.set()
        assert [done.result().json() for done in inside] == ["done"] * 2
    assert HTTP.post(f"{url}/wait").json() == "done"


def test_a_slow_client_keeps_nobody_waiting_and_is_told_when_its_time_is_over(
    doors: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors_module, "_BODY_S", 0.5)
    host, port = doors[0].removeprefix("http://").split(":")
    head = f"POST /length HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(head.encode() + b"x")
        for _ in range(20):
            assert HTTP.post(f"{doors[0]}/length", content=b"abc", headers=bearer(TOKEN)).json() == 3
        answer = slow.recv(65536)
        while b"}" not in answer:
            answer += slow.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert answer.endswith(b'{"error":"the body did not come within 0 s"}')


def test_who_takes_nothing_of_an_answer_loses_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doors_module, "_ANSWER_S", 0.3)
    app = FastAPI()

    @app.get("/much")
    async def much() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 65536

        return StreamingResponse(pieces())

    @app.get("/little")
    async def little() -> str:
        return "done"

    port = free_port()
    with (
        open_doors(app, [Door("127.0.0.1", port, "port", max_requests=1)]),
        socket.create_connection(("127.0.0.1", port), timeout=20) as slow,
    ):
        slow.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(100)
        found = []
        while not found or (found[-1] == 503 and len(found) < 200):
            time.sleep(0.05)
            found.append(HTTP.get(f"http://127.0.0.1:{port}/little").status_code)
        assert (found[0], found[-1]) == (503, 200)
    assert "a client took nothing of its answer for 0 s, and is left" in caplog.text


def test_a_connection_that_asks_for_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors_module, "_SILENT_S", 0.3)
    app = FastAPI()

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(1)
        return "done"

    port = free_port()
    with open_doors(app, [Door("127.0.0.1", port, "port")]), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(HTTP.get, f"http://127.0.0.1:{port}/slow", timeout=20)
        for begun in (b"", b"GET /slow HT"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
                silent.sendall(begun)
                assert silent.recv(100) == b""
        assert asked.result().json() == "done", "who asked is not silent"


def test_where_nobody_answers_any_more_the_process_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        raise SystemExit("no files left")

    def serve() -> None:
        with open_doors(FastAPI(), [Door("127.0.0.1", free_port(), "port")]):
            for _ in range(200):
                if stop.name is None:
                    time.sleep(0.05)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    with StopSignal() as stop, pytest.raises(ServerError, match="the web server has ended by itself; the log says why"):
        serve()
    assert stop.name == "SIGTERM"
