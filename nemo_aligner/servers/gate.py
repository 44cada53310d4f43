"""What stands before Triton: requests that passed the door go on to it, whole, and its answers come back.

Triton reads a JSON body onto the stack of a thread: 4 MB of it, from anybody, end the process. Here a body has a bound,
Triton's threads have room for it, and Triton itself answers nobody but this process.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import yarl
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

MAX_JSON_BYTES = 16 << 20
"""Of a body in JSON, or of the JSON head of one in the binary form."""

_STACK_BYTES = 4 * MAX_JSON_BYTES
_HEAD = "inference-header-content-length"
_ACCESS = "triton-access-token"
_OF_THE_CONNECTION = {"host", "connection", "keep-alive", "content-length", "transfer-encoding", "te", "upgrade"}
_OWN = _OF_THE_CONNECTION | {"authorization", "expect", _ACCESS}


class Gate:
    """The ASGI application that asks Triton at `url`, which knows us by `access`."""

    def __init__(self, url: str, access: str) -> None:
        self._url, self._access = url, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await self._answer(Request(scope, receive)))(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        body = await request.body()
        head = request.headers.get(_HEAD, "")
        if (int(head) if head.isdigit() else len(body)) > MAX_JSON_BYTES:
            said = f"more than {MAX_JSON_BYTES} bytes of JSON; send fewer texts, or send them in the binary form"
            return JSONResponse({"error": said}, 413)
        path = request.scope.get("raw_path", request.url.path.encode()).decode("ascii")
        url = yarl.URL(f"{self._url}{path}{f'?{request.url.query}' if request.url.query else ''}", encoded=True)
        headers = {name: value for name, value in request.headers.items() if name not in _OWN}
        try:
            # each request has its connection: Triton closes those that idle, and one may be the next to be used
            async with (
                aiohttp.ClientSession(
                    auto_decompress=False,
                    skip_auto_headers=["Accept-Encoding"],  # Triton compresses for who says that it reads that
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as session,
                session.request(
                    request.method, url, data=body, headers={**headers, _ACCESS: self._access}, allow_redirects=False
                ) as answer,
            ):
                content = await answer.read()
        except aiohttp.ClientError:
            return JSONResponse({"error": "the reward model does not answer"}, 503)
        response = Response(content, answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in _OF_THE_CONNECTION:
                response.headers[name] = value
        return response


@contextmanager
def roomy_stacks() -> Iterator[None]:
    """Threads of a process that is started inside the block have stacks on which such a body fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
