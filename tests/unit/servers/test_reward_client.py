"""The client asks again while a server is away, and gives up when it must: at the time-out, or when it is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemo_aligner.config.reinforce import RemoteRewardModelConfig, ServerAddress
from nemo_aligner.errors import ServerError
from nemo_aligner.servers import reward_client
from nemo_aligner.servers.reward_client import RewardClient
from nemo_aligner.servers.wire import SERVER_FAILED

Answer = Callable[[list[bytes]], list[float]]


class Clock:
    """Time that passes only while someone waits."""

    def __init__(self) -> None:
        self.now, self.pauses = 100.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Server:
    """What PyTriton's client meets: `answers` in turn, the last again and again; faults are raised."""

    def __init__(self, clock: Clock, *answers: Answer | Exception, takes: float = 0.0) -> None:
        self.answers, self.asked, self.closed = list(answers), list[list[bytes]](), 0
        self._clock, self._takes = clock, takes

    def infer_batch(self, sentences: np.ndarray) -> dict[str, np.ndarray]:
        assert sentences.shape[1:] == (1,)
        texts = sentences[:, 0].tolist()
        self.asked.append(texts)
        self._clock.now += self._takes
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return {"rewards": np.array([[reward] for reward in answer(texts)], dtype=np.float32)}

    def close(self) -> None:
        self.closed += 1


def lengths(texts: list[bytes]) -> list[float]:
    return [float(len(text)) for text in texts]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reward_client, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def client_of(server: Server | None, clock: Clock, *, timeout: float = 60.0, port: int = 1) -> RewardClient:
    address = ServerAddress(ip="127.0.0.1", port=port)
    made = RewardClient(RemoteRewardModelConfig(address, init_timeout_s=timeout, inference_timeout_s=timeout))
    made._closed = SimpleNamespace(wait=clock.wait, is_set=lambda: False, set=lambda: None)  # type: ignore[assignment]
    made._connection = lambda: server  # type: ignore[method-assign]
    return made


def test_rewards_come_in_the_order_of_the_texts_each_future_with_its_own(clock: Clock) -> None:
    client = client_of(Server(clock, lengths), clock)
    futures = [client.submit(["x" * n, "é"]) for n in range(20)]
    assert [future.result(10) for future in futures] == [[float(n), 2.0] for n in range(20)]
    client.close()


def test_a_server_that_comes_back_in_time_gives_the_rewards(clock: Clock) -> None:
    server = Server(clock, OSError("refused"), OSError("refused"), lengths)
    assert client_of(server, clock).submit(["ab"]).result(10) == [2.0]
    assert server.asked == [[b"ab"]] * 3


@pytest.mark.parametrize("timeout", [0.5, 10.0, 60.0])
def test_a_server_that_stays_away_is_given_up_at_the_time_out(clock: Clock, timeout: float) -> None:
    server = Server(clock, OSError("Connection refused"), takes=0.1)
    with pytest.raises(ServerError, match=r"no answer .* for \d+ s \(Connection refused\); .*inference_timeout_s"):
        client_of(server, clock, timeout=timeout).submit(["ab"]).result(10)
    waited = clock.now - 100.0
    assert timeout <= waited <= timeout + 5.1, "not before it, and at most one pause after it"
    mean = [0.25, 0.5, 1.0, 2.0, 4.0]  # it asks again at once, then less and less often, and not all clients together
    assert all(most / 2 <= pause <= most for pause, most in zip(clock.pauses, mean, strict=False))
    assert max(clock.pauses) <= 5.0


def saying(server: Server, *errors: str) -> Server:
    """The same server with an error for each of its first answers; empty: none."""
    plain, left = server.infer_batch, list(errors)

    def infer_batch(sentences: np.ndarray) -> dict[str, np.ndarray]:
        error = left.pop(0).encode() if left else b""
        return {**plain(sentences), "error": np.array([[b""]] * (len(sentences) - 1) + [[error]], dtype=object)}

    server.infer_batch = infer_batch  # type: ignore[method-assign]
    return server


def test_a_refused_text_is_not_asked_about_again(clock: Clock) -> None:
    server = saying(Server(clock, lengths), "sentences: row 1 has 9 bytes")
    with pytest.raises(ServerError, match=r"refused a text: sentences: row 1 has 9 bytes$"):
        client_of(server, clock).submit(["ab", "c"]).result(10)
    assert len(server.asked) == 1
    assert clock.pauses == []


def test_a_server_that_failed_is_asked_again(clock: Clock) -> None:
    server = saying(Server(clock, lengths), SERVER_FAILED, SERVER_FAILED)
    assert client_of(server, clock).submit(["ab", "c"]).result(10) == [2.0, 1.0]
    assert len(server.asked) == 3


def test_a_client_in_a_hurry_takes_an_answer_and_waits_for_none(clock: Clock) -> None:
    server = Server(clock, lengths, OSError("refused"))
    client = client_of(server, clock)
    client.hurry()
    assert client.submit(["ab"]).result(10) == [2.0]
    with pytest.raises(ServerError, match="no answer"):
        client.submit(["ab"]).result(10)
    assert (len(server.asked), clock.pauses) == (2, [])


