"""What clients are answered: OpenAI's objects, whole and in pieces, and NeMo's."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_aligner.engine.interfaces import Progress, PromptScores, Response, Tokenizer, TopLogprobs

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
    """A token's own text; of those that have none, such as EOS, what the vocabulary calls them."""
    return tokenizer.decode([token]) or tokenizer.piece(token)


@dataclass(frozen=True)
class Scored:
    """Tokens with their log-probabilities; None where there is none, at the very first."""

    tokens: Sequence[int]
    logprobs: Sequence[float | None]
    top: Sequence[TopLogprobs | None]

    def after(self, start: int) -> Scored:
        return Scored(self.tokens[start:], self.logprobs[start:], self.top[start:])


def scored(drawn: Progress | Response) -> Scored:
    return Scored(drawn.tokens, drawn.logprobs, drawn.top_logprobs or [None] * len(drawn.tokens))


def with_prompt(prompt: Sequence[int], scores: PromptScores | None, response: Scored) -> Scored:
    """Prompt and response as one."""
    if scores is None:
        return response
    return Scored(
        [*prompt, *response.tokens],
        [None, *scores.logprobs, *response.logprobs],
        [None, *scores.top, *response.top],
    )


def completion_logprobs(tokenizer: Tokenizer, scored: Scored, offset: int = 0) -> Json:
    """The `logprobs` of a completion; `offset` is where in the text its first token begins."""
    texts = [token_text(tokenizer, token) for token in scored.tokens]
    return {
        "tokens": texts,
        "token_logprobs": list(scored.logprobs),
        "top_logprobs": [None if top is None else _by_text(tokenizer, top) for top in scored.top],
        "text_offset": [offset + end for end in itertools.accumulate((len(text) for text in texts), initial=0)][:-1],
    }


def _by_text(tokenizer: Tokenizer, top: TopLogprobs) -> dict[str, float]:
    """Where two tokens have one text, the likelier one is named."""
    return {token_text(tokenizer, token): value for token, value in reversed(top)}


def chat_logprobs(tokenizer: Tokenizer, scored: Scored) -> Json:
    """The `logprobs` of a chat completion."""

    def entry(token: int, value: float | None) -> Json:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

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
    ends = [itertools.accumulate((len(tokenizer.decode([token])) for token in row), initial=0) for row in ids]
    values = [
        [*(response.prompt_scores.logprobs if response.prompt_scores else ()), *response.logprobs]
        for response in responses
    ]
    return {
        "sentences": [text + response.text for (text, _), response in zip(prompts, responses, strict=True)],
        "tokens": [[tokenizer.piece(token) for token in row] for row in ids],
        "logprob": values if logprobs else None,
        "token_ids": ids,
        "offsets": [list(row)[:-1] for row in ends],
    }
