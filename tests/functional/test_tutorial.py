"""The tutorial's ten commands, run as they are printed, one after another, on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nemo_aligner.commands.cli import COMMANDS
from nemo_aligner.ports import free_port
from tests.functional.conftest import ENV, ROOT, Workshop
from tests.functional.test_documented_commands import words_of

TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
SMALL = {"data.n=8": "data.n=2", "data.n=4,16": "data.n=1,2", "tokens_to_generate=64": "tokens_to_generate=8"}
"""Sizes of the tutorial, and those of its test; all else is as it is printed."""

ALIGNER = """
import os, sys
import datasets, lightning, transformers  # once for all commands, which are processes that begin here
import nemo_aligner.engine.policy, nemo_aligner.engine.reward_model
from nemo_aligner.commands.cli import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.argv = ["aligner", *line.rstrip("\\n").split("\\t")]
        sys.orig_argv = [sys.executable, "-m", "nemo_aligner", *sys.argv[1:]]  # a multirun starts it again
        main()
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended", status, flush=True)
"""
"""`aligner` with the arguments of each line of stdin; a line of stdout after each, with its exit status."""


def printed() -> Iterator[list[str]]:
    block = TUTORIAL.split("```bash\n")[1].partition("```")[0]
    for small in SMALL.items():
        block = block.replace(*small)
    for words in words_of(block):
        yield words[1:]


@pytest.fixture
def folder(workshop: Workshop, tmp_path: Path) -> Path:
    """What the reader has: a model, prompts, and a reward."""
    subprocess.run(
        ["aligner", "export", "--input", workshop.path("sft_model.nemo"), "--output", "path/to/model"],
        cwd=tmp_path, env=ENV, check=True, capture_output=True,
    )  # fmt: skip
    for name, prompts in (("prompts", ["one", "two", "three"]), ("held_out", ["four", "five"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"input": text}) + "\n" for text in prompts))
    (tmp_path / "my_rewards.py").write_text(TUTORIAL.split("```python\n")[1].partition("```")[0])
    return tmp_path


def test_ten_commands_lead_from_a_model_to_a_better_one(folder: Path) -> None:
    commands = [*printed()]
    assert [words[0] for words in commands] == [
        "import", "sample", "label", "sft", "eval", "report", "sample", "verify", "generate", "export"
    ]  # fmt: skip
    assert {words[0] for words in commands} <= set(COMMANDS)
    url = f"http://127.0.0.1:{(port := free_port())}"
    with (folder / "said").open("w") as said:
        aligner = subprocess.Popen(
            [sys.executable, "-c", ALIGNER], cwd=folder, env={**ENV, "PYTHONUNBUFFERED": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True,
        )  # fmt: skip
    assert aligner.stdin is not None
    assert aligner.stdout is not None
    try:
        for words in commands:
            more = [f"port={port}"] if "server=True" in words else []
            aligner.stdin.write("\t".join([*words, *more]) + "\n")
            aligner.stdin.flush()
            if more:
                assert answer_of(url)
                [served] = Path(f"/proc/{aligner.pid}/task/{aligner.pid}/children").read_text().split()
                subprocess.run(["kill", f"-{signal.SIGTERM.name}", served], check=True)
            status = next(line for line in aligner.stdout if line.startswith("ended "))
            assert status == "ended 0\n", f"{words}: {(folder / 'said').read_text()}"
        aligner.stdin.close()
        assert aligner.wait(60) == 0
    finally:
        aligner.kill()
        aligner.wait()
    first, second = json.loads((folder / "results/evaluation.json").read_text())
    assert (first["samples"], second["samples"]) == (8, 8)
    assert (folder / "results/report.html").stat().st_size > 10_000
    assert len((folder / "results/filtered.jsonl").read_text().splitlines()) == 3
    sizes = [
        len((folder / f"multirun/megatron_random_sampler/data.n={n}/samples.jsonl").read_text().splitlines())
        for n in (1, 2)
    ]
    assert sizes == [2, 4]
    assert (folder / "aligned/model.safetensors").exists()


def answer_of(url: str) -> str:
    """What the server says, once it is there."""
    deadline = time.monotonic() + 120
    while True:
        try:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "one", "max_tokens": 4}, timeout=60)
            return answer.json()["choices"][0]["text"]
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
