"""The reward server with a token: who has none is refused, and what is too large, and Triton answers the gate alone."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.reinforce import RemoteRewardModelConfig, ServerAddress
from nemo_aligner.errors import ServerError
from nemo_aligner.ports import free_port
from nemo_aligner.servers.reward_client import RewardClient
from tests.functional.conftest import Workshop
from tests.functional.test_reinforce import serving

TOKEN = "c0ffee" * 8
TEXTS = ["a good film", "a bad one"]


@pytest.fixture(scope="module")
def guarded(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path, int]]:
    """Port, log and process of a server that wants a token, and takes 8 MB at once."""
    folder, port = tmp_path_factory.mktemp("guarded"), free_port()
    (folder / "token").write_text(f"{TOKEN}\n")
    own = (f"inference.auth_token_file={folder / 'token'}", "inference.max_request_bytes=8000000")
    with serving(workshop, port, folder / "log", *own) as process:
        yield port, folder / "log", process.pid


def sent(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Status and answer of a request as curl would send it."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as fault:
        return fault.code, json.loads(fault.read() or b"null")


def inputs(*texts: str) -> bytes:
    return json.dumps(
        {"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}]}
    ).encode()


def client(port: int, token: str | None) -> RewardClient:
    return RewardClient(RemoteRewardModelConfig(ServerAddress(port=port), init_timeout_s=5), token)


INFER = "v2/models/reward_model/infer"


@pytest.mark.parametrize("wrong", [{}, {"Authorization": "Bearer " + TOKEN[:-1]}, {"Authorization": f"Basic {TOKEN}"}])
def test_who_has_no_token_gets_no_reward_and_no_word_about_the_model(
    guarded: tuple[int, Path, int], wrong: dict[str, str]
) -> None:
    port, log, _ = guarded
    paths = (
        INFER,
        "v2/models/reward_model/config",
        "v2",
        "v2/repository/index",
        "v2/logging",
        "v2//models/reward_model",
    )
    for path in paths:
        assert sent(port, path, inputs(*TEXTS), **wrong) == (401, {"error": "bearer token needed"})
    assert sent(port, "v2/health/ready")[0] == 200, "whoever looks after it needs no token"
    assert TOKEN not in log.read_text()


def test_who_has_it_gets_rewards_by_the_actors_client_and_by_any_other(guarded: tuple[int, Path, int]) -> None:
    port, *_ = guarded
    own = client(port, TOKEN)
    own.wait_until_ready()
    rewards = own.submit(TEXTS).result(60)
    own.close()
    status, answer = sent(port, INFER, inputs(*TEXTS), Authorization=f"Bearer {TOKEN}")
    assert status == 200
    assert next(out["data"] for out in answer["outputs"] if out["name"] == "rewards") == pytest.approx(rewards)


@pytest.mark.parametrize(("token", "wants"), [(None, "a token"), ("x" * 48, "another token than this one")])
def test_the_actor_is_told_at_once_which_key_gives_the_token(
    guarded: tuple[int, Path, int], token: str | None, wants: str
) -> None:
    told = rf"^the server at http://localhost:{guarded[0]} wants {wants}; give remote_critic_rm\.auth_token_file$"
    with pytest.raises(ServerError, match=told):
        client(guarded[0], token).wait_until_ready()


def test_a_request_over_the_bound_is_refused_and_the_server_lives(guarded: tuple[int, Path, int]) -> None:
    port, *_ = guarded
    right = {"Authorization": f"Bearer {TOKEN}"}
    large = inputs("x" * 7_900_000)  # of what ends Triton by itself, where it has not the room
    assert sent(port, INFER, large, **right)[0] == 200
    assert sent(port, INFER, inputs("x" * 8_000_000), **right) == (413, {"error": "more than 8000000 bytes"})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", f"/{INFER}", iter([b"x" * 999_999] * 9), right, encode_chunked=True)
    assert connection.getresponse().status == 413, "also where it does not say its length"
    own = client(port, TOKEN)
    with pytest.raises(ServerError, match=r"refused a text: more than 8000000 bytes in one request$"):
        own.submit(["x" * 900_000] * 10).result(60)
    own.close()
    assert sent(port, INFER, inputs(*TEXTS), **right)[0] == 200


def test_triton_itself_answers_nobody_else(guarded: tuple[int, Path, int]) -> None:
    outer, _, pid = guarded
    inner = inner_port(pid)
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == "0A"}
    assert {f"0100007F:{port:04X}" for port in (outer, inner)} <= listening, "on 127.0.0.1, unless told"
    for path in ("v2", INFER, "v2/models/reward_model"):
        status, answer = sent(inner, path, inputs(*TEXTS) if path == INFER else None)
        assert (status, answer["error"][:22]) == (403, "This API is restricted")


def inner_port(pid: int) -> int:
    """Where the Triton that a process started listens."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found = re.search(r"--http-port (\d+)", Path(f"/proc/{child}/cmdline").read_text().replace("\0", " "))
            if found:
                return int(found.group(1))
    raise AssertionError("no Triton")
