"""Between the actor and its reward server the network fails: rewards are those of a run without faults, or one line."""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from nemo_aligner.config.reinforce import RemoteRewardModelConfig, ServerAddress
from nemo_aligner.errors import ServerError
from nemo_aligner.ports import free_port
from nemo_aligner.servers import reward_client
from nemo_aligner.servers.doors import Door, Guard
from nemo_aligner.servers.reward_client import RewardClient
from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.fuzz.targets import ROUTES, app, asked
from tests.reward_stub import RewardStub, reward

TEXTS = [[f"text {batch}.{row} é" for row in range(batch % 4 + 1)] for batch in range(8)]
EXPECTED = [[reward(text) for text in texts] for texts in TEXTS]
ARCHIVE, OTHER = "a" * 64, "b" * 64
TOKEN = "s3cr3t" * 6
pytestmark = pytest.mark.filterwarnings("ignore:Client network")  # of PyTriton: a second is short

Proxied = Callable[[Callable[[str], str | None]], FaultyProxy]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says nothing is given up after a second, instead of two minutes."""
    monkeypatch.setattr(reward_client, "_REQUEST_TIMEOUT_S", 1.0)


@pytest.fixture
def stub() -> Iterator[RewardStub]:
    made = RewardStub(ARCHIVE)
    yield made
    made.close()


@pytest.fixture
def proxied(stub: RewardStub) -> Iterator[Proxied]:
    made: list[FaultyProxy] = []

    def before(fault: Callable[[str], str | None]) -> FaultyProxy:
        made.append(FaultyProxy(free_port(), stub.port, fault))
        made[-1].up()
        return made[-1]

    yield before
    for proxy in made:
        proxy.close()


def client_of(proxy: FaultyProxy, timeout: float = 60.0) -> RewardClient:
    address = ServerAddress(ip="127.0.0.1", port=proxy.port)
    return RewardClient(RemoteRewardModelConfig(address, init_timeout_s=timeout, inference_timeout_s=timeout))


def rewards(client: RewardClient) -> list[list[float]]:
    try:
        futures = [client.submit(texts) for texts in TEXTS]
        return [future.result(60) for future in futures]
    finally:
        client.close()


def every(count: int, *faults: str) -> Callable[[str], str | None]:
    """One request in `count` for a reward meets a fault, one after the other."""
    turn, numbers = itertools.cycle(faults), itertools.count(1)

    def fault(path: str) -> str | None:
        return next(turn) if path.endswith("/infer") and next(numbers) % count == 0 else None

    return fault


@pytest.mark.parametrize("fault", FAULTS)
def test_rewards_are_those_of_a_run_without_faults_whatever_the_network_does(
    fault: str, proxied: Proxied, quick: None
) -> None:
    proxy = proxied(every(3, fault))
    assert rewards(client_of(proxy)) == EXPECTED
    assert set(proxy.met) == {fault}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "slow"])  # a slow answer is one
def test_a_network_that_stays_so_is_given_up_in_time_in_one_line_with_host_port_and_keys(
    fault: str, proxied: Proxied, quick: None
) -> None:
    proxy = proxied(every(1, fault))
    client, begin = client_of(proxy, timeout=1.5), time.monotonic()
    said = (
        rf"no answer from the reward server at http://127\.0\.0\.1:{proxy.port} "
        r"\(remote_critic_rm\.reward_model\.ip and \.port\) for \d+ s \(.+\); start it again, or wait longer with "
        r"remote_critic_rm\.inference_timeout_s"
    )
    with pytest.raises(ServerError) as caught:
        client.submit(["a"]).result(60)
    client.close()
    assert re.fullmatch(said, str(caught.value))
    assert time.monotonic() - begin < 30
    assert len(proxy.met) <= 12, "less and less often"


def test_a_server_that_is_not_there_yet_and_goes_meanwhile_costs_time_and_no_reward(
    proxied: Proxied, quick: None
) -> None:
    proxy = proxied(lambda path: None)
    proxy.down()
    client = client_of(proxy)
    threading.Timer(1.0, proxy.up).start()
    client.wait_until_ready()
    assert client.submit(TEXTS[0]).result(60) == EXPECTED[0]
    proxy.down()
    futures = [client.submit(texts) for texts in TEXTS]
    time.sleep(0.5)
    proxy.up()
    assert [future.result(60) for future in futures] == EXPECTED
    client.close()


@pytest.mark.parametrize("fault", ["reset", "500", "garbage", "lies", "cut"])
def test_waiting_for_a_server_survives_the_same_faults(fault: str, proxied: Proxied) -> None:
    left = [fault] * 3
    proxy = proxied(lambda path: left.pop() if left else None)
    client = client_of(proxy, timeout=5.0)
    client.wait_until_ready()
    client.close()
    assert proxy.met == [fault] * 3


def test_a_reward_model_that_changed_during_a_run_is_noticed(proxied: Proxied, quick: None) -> None:
    proxy = proxied(lambda path: None)
    client = client_of(proxy)
    assert client.submit(TEXTS[0]).result(60) == EXPECTED[0]
    again = RewardStub(ARCHIVE)
    proxy.down()
    proxy.target = again.port  # restarted with the same
    proxy.up()
    other = RewardStub(OTHER)
    try:
        assert client.submit(TEXTS[1]).result(60) == EXPECTED[1]
        proxy.target = other.port
        proxy.down()
        proxy.up()
        futures = [client.submit(texts) for texts in TEXTS]
        said = (
            f"the reward server at http://127.0.0.1:{proxy.port} has another reward model than when the run began: "
            f"the archive with the sha256 {OTHER[:16]}, not {ARCHIVE[:16]}; serve that one again, or begin another run"
        )
        faults = [future.exception(60) for future in futures]
        assert {str(fault) for fault in faults} == {said}
    finally:
        client.close()
        again.close()
        other.close()


def test_memory_stays_flat_over_many_requests_of_every_kind() -> None:
    guarded = Guard(app(), [Door("127.0.0.1", 80, "port", token=TOKEN, max_bytes=1000)])
    bodies = [b"{", b'{"prompt": "a"}', b"x" * (1000 + 1)]

    async def ask(count: int) -> None:
        for number in range(count):
            headers = {"Authorization": f"Bearer {TOKEN if number % 5 else 'wrong'}"}
            await asked(guarded, *ROUTES[number % 3], bodies[number % len(bodies)], more=headers)

    async def grown() -> int:
        await ask(50)
        tracemalloc.start()
        await ask(50)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        await ask(150)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return after - before

    assert asyncio.run(grown()) < 20_000
