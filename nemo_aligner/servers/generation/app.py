"""The routes: OpenAI's /v1/models, /v1/completions, /v1/chat/completions, NeMo's PUT /generate, and a page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_aligner.servers.generation.answers import Json
from nemo_aligner.servers.generation.clerk import Clerk, Served
from nemo_aligner.servers.generation.desk import Failed, FrontDesk
from nemo_aligner.servers.generation.requests import (
    NOT_OFFERED,
    TOO_MANY,
    ChatBody,
    CompletionBody,
    GenerateBody,
    RequestFault,
)

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")


def make_app(served: Served, desk: FrontDesk) -> FastAPI:
    """The web application; responses are drawn by whoever serves `desk`."""
    app = FastAPI(title="NeMo-Aligner", docs_url="/docs", redoc_url=None)
    clerk = Clerk(served, desk)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok", "unfinished": desk.unfinished}

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [clerk.model()]}

    @app.head("/v1/models/{name:path}", include_in_schema=False)
    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        clerk.check_model(name)
        return clerk.model()

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _rendered(await clerk.complete(body, request))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        return await _rendered(await clerk.chat(body, request))

    @app.put("/generate", response_model=None)
    async def generate(body: GenerateBody, request: Request) -> Response:
        return await _rendered(await clerk.generate(body, request))

    _answer_faults(app)
    app.add_middleware(Contained)
    return app


async def _rendered(found: Json | StreamingResponse) -> Response:
    """On a thread of its own: log-probabilities of many responses take long to write."""
    return await asyncio.to_thread(JSONResponse, found) if isinstance(found, dict) else found


class Contained:
    """Answers faults that are nobody's but ours. The framework would cut the connection under the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def noted(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if began:
                raise
            log.exception("%s %s fails", scope.get("method"), scope.get("path"))
            await answer(Failed())(scope, receive, send)


def answer(fault: RequestFault, headers: Mapping[str, str] | None = None) -> JSONResponse:
    again = {"Retry-After": "1"} if fault.status == TOO_MANY else {}
    return JSONResponse({"error": fault.error()}, fault.status, {**(headers or {}), **again})


def refusal(said: str, status: int) -> JSONResponse:
    """Of who is not let in, or comes with too much."""
    return answer(RequestFault(said, status=status))


def _answer_faults(app: FastAPI) -> None:
    """Every fault has the form that OpenAI's clients read."""

    @app.exception_handler(RequestFault)
    async def refused(request: Request, fault: RequestFault) -> JSONResponse:
        return answer(fault)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, fault: RequestValidationError) -> JSONResponse:
        return answer(_first_fault(fault))

    @app.exception_handler(HTTPException)
    async def http(request: Request, fault: HTTPException) -> JSONResponse:
        if isinstance(fault.__cause__, RecursionError | ValueError):  # of the reader of JSON
            return answer(RequestFault("the body is not valid JSON: no UTF-8, too deep, or numbers too long"))
        said = f"{request.method} {request.url.path}: {fault.detail}"
        return answer(RequestFault(said, status=fault.status_code), fault.headers)


def _telling(errors: Sequence[Json]) -> Json:
    """The first, or of a text or a list, of which each tells its own, what is wrong with the one that was given."""
    first = errors[0]
    if first["loc"][-1] != "str":
        return first
    others = [error for error in errors[1:] if error["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    if others and others[0]["type"] == "list_type":
        return {**first, "msg": "neither a text nor a list"}
    return others[0] if others else first


def _first_fault(fault: RequestValidationError) -> RequestFault:
    error = _telling(fault.errors())
    names = [part for part in map(str, error["loc"][1:]) if part != "str" and not part.startswith("list[")]
    param = names[0] if names else None
    if error["type"] == "json_invalid":
        return RequestFault(f"the body is not valid JSON: {error['ctx']['error']}")
    if param in NOT_OFFERED:
        return RequestFault(f"{param}: not offered by this server; leave it out", param)
    if error["type"] == "extra_forbidden":
        return RequestFault(f"Unrecognized request argument supplied: {'.'.join(names)}", ".".join(names))
    said = error["msg"].removeprefix("Value error, ")
    if not names and error["type"] in ("missing", "model_attributes_type"):
        return RequestFault("the body is not a JSON object; is the Content-Type application/json?")
    return RequestFault(f"{'.'.join(names)}: {said}" if names else said, param)
