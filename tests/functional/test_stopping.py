"""SIGTERM, SIGUSR1 and Ctrl-C end every stage with its work saved and exit status 75; no other run goes on from it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_aligner.ports import free_port
from tests.functional.conftest import ENV, ROOT, Workshop, run
from tests.functional.test_commands import LABELER, SAMPLER, SFT
from tests.functional.test_reinforce import actor, serving

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def server(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with serving(workshop, port, tmp_path_factory.mktemp("server") / "log"):
        yield port


@pytest.fixture(scope="module")
def many(workshop: Workshop) -> Path:
    """More rows than any stage gets through while it is being told to stop."""
    return workshop.write("many.jsonl", [{"input": f"prompt {i}", "output": f" answer {i}"} for i in range(20_000)])


def offline(shop: Workshop, script: str, model: str, rows: Path, folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "python", script, f"gpt_model_file={shop.path(model)}", f"data.file_names=[{rows}]", "trainer.precision=32",
        "data.hf_dataset=False", "checkpoint_interval=1", f"output_file={folder}/out.jsonl", *more,
    )  # fmt: skip


def trained(shop: Workshop, script: str, block: str, folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "python", f"examples/nlp/gpt/{script}.py", "trainer.precision=32", f"exp_manager.explicit_log_dir={folder}",
        f"trainer.{block}.max_epochs=100000", *more,
    )  # fmt: skip


def told(command: tuple[str, ...], sign: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit status and stderr of a command that gets a signal once the file `sign` shows that it is at work."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not (sign.exists() and sign.stat().st_size):
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, said


def stage(name: str, shop: Workshop, many: Path, server: int, folder: Path, *more: str) -> tuple[tuple[str, ...], Path]:
    """The command of a stage, and the file that grows while it works."""
    pairs = shop.path("pairs.jsonl")
    journal, metrics = folder / "out.jsonl_temp" / "rank_0.json", folder / "metrics.jsonl"
    sampler = (*more, "inference.tokens_to_generate=20")
    commands = {
        "sampler": (offline(shop, SAMPLER, "sft_model.nemo", many, folder, *sampler), journal),
        "labeler": (offline(shop, LABELER, "reward_model.nemo", many, folder, *more), journal),
        "SFT": (
            trained(
                shop, Path(SFT).stem, "sft", folder, f"model.restore_from_path={shop.path('sft_model.nemo')}",
                f"model.data.train_ds.file_path={shop.path('generated_samples.jsonl')}",
                "model.data.train_ds.global_batch_size=3", "trainer.sft.skip_validation=True", *more,
            ),
            metrics,
        ),
        "reward model": (
            trained(
                shop, "train_reward_model", "rm", folder,
                f"pretrained_checkpoint.restore_from_path={shop.path('sft_model.nemo')}",
                f"model.data.data_prefix={{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
                "model.global_batch_size=4", "trainer.rm.val_check_interval=1000000", *more,
            ),
            metrics,
        ),
        "actor": (actor(shop, folder, server, "trainer.ppo.max_epochs=100000", *more), metrics),
    }  # fmt: skip
    return commands[name]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("sampler", "seed=99", "seed was 1234, now 99"),
        ("labeler", "gpt_model_file={other}", "gpt_model_file was "),
        ("SFT", "model.restore_from_path={other}", "was made with the archive to start from = "),
        ("reward model", "model.seed=99", "was made with model.seed = 1234, this run has 99"),
        ("actor", "model.data.data_prefix={{train: [{rows}]}}", "was made with training prompts = "),
    ],
    ids=["sampler", "labeler", "SFT", "reward model", "actor"],
)
def test_a_stage_that_is_told_to_stop_says_so_saves_and_is_not_gone_on_with_by_another_run(
    workshop: Workshop, many: Path, server: int, tmp_path: Path, name: str, change: str, says: str
) -> None:
    for number in SIGNALS:
        folder = tmp_path / number.name
        status, said = told(*stage(name, workshop, many, server, folder), number)
        assert status == 75, said
        assert f"stopped early: {number.name}" in said
        assert "Traceback" not in said
        if name in ("sampler", "labeler"):
            assert not (folder / "out.jsonl").exists()
        else:
            assert len(list((folder / "checkpoints").glob("*-last/state.json"))) == 1
            assert not list((folder / "checkpoints").glob("*.nemo"))
    other = change.format(other=another(workshop, name), rows=workshop.path("generated_samples.jsonl"))
    command, _ = stage(name, workshop, many, server, folder, other)
    done = run(*command, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last


def test_ctrl_c_saves_as_sigterm_does_on_all_ranks(workshop: Workshop, tmp_path: Path) -> None:
    background = "exp_manager.checkpoint_callback_params.async_save=True"
    command, sign = stage("SFT", workshop, tmp_path, 0, tmp_path, "trainer.devices=2", background)
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not (sign.exists() and sign.stat().st_size):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # to every process, as a terminal does
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "stopped early: SIGINT" in said
    assert "Traceback" not in said
    assert len(list((tmp_path / "checkpoints").glob("*-last/state.json"))) == 1


def loop(shop: Workshop, many: Path, folder: Path, **more: str) -> subprocess.Popen[str]:
    """The online loop, whose sampler has more to do than anybody waits for."""
    settings = {
        "TRAINING_ITERS": "1", "PROMPTS_PATH": str(many), "ROLLOUT_BATCH_SIZE": "4000", "RESULT_PATH": str(folder),
        "POLICY_MODEL_PATH": str(shop.path("sft_model.nemo")),
        "REWARD_MODEL_PATH": str(shop.path("reward_model.nemo")), "SAMPLER_ARGS": "checkpoint_interval=1", **more,
    }  # fmt: skip
    return subprocess.Popen(
        ("bash", "scripts/online_rs.sh"), cwd=ROOT, env={**ENV, **settings}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def stage_of(process: subprocess.Popen[str], sign: Path) -> int:
    """The process of the loop's stage, once the file `sign` shows that it is at work."""
    while not (sign.exists() and sign.stat().st_size):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def lives(pid: int) -> bool:
    """Whether the process is there, and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("one_process", ["0", "1"])
def test_a_loop_passes_a_signal_on_takes_its_stage_along_when_killed_and_is_alone(
    one_process: str, workshop: Workshop, many: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "generated_samples.jsonl_temp" / "rank_0.json"
    first = loop(workshop, many, tmp_path, ONE_PROCESS=one_process)
    stage = stage_of(first, journal)
    second = loop(workshop, many, tmp_path)
    said = second.communicate(timeout=20)[1]
    assert second.returncode == 1
    assert said.startswith(f"error: another run writes here: process {first.pid} on ")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    time.sleep(0.5)
    assert not lives(stage)

    drawn = journal.stat().st_size
    third = loop(workshop, many, tmp_path, ONE_PROCESS=one_process)
    while journal.stat().st_size == drawn:
        assert third.poll() is None
        time.sleep(0.02)
    stage = stage_of(third, journal)
    third.send_signal(signal.SIGTERM)
    said = third.communicate(timeout=60)[1]
    assert third.returncode == 75, said
    assert "stopped early: SIGTERM; progress is in " in said
    assert not lives(stage), "it has waited for its stage"
    assert not list(tmp_path.rglob("*.lock"))


def another(shop: Workshop, name: str) -> Path:
    """An archive of the same kind as the stage's own, with other bytes."""
    kind = "reward_model" if name == "labeler" else "sft_model"
    path = shop.path(f"another_{kind}.nemo")
    if not path.exists():
        # a tar file may end in more zeros than it needs
        path.write_bytes(shop.path(f"{kind}.nemo").read_bytes() + b"\0" * 10240)
    return path
