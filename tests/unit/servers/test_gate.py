"""What goes through the gate: what the client said of itself, and nothing of the gate's own."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_aligner.servers.gate import Gate

SAID = b'{"rewards": [1.0]}'


class Compressing(http.server.BaseHTTPRequestHandler):
    """Answers as Triton does: in gzip where the request says that its sender reads it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        reads_it = "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(SAID) if reads_it else SAID
        self.send_response(200)
        if reads_it:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Compressing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def answer(url: str, *headers: tuple[bytes, bytes]) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of the gate's answer to a request with these headers alone."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v2",
        "raw_path": b"/v2",
        "query_string": b"",
        "headers": headers,
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Gate(url, "secret")(scope, receive, send))
    return dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent)


def test_an_answer_is_compressed_for_a_client_that_asks_for_it_and_for_no_other(url: str) -> None:
    headers, body = answer(url)
    assert b"content-encoding" not in headers
    assert body == SAID
    headers, body = answer(url, (b"accept-encoding", b"gzip"))
    assert headers[b"content-encoding"] == b"gzip"
    assert gzip.decompress(body) == SAID
