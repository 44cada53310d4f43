"""Reward server and actor as users run them: the guide's commands, other people's clients, and kills."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_aligner.checksums import file_sum
from nemo_aligner.config.reinforce import RemoteRewardModelConfig, ServerAddress
from nemo_aligner.errors import ServerError
from nemo_aligner.ports import free_port
from nemo_aligner.servers import reward_client
from nemo_aligner.servers.reward_client import RewardClient
from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.functional.conftest import ENV, ROOT, Workshop, run

DOCUMENT = ROOT / "tests" / "data" / "mission" / "reinforce.rst"
SERVER, ACTOR, HETJOB = range(3)
SIZES = {
    r"trainer\.num_nodes=8": "trainer.num_nodes=1",
    r"trainer\.devices=8": "trainer.devices=1 trainer.precision=32",
    r"tensor_model_parallel_size=4": "tensor_model_parallel_size=1",
    r"max_steps=313": "max_steps=2",
    r"val_check_interval=4": "val_check_interval=1",
    r"num_rollout_per_prompt=4": "num_rollout_per_prompt=4 model.ppo.length_params.max_length=6 "
    "remote_critic_rm.init_timeout_s=120",
}


def block(index: int) -> str:
    """A bash block of the guide, with small sizes."""
    found = re.findall(r"\.\. code-block:: bash *\n\n((?:(?: {3}.*)?\n)+)", DOCUMENT.read_text())
    text = re.sub(r"(?m)^ {3}", "", found[index])
    for pattern, small in SIZES.items():
        text = re.sub(pattern, small, text)
    return text


def variables(shop: Workshop, folder: Path, port: int) -> dict[str, str]:
    """What the guide's blocks read from their surroundings, a few of which it never sets."""
    return {
        "GPFS": str(ROOT),
        "NEMO_RLHF_DIR": str(ROOT),
        "CRITIC_CONFIG_PATH": f"{ROOT}/examples/nlp/gpt/conf",
        "CRITIC_CONFIG_NAME": "inference_rm",
        "CONF_DIR": f"{ROOT}/examples/nlp/gpt/conf",
        "CONFIG_NAME": "gpt_rs_actor",
        "RM_NEMO_FILE": str(shop.path("reward_model.nemo")),
        "ACTOR_NEMO_FILE": str(shop.path("sft_model.nemo")),
        "TRAIN_DATA_PATH": str(shop.path("prompts_dataset.jsonl")),
        "VALID_DATA_PATH": str(shop.path("prompts_dataset.jsonl")),
        "ACTOR_LOG_DIR": str(folder / "actor_results"),
        "CRITIC_PORT": str(port),
        "host_critic": "localhost",
        "ACTOR_LR": "1e-6",
        "ACTOR_GBS": "16",
        "NUM_ROLLOUTS": "4",
    }


def without_own_paths(text: str, names: dict[str, str]) -> str:
    """The block without its assignments of made-up paths, so that ours from the surroundings hold."""
    return re.sub(rf"(?m)^({'|'.join(names)})=.*\n", "", text)


