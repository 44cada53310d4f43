"""megatron_gpt_eval.py as a user runs it: prompts on the command line, prompts in a file, and the server."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nemo_aligner.ports import free_port
from tests.functional.conftest import ENV, ROOT, Workshop, run

SCRIPT = ("python", "examples/nlp/gpt/megatron_gpt_eval.py")
PROMPTS = ["prompt 0", "prompt 1"]


def answers(shop: Workshop, *overrides: str) -> list[dict[str, Any]]:
    done = run(*SCRIPT, f"gpt_model_file={shop.path('sft_model.nemo')}", "trainer.precision=32", *overrides)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_prompts_are_answered_as_the_sampler_answers_them(workshop: Workshop, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"text": PROMPTS[1]}) + "\n\n" + json.dumps("third") + "\n")
    found = answers(workshop, f"prompts=[{PROMPTS[0]}]", f"prompts_jsonl={lines}")
    assert [row["input"] for row in found] == [*PROMPTS, "third"]
    rows = workshop.write("three.jsonl", [{"input": text} for text in (*PROMPTS, "third")])
    run(
        "python", "examples/nlp/gpt/offline/launch_random_sampler.py", f"data.file_names=[{rows}]",
        f"gpt_model_file={workshop.path('sft_model.nemo')}", "trainer.precision=32",
        f"output_file={tmp_path / 'sampled.jsonl'}",
    )  # fmt: skip
    sampled = [json.loads(line) for line in (tmp_path / "sampled.jsonl").read_text().splitlines()]
    assert [(row["input"], row["output"]) for row in found] == [(row["input"], row["output"]) for row in sampled]


def test_prompts_are_scored_and_written_to_a_file(workshop: Workshop, tmp_path: Path) -> None:
    target = tmp_path / "scores.jsonl"
    answers(workshop, "prompts=[abc]", "inference.compute_logprob=True", f"output_file={target}")
    [row] = [json.loads(line) for line in target.read_text().splitlines()]
    assert row["tokens"] == ["a", "b", "c"]
    assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]))
    assert len(row["token_logprobs"]) == 2


@pytest.mark.parametrize("devices", [1, 2])
def test_the_server_answers_like_the_command_line_and_ends_on_sigterm(workshop: Workshop, devices: int) -> None:
    port = free_port()
    command = [
        *SCRIPT, f"gpt_model_file={workshop.path('sft_model.nemo')}", "trainer.precision=32", "server=True",
        f"port={port}", f"trainer.devices={devices}", f"tensor_model_parallel_size={devices}",
    ]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, server.communicate()
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
        texts = [
            client.completions.create(model="sft_model", prompt=PROMPTS, max_tokens=30, temperature=0).choices
            for _ in range(2)
        ]
        assert [choice.text for choice in texts[0]] == [choice.text for choice in texts[1]]
        expected = answers(workshop, f"prompts={PROMPTS}", "inference.greedy=True")
        assert [choice.text for choice in texts[0]] == [row["output"] for row in expected]
        scored = client.completions.create(
            model="sft_model", prompt="abc", max_tokens=0, echo=True, logprobs=1, temperature=0
        )
        [row] = answers(workshop, "prompts=[abc]", "inference.compute_logprob=True")
        assert scored.choices[0].logprobs is not None
        assert scored.choices[0].logprobs.token_logprobs is not None
        assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(row["token_logprobs"], abs=1e-3)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "prompts: nothing to do: give prompts="),
        (("server=True", "trainer.devices=2"), "trainer.devices: the server is one copy of the model"),
        (("prompts=[x]", "checkpoint_dir=/ckpt"), "checkpoint_dir: '/ckpt' is not offered; give the .nemo archive"),
        (("prompts=[x]", "inference.tokens_to_generate=0"), "inference.tokens_to_generate: 0 is below 1"),
        (("prompts=['']",), "prompts: prompt 1 has 0 tokens"),
        (("prompts_jsonl=nowhere.jsonl",), "nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line(workshop: Workshop, overrides: tuple[str, ...], says: str) -> None:
    done = run(*SCRIPT, f"gpt_model_file={workshop.path('sft_model.nemo')}", *overrides, check=False)
    assert done.returncode == 1
    faults = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(faults) == 1
    assert says in faults[0]
    assert "Traceback" not in done.stderr
