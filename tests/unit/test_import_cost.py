"""What a run does not need is not imported: NeMo and Lightning take 5 s, torch and Megatron 3 s, its compiler 2 s."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.owner import lock_of, sole_owner
from tests.models_without_weights import models_without_weights

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "examples/nlp/gpt").rglob("*.py")
    if "nemo_aligner.commands" in path.read_text()
)
pytestmark = pytest.mark.processes
SLOW = {"nemo", "lightning", "wandb", "mlflow"}
HEAVY = SLOW | {"torch", "megatron", "transformers"}

SFT, RM, ACTOR, SERVER, GENERATION, SAMPLER, LABELER, EVALUATION = (
    f"examples/nlp/gpt/{name}.py"
    for name in (
        "train_gpt_sft",
        "train_reward_model",
        "train_gpt_reinforce_actor",
        "serve_reward_model",
        "megatron_gpt_eval",
        "offline/launch_random_sampler",
        "offline/launch_reward_labeler",
        "offline/evaluate_policy",
    )
)
# `policy` and `judge` are archives; `rows` is a good file, `line` one whose second line is broken
POLICY_PREFIX = "pretrained_checkpoint.restore_from_path={policy}"
ONE_FILE = "data.file_names=[{rows}]"
RIGHT = {
    SFT: ("model.restore_from_path={policy}", "model.data.train_ds.file_path={rows}"),
    RM: (POLICY_PREFIX, "model.data.data_prefix=[{rows}]"),
    ACTOR: (POLICY_PREFIX, "model.data.data_prefix=[{rows}]", "remote_critic_rm.reward_model.ip=localhost"),
    SERVER: ("rm_model_file={judge}",),
    GENERATION: ("gpt_model_file={policy}", "prompts_jsonl={rows}"),
    SAMPLER: ("gpt_model_file={policy}", ONE_FILE, "output_file={folder}/out"),
    LABELER: ("gpt_model_file={judge}", ONE_FILE, "output_file={folder}/out"),
    EVALUATION: ("policy_files=[{policy}]", "reward_model_file={judge}", ONE_FILE, "output_file={folder}/out"),
}
ABSENT, BROKEN = "{folder}/absent: no such file", "{line}:2: not valid JSON"
FAULTS = [
    (SFT, "model.data.train_ds.file_path={folder}/absent", ABSENT),
    (SFT, "model.data.train_ds.file_path={line}", BROKEN),
    (SFT, "model.data.validation_ds.file_path={folder}/absent", ABSENT),
    (SFT, "model.data.train_ds.prompt_template=x", "must end with the label {{output}}"),
    (SFT, "model.data.chat=True", "{rows}:1: a chat row needs"),
    (SFT, "model.data.chat_template='{{{{'", "model.data.chat_template: not a valid Jinja template"),
    (SFT, "model.restore_from_path={folder}/absent", "model.restore_from_path=" + ABSENT),
    (SFT, "model.restore_from_path={judge}", "is a reward model"),
    (SFT, "model.tensor_model_parallel_size=3", "3 does not divide"),
    *(
        (training, fault, said)
        for training in (SFT, RM, ACTOR)
        for fault, said in (
            ("exp_manager.checkpoint_callback_params.monitor=val_los", "'val_los' is not logged"),
            ("exp_manager.max_time_per_run=soon", "exp_manager.max_time_per_run: 'soon' is not of the form"),
            ("model.optim.sched.name=Cosine", "model.optim.sched.name: 'Cosine' is not one of"),
        )
    ),
    (RM, "model.data.data_prefix=[{folder}/absent]", ABSENT),
    (RM, "model.data.data_prefix=[{line}]", BROKEN),
    (RM, "pretrained_checkpoint.restore_from_path={folder}/absent", ABSENT),
    (ACTOR, "model.data.data_prefix=[{folder}/absent]", ABSENT),
    (ACTOR, "model.data.data_prefix=[{line}]", BROKEN),
    (ACTOR, "pretrained_checkpoint.restore_from_path={folder}/absent", ABSENT),
    (ACTOR, "pretrained_checkpoint.restore_from_path={judge}", "is a reward model"),
    (SERVER, "rm_model_file={folder}/absent", "rm_model_file=" + ABSENT),
    (SERVER, "rm_model_file={policy}", "is a language model"),
    (GENERATION, "gpt_model_file={folder}/absent", "gpt_model_file=" + ABSENT),
    (GENERATION, "gpt_model_file={judge}", "is a reward model"),
    (GENERATION, "prompts_jsonl={line}", BROKEN),
    (GENERATION, "chat_template='{{{{'", "chat_template: not a valid Jinja template"),
    (SAMPLER, "data.file_names=[{folder}/absent]", ABSENT),
    (SAMPLER, "data.file_names=[{line}]", BROKEN),
    (SAMPLER, "data.prompt_template=x", "lacks {{input}}"),
    (SAMPLER, "gpt_model_file={folder}/absent", "gpt_model_file=" + ABSENT),
    (SAMPLER, "gpt_model_file={judge}", "is a reward model"),
    (LABELER, "data.file_names=[{folder}/absent]", ABSENT),
    (LABELER, "gpt_model_file={folder}/absent", "gpt_model_file=" + ABSENT),
    (LABELER, "gpt_model_file={policy}", "is a language model"),
    (LABELER, "gpt_model_file={hf}", "is a language model"),
    (SAMPLER, "max_time_per_run=soon", "max_time_per_run: 'soon' is not of the form"),
    (LABELER, "max_time_per_run=soon", "max_time_per_run: 'soon' is not of the form"),
    (LABELER, "processor=best", "processor: 'best'"),
    (
        LABELER,
        "reward_function=a:b",
        "gpt_model_file: {judge} would give no reward",
    ),
    (ACTOR, "reward_function=no_such:f", "no_such:f cannot be used: ModuleNotFoundError"),
    (ACTOR, "reward_function=nemo_aligner.rewards.text:exact_match", "{rows}:1: no field 'answer', which reward"),
    (EVALUATION, "data.file_names=[{folder}/absent]", ABSENT),
    (EVALUATION, "policy_files=[{policy},{folder}/absent]", "policy_files=" + ABSENT),
    (EVALUATION, "initial_policy_file={folder}/absent", "initial_policy_file=" + ABSENT),
    (EVALUATION, "reward_model_file={folder}/absent", "reward_model_file=" + ABSENT),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands above name; an archive that nobody loads is a folder with its config."""
    folder = tmp_path_factory.mktemp("paths")
    models_without_weights(folder)
    row = json.dumps({"input": "a", "output": "b", "text": "c"})
    (folder / "rows").write_text(f"{row}\n{row}\n")
    (folder / "line").write_text(f"{row}\n{{\n")
    return {"folder": str(folder), **{name: str(folder / name) for name in ("policy", "judge", "hf", "rows", "line")}}


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
        assert not found & HEAVY


