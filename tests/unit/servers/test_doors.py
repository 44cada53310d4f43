"""Nobody passes a door without what it asks for, nor with more than it takes."""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request

from nemo_aligner.servers.doors import Door, open_doors

TOKEN, LIMIT = "s3cr3t" * 6, 1000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    [{}, bearer(""), bearer(TOKEN[:-1]), bearer(f"{TOKEN}x"), {"Authorization": TOKEN}, {"X": f"Bearer {TOKEN}"}],
)
def test_a_door_with_a_token_opens_to_nothing_else(doors: tuple[str, str], headers: dict[str, str]) -> None:
    for path in ("/length", "/docs", "/openapi.json", "/health/", "//health", "/nowhere"):
        answer = httpx.post(f"{doors[0]}{path}", headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"error": "bearer token needed"})
    assert httpx.get(f"{doors[0]}/health").json() == "lives"
    assert httpx.get(f"{doors[1]}/health").status_code == 401, "a password is asked for everywhere"


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
        assert httpx.post(f"{doors[0]}/length", content=b"abc", headers=bearer(TOKEN)).json() == 3
        assert httpx.post(f"{doors[1]}/length", content=b"abc", auth=("me", "secret")).json() == 3
    assert compared[0] == (f"Bearer {TOKEN}".encode(),) * 2
    assert len(compared) == 2
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(("size", "status"), [(0, 200), (LIMIT, 200), (LIMIT + 1, 413), (100 * LIMIT, 413)])
def test_a_body_over_the_bound_is_refused_with_and_without_a_length(
    doors: tuple[str, str], size: int, status: int
) -> None:
    whole, pieces = b"x" * size, iter([b"x"] * min(size, 5 * LIMIT))
    for content in (whole, pieces):
        answer = httpx.post(f"{doors[0]}/length", content=content, headers=bearer(TOKEN))
        assert answer.status_code == status
        assert answer.json() == (size if status == 200 else {"error": f"more than {LIMIT} bytes"})