def test_a_client_that_is_closed_asks_no_more(clock: Clock) -> None:
    server = Server(clock, OSError("refused"))
    client = client_of(server, clock)
    client._closed = SimpleNamespace(wait=clock.wait, is_set=lambda: True, set=lambda: None)  # type: ignore[assignment]
    with pytest.raises(ServerError):
        client.submit(["ab"]).result(10)
    assert len(server.asked) == 1


def test_a_broken_connection_is_closed_and_not_used_again(clock: Clock) -> None:
    client = RewardClient(RemoteRewardModelConfig(inference_timeout_s=60.0))
    client._closed = SimpleNamespace(wait=clock.wait, is_set=lambda: False, set=lambda: None)  # type: ignore[assignment]
    broken = Server(clock, OSError("reset"))
    client._local = SimpleNamespace(client=broken)  # type: ignore[assignment]
    working = Server(clock, lengths)
    connection = client._connection
    client._connection = lambda: connection() if hasattr(client._local, "client") else working  # type: ignore[method-assign]
    assert client.submit(["abc"]).result(10) == [3.0]
    assert (broken.closed, len(broken.asked)) == (1, 1)


def test_a_text_goes_out_as_it_is_to_its_last_byte(clock: Clock) -> None:
    server = Server(clock, lengths)
    assert client_of(server, clock).submit(["ab\0", "\0"]).result(10) == [3.0, 1.0]
    assert server.asked == [[b"ab\0", b"\0"]]


