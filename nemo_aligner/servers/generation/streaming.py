"""A response while it is drawn, as the pieces of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nemo_aligner.data.token_texts import CONTEXT
from nemo_aligner.engine.generation.text_stream import TextStream
from nemo_aligner.engine.interfaces import GenerationRequest, Progress, Response, Tokenizer
from nemo_aligner.servers.generation import answers
from nemo_aligner.servers.generation.answers import Scored


class StreamedChoice:
    """One response of a stream: what of it was given out already."""

    def __init__(self, index: int, tokenizer: Tokenizer, request: GenerationRequest) -> None:
        assert request.sampling is not None
        self._prompt = request.prompt_tokens[-CONTEXT:]
        params = request.sampling
        self._index = index
        self._text = TextStream(tokenizer, params.end_strings, request.prompt_tokens, params.min_tokens)
        self._tokens = self._characters = 0

    def piece(self, event: Progress | Response) -> tuple[int, str, Scored, str | None, int] | None:
        """Index, new text, its tokens, why it ended, and where the first begins; None where there is nothing to say."""
        over = isinstance(event, Response)
        text = self._text.rest(event.text) if isinstance(event, Response) else self._text.more(event.tokens)
        if not text and not over:
            return None
        scored = answers.scored(event, self._prompt)
        begins, new = self._characters, scored.after(self._tokens)
        self._characters, self._tokens = self._text.length, len(event.tokens)
        return self._index, text, new, event.finish_reason if isinstance(event, Response) else None, begins


class EventStream(StreamingResponse):
    """`events`, and `over` when they are, or nobody hears them any more, which may be before the first."""

    def __init__(self, events: AsyncGenerator[str, None], over: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._over = events, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()
            await self._events.aclose()


def event_of(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
