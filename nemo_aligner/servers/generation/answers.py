"""What clients are answered: OpenAI's objects, whole and in pieces, and NeMo's."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_aligner.data.token_texts import CONTEXT, placed, token_bytes
from nemo_aligner.engine.interfaces import Progress, Response, Tokenizer, TopLogprobs

Json = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What all pieces of one answer have in common."""

    kind: str  # text_completion, chat.completion or chat.completion.chunk
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def with_choices(self, choices: Iterable[Json], usage: Json | None = None) -> Json:
        own = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        return {**own, "choices": list(choices), **({} if usage is None else {"usage": usage})}


def usage(prompts: Iterable[Sequence[int]], responses: Iterable[Sequence[int]]) -> Json:
    prompt_tokens, completion_tokens = sum(map(len, prompts)), sum(map(len, responses))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text in the middle of others; of those that have none, such as EOS, what the vocabulary calls them.

    Of a part of a character its bytes, in OpenAI's form: bytes:\\xe6.
    """
    raw = token_bytes(tokenizer, token)
    try:
        return raw.decode() or tokenizer.piece(token)
    except UnicodeDecodeError:
        return f"bytes:{repr(raw)[2:-1]}"


@dataclass(frozen=True)
class Scored:
    """Tokens with their log-probabilities; None where there is none, at the very first."""

    tokens: Sequence[int]
    logprobs: Sequence[float | None]
    top: Sequence[TopLogprobs | None]
    before: Sequence[int] = ()  # the last tokens before these; none where these begin the text

    def after(self, start: int) -> Scored:
        before = [*self.before, *self.tokens[:start]][-CONTEXT:]
        return Scored(self.tokens[start:], self.logprobs[start:], self.top[start:], before)


def scored(drawn: Progress | Response, before: Sequence[int]) -> Scored:
    return Scored(drawn.tokens, drawn.logprobs, drawn.top_logprobs or [None] * len(drawn.tokens), before)


def with_prompt(prompt: Sequence[int], response: Response) -> Scored:
    """A response, and where its prompt is scored too both as one."""
    drawn, scores = scored(response, prompt), response.prompt_scores
    if scores is None:
        return drawn
    return Scored([*prompt, *drawn.tokens], [None, *scores.logprobs, *drawn.logprobs], [None, *scores.top, *drawn.top])


def completion_logprobs(tokenizer: Tokenizer, scored: Scored, offset: int = 0) -> Json:
    """The `logprobs` of a completion; `offset` is where in the text its first token begins."""
    places = list(placed(tokenizer, scored.before, scored.tokens))

    def text(token: int, begins: int, alone: str) -> str:
        """Before the first word of a text there is no blank, though its token may have one."""
        own = token_text(tokenizer, token)
        if scored.before or begins:
            return own
        return alone or (own if own.strip() else tokenizer.piece(token))

    return {
        "tokens": [text(token, *place) for token, place in zip(scored.tokens, places, strict=True)],
        "token_logprobs": list(scored.logprobs),
        "top_logprobs": [None if top is None else _by_text(tokenizer, top) for top in scored.top],
        "text_offset": [offset + begins for begins, _ in places],
    }


def _by_text(tokenizer: Tokenizer, top: TopLogprobs) -> dict[str, float]:
    """Where two tokens have one text, the likelier one is named."""
    return {token_text(tokenizer, token): value for token, value in reversed(top)}


def chat_logprobs(tokenizer: Tokenizer, scored: Scored) -> Json:
    """The `logprobs` of a chat completion."""

    def entry(token: int, value: float | None) -> Json:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": value, "bytes": list(token_bytes(tokenizer, token))}

    return {
        "content": [
            {**entry(token, value), "top_logprobs": [entry(*likely) for likely in top or ()]}
            for token, value, top in zip(scored.tokens, scored.logprobs, scored.top, strict=True)
        ]
    }


def nemo_answer(
    tokenizer: Tokenizer, prompts: Sequence[tuple[str, Sequence[int]]], responses: Sequence[Response], logprobs: bool
) -> Json:
    """NeMo's answer to PUT /generate: sentences are prompt and response, tokens what the vocabulary calls them."""
    ids = [[*tokens, *response.tokens] for (_, tokens), response in zip(prompts, responses, strict=True)]
    values = [
        [*(response.prompt_scores.logprobs if response.prompt_scores else ()), *response.logprobs]
        for response in responses
    ]
    return {
        "sentences": [text + response.text for (text, _), response in zip(prompts, responses, strict=True)],
        "tokens": [[tokenizer.piece(token) for token in row] for row in ids],
        "logprob": values if logprobs else None,
        "token_ids": ids,
        "offsets": [[begins for begins, _ in placed(tokenizer, (), row)] for row in ids],
    }
