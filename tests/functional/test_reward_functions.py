"""Rewards without a model, as docs/rewards.md has it: the labeler's command, and a server of functions."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from nemo_aligner.config.reinforce import RemoteRewardModelConfig, ServerAddress
from nemo_aligner.ports import free_port
from nemo_aligner.rewards.interfaces import Candidate, Outcome
from nemo_aligner.servers.reward_client import RewardClient
from tests.functional.conftest import ENV, ROOT, run
from tests.functional.test_commands import LABELER

OWN = """
def right(prompts, responses, answer, **fields):
    return [None if a is None else float(a in r) for r, a in zip(responses, answer)]
"""
SHORT = "{function: nemo_aligner.rewards.text:length_window, weight: 0.2, arguments: {high: 1, margin: 2}}"
ROWS = [
    {"input": f"q{i % 4}", "output": text, "answer": answer}
    for i, (text, answer) in enumerate([("a b", "a"), ("a", "b"), ("b b b", "b"), ("", None), ("c", "c"), ("a a", "c")])
]
REWARDS = [1 + 0.2 * 0.5, 0.2, 1.0, 0.2, 1.2, 0.1]


def test_the_labeler_takes_rewards_from_functions_on_two_processes_that_load_no_model(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(OWN)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(
        "python", str(ROOT / LABELER), f"reward_function={{right: my_rewards.py:right, short: {SHORT}}}",
        "data.file_names=[rows.jsonl]", "processor=null", "output_file=out.jsonl", "trainer.devices=2",
        "data.hf_dataset=False", cwd=tmp_path,
    )  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [round(row["reward"], 9) for row in found] == REWARDS
    assert [row["reward_right"] for row in found] == [1.0, 0.0, 1.0, None, 1.0, 0.0]


def test_a_server_of_functions_takes_fields_and_says_what_each_function_says(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(OWN)
    port = free_port()
    server = subprocess.Popen(
        [
            "python", str(ROOT / "examples/nlp/gpt/serve_reward_model.py"), f"inference.port={port}",
            f"reward_function={{right: my_rewards.py:right, short: {SHORT}}}",
        ],
        cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        client = RewardClient(RemoteRewardModelConfig(ServerAddress(ip="127.0.0.1", port=port), init_timeout_s=60))
        client.wait_until_ready()
        rows = [Candidate(row["input"], row["output"], {"answer": row["answer"]}) for row in ROWS[:3]]
        parts = [{"right": 1.0, "short": 0.5}, {"right": 0.0, "short": 1.0}, {"right": 1.0, "short": 0.0}]
        assert client.judge(rows).result(timeout=60) == [
            Outcome(reward, None, own) for reward, own in zip(REWARDS, parts, strict=False)
        ]
        client.close()
        columns = {"prompts": "q", "responses": "a b", "fields": '{"answer": "b"}'}
        inputs = [{"name": k, "datatype": "BYTES", "shape": [1, 1], "data": [v]} for k, v in columns.items()]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v2/models/reward_model/infer", json.dumps({"inputs": inputs}).encode()
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            outputs: dict[str, Any] = {out["name"]: out["data"][0] for out in json.load(reply)["outputs"]}
        assert json.loads(outputs["parts"]) == {"reward": 1.1, "parts": {"right": 1.0, "short": 0.5}, "failed": []}
    finally:
        server.terminate()
        assert server.wait(30) == 0, server.stderr and server.stderr.read()
