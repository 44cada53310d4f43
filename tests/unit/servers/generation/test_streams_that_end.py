"""A stream that nobody hears any more ends, and nothing more is drawn of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from nemo_aligner.servers.generation.clerk import Clerk, Served
from nemo_aligner.servers.generation.desk import FrontDesk
from tests.unit.servers.generation.test_clerk import CHAT, SEED, Client, WithBos, complete, drawn


@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_that_cannot_be_sent_is_drawn_no_more(count: int) -> None:
    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == count:
            raise TimeoutError

    async def talk() -> None:
        desk = FrontDesk(lambda: False)
        asked = complete(prompt="x", stream=True, echo=True, n=4, max_tokens=4)
        stream = await asked(Clerk(Served("tiny", WithBos(), 20, 258, CHAT, (), False, SEED), desk))
        assert desk.unfinished == 4
        with pytest.raises(TimeoutError):
            await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, Client().receive, send)
        assert desk.unfinished == 0

    sent: list[dict[str, Any]] = []
    asyncio.run(talk())


def test_a_stream_to_who_is_gone_ends_though_sending_takes_no_time() -> None:
    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def talk() -> None:
        desk = FrontDesk(lambda: False)
        stream = await complete(prompt="x", stream=True, n=1000, max_tokens=4)(
            Clerk(Served("tiny", WithBos(), 20, 258, CHAT, (), False, SEED), desk)
        )
        orders = desk.orders(idle=False)
        assert orders is not None
        desk._deliver([drawn(replace(request, streams=False, sample_index=0))[0] for request in orders.new])
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, Client(gone=True).receive, send)
        assert desk.unfinished == 0

    sent: list[dict[str, Any]] = []
    asyncio.run(talk())
    assert len(sent) < 100
