"""What a run does not need is not imported: NeMo and Lightning take 5 s."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "examples/nlp/gpt").rglob("*.py")
    if "script(" in path.read_text()
)
pytestmark = pytest.mark.processes
SLOW = {"nemo", "lightning", "wandb", "mlflow"}


def imported(program: str, *arguments: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """Top-level packages in sys.modules at the end of a program of its own process, and how it ended."""
    report = "import atexit, sys; atexit.register(lambda: print('\\nMODULES', *sorted(sys.modules)))\n"
    done = subprocess.run(
        [sys.executable, "-c", report + program, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    names = done.stdout.rpartition("MODULES")[2].split()
    return {name.partition(".")[0] for name in names}, done


def running(script: str) -> str:
    return f"import runpy; sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_config_errors_import_nothing_slow(script: str) -> None:
    for arguments, status, said in ((["--help"], 0, ""), (["trainer.no_such_key=1"], 1, "error: ")):
        found, done = imported(running(script), *arguments)
        assert done.returncode == status, done.stderr
        assert said in done.stderr
        assert not found & (SLOW | {"torch", "transformers"})


def test_a_run_with_a_tokenizer_and_loggers_of_our_own_imports_nothing_slow(tmp_path: Path) -> None:
    program = """
from pathlib import Path
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, byte_tokenizer, load_tokenizer
from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.stages.run_logger import run_logger
from nemo_aligner.stages.supervised import loop
from nemo_aligner.stages.reinforce import loop
from tests.fakes import OneProcess
from tests.tiny import ARCHIVED
folder = Path(sys.argv[1])
(folder / "tokenizer.json").write_bytes(byte_tokenizer())
load_tokenizer(folder, ARCHIVED)
exp = ExpManagerConfig(explicit_log_dir=str(folder), name="m", create_tensorboard_logger=False)
exp.validate()
with run_logger(exp, OneProcess(), {}, None) as logger:
    logger.log(1, "train", {"loss": 1.0})
"""
    found, done = imported(program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "megatron" in found
    assert not found & (SLOW - {"wandb"})  # Megatron imports it where it is installed