@contextmanager
def serving(shop: Workshop, port: int, log: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A reward server, ready; stopped at the end."""
    command = (
        "python", "examples/nlp/gpt/serve_reward_model.py", f"rm_model_file={shop.path('reward_model.nemo')}",
        f"inference.port={port}", "trainer.precision=32", *more,
    )  # fmt: skip
    with log.open("ab") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=stream, stderr=stream, start_new_session=True)
    try:
        wait_until_ready(process, port, log)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2)
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"not ready after a minute: {log.read_text()}")


@pytest.fixture(scope="module")
def server(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with serving(workshop, port, tmp_path_factory.mktemp("server") / "log"):
        yield port


def ask(port: int, *inputs: dict[str, Any]) -> dict[str, list[float]]:
    """Plain JSON over HTTP, as curl would send it. Raises HTTPError with the server's words."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/reward_model/infer", json.dumps({"inputs": inputs}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return {output["name"]: output["data"] for output in json.load(reply)["outputs"]}


def texts(*values: str) -> dict[str, Any]:
    return {"name": "sentences", "datatype": "BYTES", "shape": [len(values), 1], "data": list(values)}


def tokens(rows: list[list[int]], lengths: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    flat = [token for row in rows for token in row]
    return (
        {"name": "tokens", "datatype": "INT64", "shape": [len(rows), len(rows[0])], "data": flat},
        {"name": "sequence_lengths", "datatype": "INT64", "shape": [len(rows), 1], "data": lengths},
    )


def test_the_copy_is_the_users_document() -> None:
    original = ROOT.parent / "shared" / "mission" / "reinforce.rst"
    if not original.exists():
        pytest.skip("the users' document is not beside this checkout")
    assert DOCUMENT.read_text() == original.read_text()


def test_strange_clients_get_the_labelers_rewards(workshop: Workshop, server: int, tmp_path: Path) -> None:
    samples = workshop.rows("generated_samples.jsonl")
    run(
        "python", "examples/nlp/gpt/offline/launch_reward_labeler.py",
        f"gpt_model_file={workshop.path('reward_model.nemo')}", f"output_file={tmp_path}/labeled.jsonl",
        f"data.file_names=[{workshop.path('generated_samples.jsonl')}]", "trainer.precision=32", "processor=null",
    )  # fmt: skip
    wanted = [row["reward"] for row in Workshop(tmp_path).rows("labeled.jsonl")]
    whole = [sample["input"] + sample["output"] for sample in samples]
    assert np.float32(ask(server, texts(*whole))["rewards"]).tolist() == wanted, "to the last digit"
    rows = [list(text.encode()) for text in whole]  # the tiny model has one token a byte
    width = max(map(len, rows)) + 3
    as_tokens = tokens([row + [0] * (width - len(row)) for row in rows], [len(row) for row in rows])
    found = ask(server, *as_tokens)
    assert found["rewards"] != pytest.approx([0.0] * len(wanted))
    client_rewards = tritonclient_rewards(server, whole)
    assert client_rewards == wanted


def tritonclient_rewards(port: int, whole: list[str]) -> list[float]:
    import tritonclient.http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    sentences = triton.InferInput("sentences", [len(whole), 1], "BYTES")
    sentences.set_data_from_numpy(np.array([[text.encode()] for text in whole], dtype=object))
    return client.infer("reward_model", [sentences]).as_numpy("rewards")[:, 0].tolist()


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ([{"name": "tokens", "datatype": "INT32", "shape": [1, 1], "data": [1]}], "tokens"),
        ([], "input"),
    ],
)
def test_a_malformed_request_is_refused_by_name_and_the_server_goes_on(
    server: int, inputs: list[dict[str, Any]], named: str
) -> None:
    before = ask(server, texts("a film"))["rewards"]
    with pytest.raises(urllib.error.HTTPError) as fault:
        ask(server, *inputs)
    assert named in fault.value.read().decode()
    assert ask(server, texts("a film"))["rewards"] == before


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([{"name": "sentences", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}], "sentences: shape [1, 2]"),
        ([*tokens([[1, 2]], [3])], "sequence_lengths: row 0 says 3"),
        ([*tokens([[1, 259]], [2])], "tokens: row 0 has id 259"),
        ([texts("")], "sentences: row 0 is empty"),
        ([texts("a" * (1 << 20) + "b")], "sentences: row 0 has 1048577 bytes"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why_in_one_line(server: int, inputs: list[dict[str, Any]], said: str) -> None:
    found: dict[str, Any] = ask(server, *inputs)
    assert found["error"][0].startswith(said)
    assert "\n" not in found["error"][0]
    assert "/" not in found["error"][0], "no path"
    assert found["exceeded"] == [-1]
    assert ask(server, texts("a film"))["error"] == [""]


def test_invalid_utf8_is_refused_by_name(server: int) -> None:
    import tritonclient.http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{server}")
    sentences = triton.InferInput("sentences", [1, 1], "BYTES")
    sentences.set_data_from_numpy(np.array([[b"\xff\xfe"]], dtype=object))
    found = client.infer("reward_model", [sentences])
    assert found.as_numpy("error").tolist() == [[b"sentences: row 0 is not valid UTF-8 (byte 0)"]]
    assert np.isnan(found.as_numpy("rewards")).all()


def test_a_text_beyond_the_context_is_flagged(server: int) -> None:
    found = ask(server, texts("a" * 511, "a" * 600))
    assert found["exceeded"] == [0, 1]


def rewards_or_words(port: int, request: list[str]) -> list[float] | str:
    """The rewards, or what the server said instead, three times over: a server under load may be asked again."""
    said = ""
    for _ in range(3):
        try:
            return ask(port, texts(*request))["rewards"]
        except urllib.error.HTTPError as fault:
            said = fault.read().decode()
    return said


def test_many_clients_at_once_each_get_their_own_rewards(server: int) -> None:
    requests = [[f"film {i}", f"review {i} of {i}"][: 1 + i % 2] for i in range(100)]
    alone = [ask(server, texts(*request))["rewards"] for request in requests]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda i: rewards_or_words(server, requests[i % 100]), range(2000)))
    for i, found in enumerate(together):
        assert found == pytest.approx(alone[i % 100], abs=1e-5)