def test_a_server_that_is_away_is_told_of_at_once_and_then_every_ten_seconds(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(clock, OSError("refused"))
    with pytest.raises(ServerError):
        client_of(server, clock, timeout=60.0).submit(["ab"]).result(10)
    said = [record for record in caplog.records if "does not answer, asking again (refused)" in record.getMessage()]
    assert 5 <= len(said) <= 7
    assert len(server.asked) > 2 * len(said)


def test_a_fault_without_words_is_named_by_its_kind(clock: Clock) -> None:
    with pytest.raises(ServerError, match=r"\(TimeoutError\)"):
        client_of(Server(clock, TimeoutError()), clock, timeout=0.1).submit(["ab"]).result(10)


@pytest.mark.parametrize(("timeout", "each"), [(30.0, 30.0), (1800.0, 120.0)])
def test_every_thread_has_a_connection_of_its_own_that_waits_no_longer_than_the_client(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, timeout: float, each: float
) -> None:
    import pytriton.client

    made: list[tuple[Any, ...]] = []

    def connect(url: str, name: str, **options: Any) -> Server:
        made.append((threading.current_thread(), url, name, options))
        return Server(clock, lengths)

    monkeypatch.setattr(pytriton.client, "ModelClient", connect)
    address = ServerAddress(name="judge", ip="10.0.0.7", port=77)
    client = RewardClient(RemoteRewardModelConfig(address, inference_timeout_s=timeout))
    for _ in range(3):
        futures = [client.submit(["a"]) for _ in range(8)]
        assert all(future.result(10) == [1.0] for future in futures)
    threads = [thread for thread, *_ in made]
    assert len(set(threads)) == len(threads) <= 4
    options = {"lazy_init": True, "init_timeout_s": 5.0, "inference_timeout_s": each}
    assert all(found == ("http://10.0.0.7:77", "judge", options) for _, *rest in made for found in [tuple(rest)])
    client.close()


MODEL, CONFIG, INDEX = "/v2/models/reward_model", "/v2/models/reward_model/config", "/v2/repository/index"
SERVED: dict[str, Any] = {
    MODEL: {"inputs": [{"name": "tokens"}, {"name": "sentences"}], "outputs": [{"name": "rewards"}]},
    CONFIG: {"max_batch_size": 64},
}


@pytest.fixture
def ready() -> Iterator[tuple[int, list[int], list[str]]]:
    """A port that answers with each of the statuses in turn, the last again and again, and what it was asked."""
    statuses, paths = [200], list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in SERVED:
                return self.say(200, SERVED[self.path])
            if self.path != f"{MODEL}/ready":
                return self.say(404, None)
            paths.append(self.path)
            return self.say(statuses.pop(0) if len(statuses) > 1 else statuses[0], None)

        def do_POST(self) -> None:
            self.say(200 if self.path in SERVED else 404, SERVED.get(self.path))

        def say(self, status: int, body: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port, statuses, paths
    server.shutdown()
    thread.join()
    server.server_close()


def test_waiting_ends_when_the_model_is_ready(clock: Clock, ready: tuple[int, list[int], list[str]]) -> None:
    port, statuses, paths = ready
    statuses[:] = [404, 503, 200]
    client_of(None, clock, port=port).wait_until_ready()
    assert paths == ["/v2/models/reward_model/ready"] * 3
    assert clock.pauses == [1.0, 1.0]


def test_a_client_in_a_hurry_does_not_wait_for_a_server_that_is_there_but_not_ready(
    ready: tuple[int, list[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_client, "_CONNECT_TIMEOUT_S", 0.2)
    client = RewardClient(RemoteRewardModelConfig(ServerAddress(ip="127.0.0.1", port=ready[0])))
    client.hurry()
    with pytest.raises(ServerError, match=r"no answer from .* \(Waiting for server to be ready timed out\.\)"):
        client.submit(["ab"]).result(20)
    client.close()


def test_a_model_that_is_never_ready_is_named_with_the_keys_to_change(
    clock: Clock, ready: tuple[int, list[int], list[str]]
) -> None:
    port, statuses, _ = ready
    statuses[:] = [404]
    said = (
        rf"no reward server at http://127\.0\.0\.1:{port} after 3 s \(it serves no model 'reward_model' yet "
        r"\(HTTP status 404\)\); check remote_critic_rm\.reward_model\.ip .*remote_critic_rm\.init_timeout_s"
    )
    with pytest.raises(ServerError, match=said):
        client_of(None, clock, port=port, timeout=3.0).wait_until_ready()
    assert 3.0 <= clock.now - 100.0 <= 3.5


def test_waiting_is_told_of_at_once_and_then_every_ten_seconds(
    clock: Clock, ready: tuple[int, list[int], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    port, statuses, _ = ready
    statuses[:] = [404] * 25 + [200]
    client_of(None, clock, port=port).wait_until_ready()
    said = [record.getMessage() for record in caplog.records if "waiting for the reward server" in record.getMessage()]
    assert [text.partition("for ")[2].partition("for ")[2].partition(" so far")[0] for text in said] in (
        ["0 s", "10 s", "20 s"],
        ["0 s", "11 s", "22 s"],
    )


def test_where_nobody_listens_the_reason_is_said(clock: Clock) -> None:
    with pytest.raises(ServerError, match=r"after 1 s \(\[Errno \d+\] Connection refused\); check"):
        client_of(None, clock, timeout=1.0).wait_until_ready()


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (
            MODEL,
            {"inputs": [{"name": "text"}], "outputs": [{"name": "rewards"}]},
            r"has the inputs \['text'\], not sent",
        ),
        (MODEL, {"inputs": [{"name": "sentences"}], "outputs": []}, r"has the outputs \[\], not rewards; is remote_"),
        (MODEL, {"outputs": [{"name": "rewards"}]}, r"has the inputs \[\], not sentences; is remote_critic_rm"),
        (MODEL, {"inputs": [{}, {"name": "sentences"}]}, r"has the outputs \[\], not rewards"),
        (CONFIG, {"max_batch_size": 0}, r"takes no batches \(max_batch_size 0\)"),
        (CONFIG, {}, r"takes no batches \(max_batch_size 0\)"),
    ],
)
def test_a_model_that_will_never_do_is_refused_at_once(
    clock: Clock,
    ready: tuple[int, list[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: Any,
    says: str,
) -> None:
    monkeypatch.setitem(SERVED, path, body)
    with pytest.raises(ServerError, match=says):
        client_of(None, clock, port=ready[0]).wait_until_ready()
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("index", "waits"),
    [([{"name": "other"}], False), ([], True), ([{"name": "reward_model"}, {"name": "other"}], True), (None, True)],
)
def test_a_name_that_is_not_among_those_served_is_refused_and_one_that_may_come_is_waited_for(
    clock: Clock, ready: tuple[int, list[int], list[str]], monkeypatch: pytest.MonkeyPatch, index: Any, waits: bool
) -> None:
    port, statuses, _ = ready
    statuses[:] = [400, 200]
    if index is not None:
        monkeypatch.setitem(SERVED, INDEX, index)
    client = client_of(None, clock, port=port)
    if waits:
        client.wait_until_ready()
        return
    with pytest.raises(ServerError, match=r"serves other, not reward_model; give remote_critic_rm\.reward_model\.name"):
        client.wait_until_ready()
    assert clock.pauses == []


def test_a_server_that_is_ready_for_long_without_the_model_has_another_name_for_it(
    clock: Clock, ready: tuple[int, list[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, statuses, _ = ready
    statuses[:] = [400]  # of the model; the server itself is ready
    monkeypatch.setitem(SERVED, "/v2/health/ready", {})
    monkeypatch.delitem(SERVED, MODEL)
    with pytest.raises(ServerError, match=r"has been ready for 20 s without a model reward_model; give remote_critic"):
        client_of(None, clock, port=port, timeout=100.0).wait_until_ready()
    assert sum(clock.pauses) == pytest.approx(20.0)
    monkeypatch.delitem(SERVED, "/v2/health/ready")  # one that is not ready may still load it
    with pytest.raises(ServerError, match="after 100 s"):
        client_of(None, clock, port=port, timeout=100.0).wait_until_ready()


def test_another_number_of_rewards_is_refused_at_once(clock: Clock) -> None:
    server = Server(clock, lambda texts: [1.0])
    with pytest.raises(ServerError, match="1 rewards came back for 2 texts"):
        client_of(server, clock).submit(["a", "b"]).result(10)
    assert len(server.asked) == 1