def test_every_script_is_among_those_with_faults() -> None:
    assert set(RIGHT) == {script for script, _, _ in FAULTS} == set(SCRIPTS)


@pytest.mark.parametrize(("script", "fault", "said"), FAULTS)
def test_a_fault_of_data_or_archive_is_one_line_before_torch_is_imported(
    script: str, fault: str, said: str, paths: dict[str, str]
) -> None:
    arguments = [argument.format(**paths) for argument in (*RIGHT[script], fault)]
    found, done = imported(running(script), *arguments)
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert said.format(**paths) in line
    assert not found & HEAVY


LOG_DIR = "exp_manager.explicit_log_dir={folder}/log"
WRITES = {
    **dict.fromkeys((SFT, RM, ACTOR), ("log/run", LOG_DIR)),
    **dict.fromkeys((SAMPLER, LABELER, EVALUATION), ("out", "output_file={folder}/out")),
    GENERATION: ("out", "output_file={folder}/out"),
}


@pytest.mark.parametrize("script", [*WRITES, "scripts/import_hf.py", "scripts/export_hf.py"])
def test_a_second_start_is_refused_before_torch_is_imported(script: str, paths: dict[str, str]) -> None:
    conversion = ("out", "--output={folder}/out", "--input={policy}")
    output, *own = WRITES.get(script, conversion)
    arguments = [argument.format(**paths) for argument in (*RIGHT.get(script, ()), *own)]
    with sole_owner(lock_of(Path(paths["folder"]) / output)):
        found, done = imported(running(script), *arguments)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith(f"error: another run writes here: process {os.getpid()} on {socket.gethostname()}, started ")
    assert not found & HEAVY


def test_a_run_with_a_tokenizer_and_loggers_of_our_own_imports_nothing_slow(tmp_path: Path) -> None:
    program = """
from pathlib import Path
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, byte_tokenizer, load_tokenizer
from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.stages.run_logger import run_logger
from nemo_aligner.stages.supervised import loop
from nemo_aligner.stages.reinforce import loop
from tests.fakes import OneProcess
from nemo_aligner.owner import lock_of, sole_owner
from tests.tiny import ARCHIVED
folder = Path(sys.argv[1])
(folder / "tokenizer.json").write_bytes(byte_tokenizer())
load_tokenizer(folder, ARCHIVED)
exp = ExpManagerConfig(explicit_log_dir=str(folder), name="m", create_tensorboard_logger=False)
exp.validate()
with run_logger(exp, OneProcess(), {}, None) as logger:
    logger.log(1, "train", {"loss": 1.0})
assert not any(name.startswith("torch._inductor") for name in sys.modules)
"""
    found, done = imported(program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "megatron" in found
    assert not found & (SLOW - {"wandb"})  # Megatron imports it where it is installed