def actor(shop: Workshop, folder: Path, port: int, *more: str) -> tuple[str, ...]:
    prompts = shop.path("prompts_dataset.jsonl")
    return (
        "python", "examples/nlp/gpt/train_gpt_reinforce_actor.py",
        f"model.data.data_prefix={{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
        f"pretrained_checkpoint.restore_from_path={shop.path('sft_model.nemo')}", "trainer.precision=32",
        f"exp_manager.explicit_log_dir={folder}", f"remote_critic_rm.reward_model.port={port}",
        "model.ppo.num_rollout_samples=2", "model.ppo.rollout_micro_batch_size=2", "model.global_batch_size=4",
        "model.ppo.length_params.max_length=6", "model.optim.lr=1e-3", "~model.optim.sched",
        "trainer.ppo.save_interval=1", "trainer.ppo.val_check_interval=2", *more,
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    """Everything logged but how long things took."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if not any(key.startswith("timers/") for key in row)]


def test_the_guides_server_and_actor_commands(workshop: Workshop, tmp_path: Path) -> None:
    port = free_port()
    names = variables(workshop, tmp_path, port)
    process = subprocess.Popen(
        ["bash", "-c", without_own_paths(block(SERVER), names)], cwd=ROOT, env={**ENV, **names}, start_new_session=True
    )
    try:
        run("bash", "-e", "-c", without_own_paths(block(ACTOR), names), **names)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    assert (tmp_path / "actor_results/checkpoints/megatron_gpt_rs_actor.nemo").stat().st_size > 10_000
    optimizer = [row["train_optim/lr"] for row in metrics(tmp_path / "actor_results") if "train_optim/lr" in row]
    assert len(optimizer) == 2  # 6 prompts: 4 and 2, of 4 responses each
    assert optimizer[0] == pytest.approx(1.001e-6, rel=1e-9), "the product on the command line"
    assert 1e-6 <= optimizer[1] < optimizer[0]


def test_the_guides_hetjob_runs_both_commands_through_srun(workshop: Workshop, tmp_path: Path) -> None:
    """Its text as printed; srun and scontrol are stood in for by functions that run the commands here."""
    names = variables(workshop, tmp_path, free_port())
    script = without_own_paths(block(HETJOB), {**names, "RESULTS_DIR": "", "CONTAINER": ""})
    script = script.replace("sleep 30", "sleep 0").replace("MOUNTS=", "#MOUNTS=")
    stand_ins = f"""
        scontrol() {{ echo localhost; }}
        srun() {{
          local command="${{@: -1}}"
          case $1 in
            --het-group=0) setsid bash -c "$command" >{tmp_path}/server.log 2>&1 &
              echo $! >{tmp_path}/server.pid; wait ;;
            --het-group=1) bash -c "$command" >{tmp_path}/actor.log 2>&1; kill -- -$(<{tmp_path}/server.pid) ;;
          esac
        }}
    """
    run("bash", "-c", stand_ins + script, RESULTS_DIR=str(tmp_path), CONTAINER="none", **names)
    said = "".join((tmp_path / name).read_text() for name in ("server.log", "actor.log"))
    assert (tmp_path / "actor_results/checkpoints/megatron_gpt_rs_actor.nemo").exists(), said


def test_an_actor_killed_at_any_step_ends_as_if_it_had_not_been(
    workshop: Workshop, server: int, tmp_path: Path
) -> None:
    aids = ("trainer.ppo.kl_target=0.001", "trainer.ppo.kl_horizon=8", "trainer.ppo.whiten_rewards=True")
    run(*actor(workshop, tmp_path / "whole", server, *aids))
    background = "exp_manager.checkpoint_callback_params.async_save=True"
    command = actor(workshop, tmp_path / "killed", server, background, *aids)
    for steps in (1, 2):
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while (
            process.poll() is None
            and sum("train_rollouts/rewards" in row for row in metrics(tmp_path / "killed")) < steps
        ):
            time.sleep(0.02)
        process.kill()
        process.wait()
    run(*command)
    penalty = "train_rollouts/initial_policy_kl_penalty"
    assert len({row[penalty] for row in metrics(tmp_path / "whole") if penalty in row}) > 1
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_server_killed_and_started_again_changes_nothing(workshop: Workshop, server: int, tmp_path: Path) -> None:
    run(*actor(workshop, tmp_path / "whole", server))
    port = free_port()
    log = tmp_path / "server.log"
    with serving(workshop, port, log) as first:
        process = subprocess.Popen(
            actor(workshop, tmp_path / "other", port), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not metrics(tmp_path / "other"):
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    with serving(workshop, port, log):
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert metrics(tmp_path / "other") == metrics(tmp_path / "whole")


def test_a_server_that_is_not_there_is_named_with_the_keys_to_change(workshop: Workshop, tmp_path: Path) -> None:
    port = free_port()
    done = run(*actor(workshop, tmp_path, port, "remote_critic_rm.init_timeout_s=1"), check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: no reward server at http://localhost:{port}")
    for key in ("remote_critic_rm.reward_model.ip", "reward_model.port", "remote_critic_rm.init_timeout_s"):
        assert key in last


def test_one_response_per_prompt_is_refused_for_rloo_and_taken_for_remax(
    workshop: Workshop, server: int, tmp_path: Path
) -> None:
    one = ("model.ppo.num_rollout_per_prompt=1", "trainer.ppo.max_steps=1")
    done = run(*actor(workshop, tmp_path, server, *one), check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: model.ppo.num_rollout_per_prompt: RLOO")
    run(*actor(workshop, tmp_path, server, *one, "trainer.ppo.baseline=ReMax", "trainer.devices=2"))


def test_the_names_of_nemo_aligner_0_7_are_taken(workshop: Workshop, server: int, tmp_path: Path) -> None:
    command = [part for part in actor(workshop, tmp_path, server) if not part.startswith("remote_critic_rm")]
    renamed = [
        part.replace("trainer.ppo.", "trainer.reinforce.").replace("model.ppo.", "model.reinforce.") for part in command
    ]
    done = run(
        *renamed[:2], "--config-name=gpt_reinforce_actor", *renamed[2:], f"remote_rm.reward_model.port={server}",
        "trainer.reinforce.max_steps=1", "trainer.reinforce.num_rollouts_per_prompt=3",
    )  # fmt: skip
    assert "trainer.reinforce is taken as trainer.ppo" in done.stdout
    rollouts = [row for row in metrics(tmp_path) if "train_rollouts/rollout_size" in row]
    assert [row["train_rollouts/rollout_size"] for row in rollouts] == [6]
    assert (tmp_path / "checkpoints/megatron_gpt_reinforce_actor.nemo").exists()


def test_the_server_leaves_cleanly_on_sigterm_and_says_when_its_port_is_taken(
    workshop: Workshop, server: int, tmp_path: Path
) -> None:
    port = free_port()
    with serving(workshop, port, tmp_path / "log", "trainer.devices=2") as process:
        whole = [f"{word} film" * i for i, word in enumerate(("a", "good", "bad", "no", "the"), 1)]
        found = ask(port, texts(*whole))["rewards"]  # two ranks share the work
        alone = [ask(server, texts(text))["rewards"][0] for text in whole]
        assert found == alone
        assert len({round(reward, 4) for reward in alone}) == 5, "a reward in another's place would be seen"
        process.terminate()
        assert process.wait(60) == 0
    taken = run(
        "python", "examples/nlp/gpt/serve_reward_model.py", f"rm_model_file={workshop.path('reward_model.nemo')}",
        f"inference.port={server}", check=False,
    )  # fmt: skip
    assert taken.returncode == 1
    assert f"inference.port={server}: Address already in use" in taken.stderr.strip().splitlines()[-1]


def test_the_actor_learns_from_a_server_of_ones_own(workshop: Workshop, tmp_path: Path) -> None:
    script = "examples/nlp/gpt/reward_server_of_your_own.py"
    own: dict[str, Any] = runpy.run_path(str(ROOT / script))
    port = free_port()
    process = subprocess.Popen([sys.executable, script, str(port)], cwd=ROOT)
    try:
        wait_until_ready(process, port, tmp_path)
        run(*actor(workshop, tmp_path / "actor", port, "trainer.ppo.max_steps=1"))
        wrong = run(*actor(workshop, tmp_path / "wrong", port, "remote_critic_rm.reward_model.name=judge"), check=False)
    finally:
        process.kill()
        process.wait()
    rows = [json.loads(line) for line in (tmp_path / "actor/rollouts/step_1.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert [row["reward"] for row in rows] == pytest.approx(
        [own["reward"](row["input"] + row["output"]) for row in rows]
    )
    assert wrong.returncode == 1
    [said] = [line for line in wrong.stderr.splitlines() if line.startswith("error: ")]
    assert said.endswith(
        "/v2/models/judge has the inputs [], not sentences; is remote_critic_rm.reward_model.name right?"
    )


def test_a_name_that_the_server_does_not_know_is_refused(server: int) -> None:
    address = ServerAddress(name="judge", ip="127.0.0.1", port=server)
    client = RewardClient(RemoteRewardModelConfig(reward_model=address, init_timeout_s=60.0))
    begin = time.monotonic()
    with pytest.raises(
        ServerError, match=r"ready for 20 s without a model judge; give remote_critic_rm\.reward_model\.name"
    ):
        client.wait_until_ready()
    assert time.monotonic() - begin < 50
    client.close()


def test_behind_a_network_that_fails_in_every_way_the_server_gives_the_same_rewards_of_the_same_archive(
    workshop: Workshop, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_client, "_REQUEST_TIMEOUT_S", 3.0)
    turn, numbers = itertools.cycle(FAULTS), itertools.count(1)
    proxy = FaultyProxy(
        free_port(), server, lambda path: next(turn) if path.endswith("/infer") and next(numbers) % 2 else None
    )
    proxy.up()
    asked = [[f"film {number}", "a good one"] for number in range(8)]
    found = []
    for port in (server, proxy.port):
        client = RewardClient(RemoteRewardModelConfig(ServerAddress(ip="127.0.0.1", port=port)))
        client.wait_until_ready()
        found.append([future.result(120) for future in [client.submit(both) for both in asked]])
        client.close()
    proxy.close()
    assert found[0] == found[1]
    assert len(set(map(tuple, found[0]))) == len(asked)
    assert set(proxy.met) == set(FAULTS)
    answer = ask(server, texts("a", "b"))
    assert answer["archive"] == [file_sum(workshop.path("reward_model.nemo"))] * 2
