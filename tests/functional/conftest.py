"""The tiny models and files that the command tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",  # the other core is another test's, or the server's that a command talks to
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


LIMIT_S = 500
"""Of one command: less than pytest's own limit of a test, which would end it without what the command said."""


def run(*command: str, cwd: Path = ROOT, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, from the repository. One that hangs is killed with all that it started."""
    process = subprocess.Popen(
        command, cwd=cwd, env={**ENV, **extra}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    except BaseException as fault:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        if not isinstance(fault, subprocess.TimeoutExpired):
            raise
        pytest.fail(f"{command} did not end in {LIMIT_S} s:\n{stdout}\n{stderr}")
    done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{stdout}\n{stderr}"
    return done


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    for _ in range(int(seconds * 10)):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


@dataclass(frozen=True)
class Workshop:
    """A folder with everything the guide assumes: sft_model.nemo, reward_model.nemo, prompts_dataset.jsonl, ..."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in self.path(name).read_text().splitlines()]

    def write(self, name: str, rows: list[dict]) -> Path:
        self.path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.path(name)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    imported = ("python", "scripts/import_hf.py", "--random-init", "conf/model/tiny.yaml", "--dtype", "32", "--output")
    run(*imported, str(shop.path("sft_model.nemo")))
    shop.write("prompts_dataset.jsonl", [{"input": f"prompt {i % 5}", "id": i} for i in range(6)])
    texts = [{"text": f"{word} film {i}"} for i in range(16) for word in ("good", "bad")]
    pairs = shop.write("pairs.jsonl", texts)
    run(
        "python", "examples/nlp/gpt/train_reward_model.py",
        f"pretrained_checkpoint.restore_from_path={shop.path('sft_model.nemo')}",
        f"model.data.data_prefix={{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
        f"exp_manager.explicit_log_dir={shop.path('rm')}", "model.global_batch_size=8", "model.optim.lr=3e-3",
        "trainer.precision=32",
    )  # fmt: skip
    os.link(shop.path("rm/checkpoints/megatron_gpt.nemo"), shop.path("reward_model.nemo"))
    samples = [{"input": f"p{i % 3}", "output": f" answer {i}", "id": i} for i in range(9)]
    for name in ("generated_samples", "sft_samples", "preference_samples"):
        shop.write(f"{name}.jsonl", samples)
    return shop
