"""What handlers ask for reaches the drawing thread, and what they no longer want too."""

from __future__ import annotations

import asyncio
import time

import pytest

from nemo_aligner.engine.interfaces import GenerationRequest, Orders, Progress, Response
from nemo_aligner.servers.generation import desk
from nemo_aligner.servers.generation.desk import Closing, Failed, FrontDesk
from nemo_aligner.servers.generation.requests import RequestFault

REQUESTS = [GenerationRequest(0, sample, (1, 2)) for sample in range(3)]


def response(uid: int) -> Response:
    return Response(0, 0, [5], "x", [-1.0], [-1.0], "length", uid=uid)


def test_jobs_become_orders_once_and_what_is_cancelled_is_dropped() -> None:
    async def story() -> None:
        desk = FrontDesk(lambda: False)
        one, two = desk.submit(REQUESTS), desk.submit(REQUESTS[:1])
        assert len({*one.requests, *two.requests}) == 4
        orders = desk.orders(idle=True)
        assert orders is not None
        assert [request.uid for request in orders.new] == [*one.requests, *two.requests]
        assert desk.orders(idle=False) == Orders([], [])
        first, *others = one.requests
        desk.finished(response(first))
        await asyncio.sleep(0)
        desk.cancel(one)
        desk.cancel(one)
        assert desk.orders(idle=False) == Orders([], others)
        assert desk.unfinished == 1

    asyncio.run(story())


def test_a_job_hears_of_its_own_requests_alone_and_ends_with_the_last() -> None:
    async def story() -> None:
        desk = FrontDesk(lambda: False)
        mine, others = desk.submit(REQUESTS[:2]), desk.submit(REQUESTS[:1])
        a, b = mine.requests
        [c] = others.requests
        progress = Progress(b, [5], [-1.0], [])
        desk.drawn([progress])
        told = aiter(mine)
        assert await anext(told) == progress
        for uid in (c, b, a):
            desk.finished(response(uid))
        assert [event async for event in told] == [response(b), response(a)]
        assert desk.unfinished == 0

    asyncio.run(story())


def test_who_waits_when_the_desk_closes_is_told_and_nobody_comes_after() -> None:
    async def story() -> None:
        desk = FrontDesk(lambda: False)
        job = desk.submit(REQUESTS)
        desk.close()
        with pytest.raises(Closing):
            [event async for event in job]
        with pytest.raises(Closing):
            desk.submit(REQUESTS)

    asyncio.run(story())


def test_a_client_that_reads_slowly_is_kept_the_newest_of_each_response_alone() -> None:
    async def story() -> None:
        desk = FrontDesk(lambda: False)
        job = desk.submit(REQUESTS[:2])
        a, b = job.requests
        for n in range(1, 500):
            desk.drawn([Progress(uid, [5] * n, [-1.0] * n, []) for uid in (a, b)])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert job.untaken == 2
        told = aiter(job)
        assert await anext(told) == Progress(a, [5] * 499, [-1.0] * 499, [])
        desk.finished(response(b))
        desk.finished(response(a))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [event async for event in told] == [response(b), response(a)]

    asyncio.run(story())


def test_more_responses_than_there_is_room_for_are_refused_until_others_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        made = FrontDesk(lambda: False)
        monkeypatch.setattr(desk, "MOST_UNFINISHED", 4)
        first = made.submit(REQUESTS)
        with pytest.raises(RequestFault, match="more than 4 responses at once; send it again") as refused:
            made.submit(REQUESTS[:2])
        assert refused.value.status == 429
        made.submit(REQUESTS[:1])
        made.cancel(first)
        assert len(made.submit(REQUESTS).requests) == 3

    asyncio.run(story())


def test_a_job_of_which_one_fails_is_over_and_the_rest_of_it_is_dropped() -> None:
    async def story() -> None:
        desk = FrontDesk(lambda: False)
        job, other = desk.submit(REQUESTS), desk.submit(REQUESTS[:1])
        desk.orders(idle=False)
        first, second, third = job.requests
        desk.finished(response(first))
        desk.failed([second, third, 99])
        told = aiter(job)
        assert await anext(told) == response(first)
        with pytest.raises(Failed):
            await anext(told)
        assert desk.orders(idle=False) == Orders([], [second, third])
        assert desk.unfinished == len(other.requests)

    asyncio.run(story())


def test_the_desk_orders_an_end_when_it_is_told_to_stop() -> None:
    assert FrontDesk(lambda: True).orders(idle=True) is None


def test_only_an_idle_desk_waits_for_orders_and_no_longer_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        made = FrontDesk(lambda: False)
        monkeypatch.setattr(desk, "_IDLE_WAIT_S", 30.0)
        begin = time.monotonic()
        assert made.orders(idle=False) == Orders([], [])
        made.submit(REQUESTS)
        orders = made.orders(idle=True)
        assert orders is not None
        assert len(orders.new) == 3
        assert time.monotonic() - begin < 10
        monkeypatch.setattr(desk, "_IDLE_WAIT_S", 0.05)
        begin = time.monotonic()
        assert made.orders(idle=True) == Orders([], [])
        assert time.monotonic() - begin >= 0.05

    asyncio.run(story())


def test_progress_is_told_to_nobody_where_there_is_none() -> None:
    async def story() -> None:
        made = FrontDesk(lambda: False)
        made.drawn([Progress(1, [5], [-1.0], [])])
        made.finished(response(1))  # nobody asked yet
        job = made.submit(REQUESTS[:1])
        made.drawn([])
        made.drawn([Progress(99, [5], [-1.0], [])])
        made.finished(response(99))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert job.untaken == 0
        assert made.unfinished == 1

    asyncio.run(story())
