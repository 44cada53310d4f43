"""What clients may ask for: bodies of OpenAI's completions and chat completions, and of NeMo's PUT /generate.

A field that is not known is refused; one that is known and not offered, such as `tools`, is refused unless it has the
value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from nemo_aligner.algorithms.sampling import EOS_ALIAS, SamplingParams
from nemo_aligner.config.schema import LEAST_TEMPERATURE, PENALTIES
from nemo_aligner.data.jsonl import half_character

Count = Annotated[int, Field(ge=1, le=1024)]
MOST_RESPONSES = 2048
"""Of one request: a small body could otherwise ask for millions, and those of all other clients would wait for them."""

TOO_MANY = 429
"""The HTTP status of what may be sent again when others are done."""

MOST_ENDS, LONGEST_END = 16, 256
"""Texts that end a response: how many, and the characters of each; they are looked for after every token."""

Penalty = Annotated[float, Field(ge=PENALTIES[0], le=PENALTIES[1])]


NOT_OFFERED = frozenset(
    {
        *("presence_penalty", "frequency_penalty", "logit_bias", "service_tier", "store", "metadata"),
        *("best_of", "suffix", "response_format", "tools", "tool_choice", "modalities"),
        *("all_probs", "task_ids", "neighbors"),
    }
)
"""Fields that have no value but the one that changes nothing."""


class RequestFault(Exception):
    """A request that is refused, as OpenAI's clients expect it: status, and `error` with these fields."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def error(self) -> dict[str, str | None]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message, param, code = _whole_characters(self.message), self.param and _whole_characters(self.param), self.code
        if self.status == TOO_MANY:
            kind, code = "rate_limit_error", "rate_limit_exceeded"
        return {"message": message, "type": kind, "param": param, "code": code}


def _whole_characters(text: str) -> str:
    """Of what a client wrote, halves of characters, which JSON allows and UTF-8 does not, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _checked_ends(ends: Any) -> Any:
    """The text or texts that end a response. Raises ValueError where there are too many, or no tokenizer takes one."""
    texts = [ends] if isinstance(ends, str) else ends or ()
    if len(texts) > MOST_ENDS:
        raise ValueError(f"{len(texts)} texts, at most {MOST_ENDS} can end a response")
    for text in texts:
        if len(text) > LONGEST_END:
            raise ValueError(f"a text has {len(text)} characters, at most {LONGEST_END} are looked for")
        half = half_character(text)
        if half is not None:
            raise ValueError(f"a text holds {half}, one half of a character")
    return ends


def _check_responses(prompts: int, n: int = 1) -> None:
    """Raises ValueError."""
    if prompts * n > MOST_RESPONSES:
        asked = f"{prompts * n} responses ({prompts} prompts, n={n})"
        raise ValueError(f"{asked} are more than one request may ask for, {MOST_RESPONSES}")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _OpenAIBody(_Body):
    """What both of OpenAI's forms have, and three fields of ours."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=100)  # below 1e-5: the likeliest token
    top_p: float = Field(1.0, ge=0, le=1)  # 0: the likeliest token, not NeMo's "off"
    n: Count = 1
    stop: Annotated[str | list[str] | None, AfterValidator(_checked_ends)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # names for the client's own books
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    top_k: int = Field(0, ge=0)
    repetition_penalty: Penalty = 1.0
    min_tokens: int = Field(0, ge=0)

    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """In OpenAI's API null is to leave a field out; many clients send every field."""
        if not isinstance(body, dict):
            return body
        fields = cls.model_fields
        return {
            name: value
            for name, value in body.items()
            if value is not None or name not in fields or fields[name].is_required()
        }

    @model_validator(mode="after")
    def _check_streaming(self) -> _OpenAIBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true only")
        return self

    @model_validator(mode="after")
    def _check_penalty(self) -> _OpenAIBody:
        if self.is_greedy and self.repetition_penalty != 1:
            raise ValueError(
                "repetition_penalty is not used where temperature or top_p is 0; leave it out, or give temperature=0.01"
            )
        return self

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE or self.top_p == 0

    def sampling(self, *, seed: int, end_strings: Sequence[str], max_tokens: int, top_logprobs: int) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            greedy=self.is_greedy,
            temperature=1.0 if self.is_greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            end_strings=(*end_strings, *stop),
            seed=seed if self.seed is None else self.seed,
            top_logprobs=top_logprobs,
        )


class CompletionBody(_OpenAIBody):
    """POST /v1/completions."""

    prompt: Any  # a text, texts, token ids, or lists of token ids
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        if not _prompts(value):
            raise ValueError("neither a text nor a list of texts, of token ids, or of lists of token ids")
        return value

    @model_validator(mode="after")
    def _check_lengths(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or echo must be true")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed")
        _check_responses(len(self.prompts()), self.n)
        return self

    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids."""
        return _prompts(self.prompt)


def _prompts(value: Any) -> list[Any]:
    """One or several; empty where `value` is neither."""
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if isinstance(value, list) and (all(isinstance(one, str) for one in value) or all(map(_are_ids, value))):
        return value
    return []


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn; what an answer of the server has besides, and has nothing in, may come back with it."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_parts(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value or name not in _PARTS_OF_ANSWERS}

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text, **({} if self.name is None else {"name": self.name})}


_PARTS_OF_ANSWERS = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls"})


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(_OpenAIBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one thing; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true only")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class GenerateBody(_Body):
    """PUT /generate, with NeMo's names and defaults; `logprob` is another name of `compute_logprob`."""

    sentences: list[str] = Field(min_length=1)
    tokens_to_generate: int = Field(64, ge=1)
    temperature: float = Field(1.0, ge=LEAST_TEMPERATURE, le=100)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(0.9, ge=0, le=1)
    greedy: bool = False
    add_BOS: bool = False
    repetition_penalty: Penalty = 1.0
    min_tokens_to_generate: int = Field(0, ge=0)
    end_strings: Annotated[list[str], AfterValidator(_checked_ends)] = [EOS_ALIAS]
    compute_logprob: bool = False
    logprob: bool = False
    random_seed: int | None = Field(None, ge=0, lt=2**63)
    all_probs: Literal[False] = False
    task_ids: None = None
    neighbors: None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> GenerateBody:
        _check_responses(len(self.sentences))
        return self

    def sampling(self, *, seed: int) -> SamplingParams:
        return SamplingParams(
            greedy=self.greedy,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens_to_generate,
            max_tokens=self.tokens_to_generate,
            end_strings=tuple(self.end_strings),
            seed=seed if self.random_seed is None else self.random_seed,
        )
