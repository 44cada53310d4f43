"""From a client's body to requests, and from what was drawn to its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import jinja2
from fastapi import Request
from fastapi.responses import StreamingResponse

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.jsonl import half_character
from nemo_aligner.data.prompts import with_bos
from nemo_aligner.engine.interfaces import GenerationRequest, Progress, Response, Tokenizer
from nemo_aligner.servers.generation import answers
from nemo_aligner.servers.generation.answers import Head, Json, Scored
from nemo_aligner.servers.generation.desk import Failed, FrontDesk, Job
from nemo_aligner.servers.generation.requests import ChatBody, CompletionBody, GenerateBody, RequestFault
from nemo_aligner.servers.generation.streaming import EventStream, StreamedChoice, event_of

log = logging.getLogger(__name__)


@dataclass
class Served:
    """The model as clients meet it."""

    name: str
    tokenizer: Tokenizer
    max_length: int
    vocab_size: int
    chat_template: ChatTemplate | None
    end_strings: Sequence[str]  # of OpenAI's forms, besides a request's own `stop`
    add_bos: bool  # in OpenAI's forms; PUT /generate says it itself
    seed: int
    created: int = field(default_factory=lambda: int(time.time()))


class Clerk:
    """Turns bodies into requests, and what was drawn into answers.

    What may take long is done on threads of its own: whoever else is answered would wait for it.
    """

    def __init__(self, served: Served, desk: FrontDesk) -> None:
        self._served, self._desk, self._tokenizer = served, desk, served.tokenizer
        self._unseeded = itertools.count()  # tells requests without a seed from one another

    def model(self) -> Json:
        served = self._served
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "nemo_aligner"}

    def check_model(self, name: str | None) -> None:
        if name not in (None, self._served.name):
            raise RequestFault(
                f"The model {name!r} does not exist; this server has {self._served.name!r}",
                "model", "model_not_found", 404,
            )  # fmt: skip

    async def complete(self, body: CompletionBody, request: Request) -> Json | StreamingResponse:
        self.check_model(body.model)
        prompts = await asyncio.to_thread(self._read, body.prompts(), self._served.add_bos)
        params = body.sampling(
            seed=self._served.seed,
            end_strings=self._served.end_strings,
            max_tokens=max(1, body.max_tokens),  # of a prompt that is only scored, a token is drawn and left out
            top_logprobs=body.logprobs or 0,
        )
        tokens = [ids for _, ids in prompts]
        requests = self._requests(
            tokens, params, body.n, seed=body.seed, asked=body.max_tokens, streams=body.stream,
            scores_prompt=body.echo and body.logprobs is not None,
        )  # fmt: skip
        job = self._desk.submit(requests)
        head = Head("text_completion", self._served.name)

        def logprobs(scored: Scored, offset: int) -> Json | None:
            return None if body.logprobs is None else answers.completion_logprobs(self._tokenizer, scored, offset)

        if body.stream:

            def choice(index: int, text: str, scored: Scored, reason: str | None, begins: int) -> Json:
                return {"index": index, "text": text, "logprobs": logprobs(scored, begins), "finish_reason": reason}

            opening = [
                choice(i, prompts[i // body.n][0], Scored([], [], []), None, 0) for i in range(len(prompts) * body.n)
            ]
            return self._stream(job, head, choice, opening if body.echo else [], body, tokens)

        def whole(index: int, response: Response) -> Json:
            text, ids = prompts[index // body.n]
            told = text if body.echo else ""
            return {
                "index": index,
                "text": told + response.text,
                "logprobs": logprobs(answers.with_prompt(ids, response), 0),
                "finish_reason": response.finish_reason,
            }

        responses = await self._all(job, request)
        return await asyncio.to_thread(
            head.with_choices,
            itertools.starmap(whole, enumerate(responses)),
            answers.usage(tokens, [response.tokens for response in responses]),
        )

    async def chat(self, body: ChatBody, request: Request) -> Json | StreamingResponse:
        self.check_model(body.model)
        if self._served.chat_template is None:
            raise RequestFault("the model has no chat template; start the server with chat_template=...", "messages")
        try:
            messages = [message.plain() for message in body.messages]
            text = self._served.chat_template.render(messages, generation_prompt=True)
        except jinja2.TemplateError as fault:
            raise RequestFault(f"the chat template refuses the conversation: {fault}", "messages") from None
        tokens = await asyncio.to_thread(self._encode, text, self._served.add_bos)
        params = body.sampling(
            seed=self._served.seed,
            end_strings=self._served.end_strings,
            max_tokens=body.limit or self._served.max_length,
            top_logprobs=body.top_logprobs,
        )
        requests = self._requests(
            [tokens], params, body.n, seed=body.seed, asked=body.limit, streams=body.stream, param="messages"
        )
        job = self._desk.submit(requests)

        def logprobs(scored: Scored) -> Json | None:
            return answers.chat_logprobs(self._tokenizer, scored) if body.logprobs else None

        if body.stream:

            def choice(index: int, text: str, scored: Scored, reason: str | None, begins: int) -> Json:
                delta = {"content": text} if text else {}
                return {"index": index, "delta": delta, "logprobs": logprobs(scored), "finish_reason": reason}

            role = {"role": "assistant", "content": ""}
            opening = [{"index": i, "delta": role, "logprobs": None, "finish_reason": None} for i in range(body.n)]
            return self._stream(job, Head("chat.completion.chunk", self._served.name), choice, opening, body, [tokens])

        def whole(index: int, response: Response) -> Json:
            return {
                "index": index,
                "message": {"role": "assistant", "content": response.text, "refusal": None},
                "logprobs": logprobs(answers.scored(response, tokens)),
                "finish_reason": response.finish_reason,
            }

        responses = await self._all(job, request)
        return await asyncio.to_thread(
            Head("chat.completion", self._served.name).with_choices,
            itertools.starmap(whole, enumerate(responses)),
            answers.usage([tokens], [response.tokens for response in responses]),
        )

    async def generate(self, body: GenerateBody, request: Request) -> Json:
        prompts = await asyncio.to_thread(self._read, body.sentences, body.add_BOS)
        params, scored = body.sampling(seed=self._served.seed), body.compute_logprob or body.logprob
        tokens = [ids for _, ids in prompts]
        requests = self._requests(
            tokens,
            params,
            seed=body.random_seed,
            asked=body.tokens_to_generate,
            scores_prompt=scored,
            param="sentences",
        )
        responses = await self._all(self._desk.submit(requests), request)
        return await asyncio.to_thread(answers.nemo_answer, self._tokenizer, prompts, responses, scored)

    def _read(self, prompts: Sequence[str | list[int]], add_bos: bool) -> list[tuple[str, tuple[int, ...]]]:
        """The text and the tokens of each."""
        return [(one, self._encode(one, add_bos)) if isinstance(one, str) else self._of_ids(one) for one in prompts]

    def _encode(self, text: str, add_bos: bool) -> tuple[int, ...]:
        half = half_character(text)
        if half is not None:
            raise RequestFault(f"the prompt holds {half}, one half of a character", "prompt")
        ids = self._tokenizer.encode(text)
        ids = with_bos(ids, self._tokenizer.bos_id if add_bos else None)
        if not ids:
            raise RequestFault("the prompt is empty, there is nothing to go on from", "prompt")
        return tuple(ids)

    def _of_ids(self, ids: list[int]) -> tuple[str, tuple[int, ...]]:
        for token in ids:
            if not 0 <= token < self._served.vocab_size:
                raise RequestFault(f"{token} is not a token id, 0 to {self._served.vocab_size - 1}", "prompt")
        return self._tokenizer.decode(ids), tuple(ids)

    def _requests(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams,
        n: int = 1,
        *,
        seed: int | None,
        asked: int | None,
        param: str = "prompt",
        **more: bool,
    ) -> list[GenerationRequest]:
        """n responses to each prompt. Raises RequestFault where prompt and the `asked` tokens exceed the context,
        or where as many as there is room for are wanted and there is none.

        With a seed the noise depends on the prompt's place in the request alone, without one on a count of prompts.
        """
        limit = self._served.max_length
        found = []
        for place, tokens in enumerate(prompts):
            if len(tokens) + (1 if asked is None else asked) > limit:
                raise RequestFault(
                    f"This model's maximum context length is {limit} tokens; the prompt has {len(tokens)}, and "
                    f"{'some' if asked is None else asked} more were asked for",
                    param, "context_length_exceeded",
                )  # fmt: skip
            index = next(self._unseeded) if seed is None else place
            request = GenerationRequest(index, 0, tokens, max_tokens=0 if asked == 0 else None, sampling=params, **more)
            found += [dataclasses.replace(request, sample_index=sample) for sample in range(n)]
        return found

    async def _all(self, job: Job, request: Request) -> list[Response]:
        """Every response of a job in the order of its requests; the job is dropped when the client goes away."""
        gone = asyncio.create_task(_until_gone(request))
        done = asyncio.create_task(_collected(job))
        try:
            await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise RequestFault("the client went away", status=499)
            return done.result()
        finally:
            gone.cancel()
            done.cancel()
            self._desk.cancel(job)

    def _stream(
        self,
        job: Job,
        head: Head,
        choice: Callable[[int, str, Scored, str | None, int], Json],
        opening: Sequence[Json],
        body: CompletionBody | ChatBody,
        prompts: Sequence[Sequence[int]],
    ) -> StreamingResponse:
        """Server-sent events: a piece of text each, and at the end the usage where it is asked for, and [DONE]."""

        async def events() -> AsyncGenerator[str, None]:
            texts = {uid: StreamedChoice(i, self._tokenizer, r) for i, (uid, r) in enumerate(job.requests.items())}
            drawn: list[Sequence[int]] = []
            try:
                for one in opening:
                    yield event_of(head.with_choices([one]))
                async for event in _events(job):
                    piece = texts[event.uid].piece(event)
                    if isinstance(event, Response):
                        drawn.append(event.tokens)
                    if piece is not None:
                        yield event_of(head.with_choices([choice(*piece)]))
                        await asyncio.sleep(0)  # to a client that is gone sending takes no time: others may go on
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield event_of(head.with_choices([], answers.usage(prompts, drawn)))
                yield "data: [DONE]\n\n"
            except RequestFault as fault:
                yield event_of({"error": fault.error()})
            except Exception:
                log.exception("a stream fails")
                yield event_of({"error": Failed().error()})
            finally:
                self._desk.cancel(job)

        return EventStream(events(), lambda: self._desk.cancel(job))


async def _events(job: Job) -> AsyncIterator[Progress | Response]:
    """What comes of a job; of a prompt that is only scored without the token that was drawn."""
    nothing: Json = {"tokens": [], "text": "", "logprobs": [], "sampling_logprobs": [], "top_logprobs": []}
    async for event in job:
        if job.requests[event.uid].max_tokens != 0:
            yield event
        elif isinstance(event, Response):
            yield dataclasses.replace(event, finish_reason="length", **nothing)


async def _collected(job: Job) -> list[Response]:
    found = {event.uid: event async for event in _events(job) if isinstance(event, Response)}
    return [found[uid] for uid in job.requests]


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
