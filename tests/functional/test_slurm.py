"""The job scripts on a real Slurm of two nodes, brought up on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_aligner.ports import free_port
from tests.functional.conftest import Workshop, run, wait_for
from tests.functional.test_commands import SAMPLER
from tests.functional.test_launch import fails

CLUSTER = "scripts/slurm/local_cluster.sh"
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
LIMIT_S = 240
"""Of a job to come to work."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") and not (
        os.geteuid() == 0 and shutil.which("apt-get")
    ):
        pytest.skip("Slurm is not installed, and cannot be without root and apt-get")
    state = tmp_path_factory.mktemp("slurm") / "state"
    env = {"SLURM_LOCAL_DIR": str(state), "SLURM_CONF": str(state / "slurm.conf")}
    started = run("bash", CLUSTER, "start", check=False, **env)
    if "could not install" in started.stderr:
        pytest.skip(started.stderr.strip().splitlines()[-1])
    assert started.returncode == 0, started.stderr
    assert started.stdout.strip() == f"export SLURM_CONF={state}/slurm.conf"
    yield env
    run("bash", CLUSTER, "stop", **env)


def hetjob(shop: Workshop, folder: Path, *actor_args: str, tasks: int = 1) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments of sbatch, and the settings, for server and actor of small models; `tasks` are the actor's."""
    prompts = str(shop.path("prompts_dataset.jsonl"))
    sizes = ("--nodes=1", "--ntasks-per-node=1", ":", "--nodes=1", f"--ntasks-per-node={tasks}")
    small = "trainer.precision=32 model.ppo.num_rollout_samples=4 model.global_batch_size=8"
    settings = {
        "RM_NEMO_FILE": str(shop.path("reward_model.nemo")),
        "ACTOR_NEMO_FILE": str(shop.path("sft_model.nemo")),
        "TRAIN_DATA_PATH": prompts,
        "VALID_DATA_PATH": prompts,
        "RESULTS_DIR": str(folder),
        "CRITIC_PORT": str(free_port()),
        "RM_ARGS": "trainer.precision=32",
        "ACTOR_ARGS": " ".join((small, "model.ppo.length_params.max_length=6", *actor_args)),
    }
    return (f"--output={folder}/job.log", *sizes, "scripts/slurm/reinforce.sh"), settings


def submit(cluster: dict[str, str], *command: str, **settings: str) -> str:
    """Run a job to its end; returns what Slurm says of it."""
    return wait_for_end(cluster, start(cluster, *command, **settings))


def start(cluster: dict[str, str], *command: str, **settings: str) -> str:
    """The number of a job that was just submitted."""
    return run("sbatch", "--parsable", *command, **cluster, **settings).stdout.strip().split(";")[0]


def shown(cluster: dict[str, str], job: str) -> str:
    """What Slurm says of a job."""
    return run("scontrol", "show", "job", job, **cluster).stdout


def wait_for_end(cluster: dict[str, str], job: str) -> str:
    """What Slurm says of a job that has ended."""
    try:
        wait_for(lambda: not any(f"JobState={state}" in shown(cluster, job) for state in UNDER_WAY), 180)
    except AssertionError:
        subprocess.run(["scancel", job], env={**os.environ, **cluster}, check=False)
        raise
    return shown(cluster, job)


def goes_on(cluster: dict[str, str], job: str, restarts: int) -> None:
    """Wait until a job is queued again and at work; Slurm would have it wait until its last credentials are too old.

    New ones need to be of a later second than the end of the old ones.
    """

    def queued() -> bool:
        said = shown(cluster, job)
        signs = ("JobState=", f"Restarts={restarts} ", "JobState=PENDING")  # of every component of a hetjob
        return len({said.count(sign) for sign in signs}) == 1

    wait_for(queued, LIMIT_S)
    run("scontrol", "update", f"JobId={job}", "StartTime=now+2", **cluster)
    wait_for(lambda: "JobState=PENDING" not in shown(cluster, job), LIMIT_S)
    assert "JobState=RUNNING" in shown(cluster, job)


def test_the_hetjob_runs_server_and_actor_on_different_nodes(
    cluster: dict[str, str], workshop: Workshop, tmp_path: Path
) -> None:
    job, settings = hetjob(workshop, tmp_path, "trainer.ppo.max_steps=1", "~model.optim.sched", tasks=2)
    ended = submit(cluster, *job, **settings)
    logs = {path.name: path.read_text() for path in tmp_path.rglob("*.log")} | {
        path.name: path.read_text() for path in tmp_path.rglob("*.err")
    }
    assert ended.count("JobState=COMPLETED") == 2, (ended, logs)
    assert "\n   NodeList=n0\n" in ended
    assert "\n   NodeList=n1\n" in ended
    assert (tmp_path / "actor_results/checkpoints/megatron_gpt_rs_actor.nemo").exists()
    assert any("serving reward_model on http://0.0.0.0" in text for text in logs.values())
    said = (tmp_path / "job.log").read_text()
    assert not [word for word in ("Killed", "aborted", "CANCELLED", "forcing") if word in said], said
    assert any("reward server stopped" in text for text in logs.values()), "it was asked, and had time to leave"
    # two actor tasks, one replica each: rank 0 alone validates aloud
    assert sum("validation reward" in text for text in logs.values()) == 1


def test_a_loop_that_is_requeued_pre_empted_and_warned_goes_on_and_ends_with_the_same_samples(
    cluster: dict[str, str], workshop: Workshop, tmp_path: Path
) -> None:
    prompts = workshop.write("requeued.jsonl", [{"input": f"prompt {i}"} for i in range(200)])
    drawn = ("data.n=2", "inference.tokens_to_generate=20", "trainer.precision=32")
    result, log = tmp_path / "loop", tmp_path / "job.log"
    job = start(
        cluster,
        *(f"--output={log}", "--nodes=2", "--ntasks-per-node=1", "scripts/slurm/online_rs.sh"),
        TRAINING_ITERS="1",
        ROLLOUT_BATCH_SIZE="200",
        PROMPTS_PATH=str(prompts),
        POLICY_MODEL_PATH=str(workshop.path("sft_model.nemo")),
        REWARD_MODEL_PATH=str(workshop.path("reward_model.nemo")),
        RESULT_PATH=str(result),
        SAMPLER_ARGS=" ".join((*drawn, "checkpoint_interval=1")),
        LABELER_ARGS="trainer.precision=32",
        SFT_ARGS="trainer.precision=32 ~model.optim.sched trainer.sft.max_steps=1",
    )
    blows = (
        ("scontrol", "requeue", job),
        ("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=true"),
        ("scancel", "--signal=USR1", job),  # to its steps, as --signal does before the time limit
    )

    size = 0
    for restarts, blow in enumerate(blows, 1):
        wait_for(lambda: written(result) > size, LIMIT_S)  # noqa: B023
        run(*blow, **cluster)
        goes_on(cluster, job, restarts)
        size = written(result)
    assert "JobState=COMPLETED" in wait_for_end(cluster, job), log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    assert said.count("stopped early: SIGTERM") >= 2, said
    assert "stopped early: SIGUSR1" in said
    assert (result / "iter.log").read_text() == "1\n"
    assert (result / "checkpoints/megatron_gpt_sft.nemo").exists()
    alone = tmp_path / "alone.jsonl"
    run(
        *("python", SAMPLER, f"gpt_model_file={workshop.path('sft_model.nemo')}", f"data.file_names=[{prompts}]"),
        *(f"output_file={alone}", *drawn),
    )
    kept = [json.loads(line) for line in (result / "iterations/0.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in alone.read_text().splitlines()]
    assert [(row["input"], row["output"]) for row in kept] == [
        (row["input"], row["output"]) for row in rows[: len(kept)]
    ]


def test_a_hetjob_that_is_warned_and_pre_empted_goes_on_with_every_step_once(
    cluster: dict[str, str], workshop: Workshop, tmp_path: Path
) -> None:
    endless = ("trainer.ppo.max_epochs=1000", "trainer.ppo.save_interval=1")
    command, settings = hetjob(workshop, tmp_path, "trainer.ppo.max_steps=1000", *endless)
    job = start(cluster, *command, **settings)
    metrics, log = tmp_path / "actor_results/metrics.jsonl", tmp_path / "job.log"
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=true")
    done = 0
    for restarts, blow in enumerate((("scancel", "--signal=USR1", job), ("sbatch", *urgent)), 1):
        wait_for(lambda: len(steps(metrics)) > done, LIMIT_S)  # noqa: B023
        run(*blow, **cluster)
        goes_on(cluster, job, restarts)
        done = len(steps(metrics))
    wait_for(lambda: len(steps(metrics)) > done, LIMIT_S)
    run("scancel", job, **cluster)
    assert "JobState=CANCELLED" in wait_for_end(cluster, job)
    assert "Traceback" not in log.read_text()
    found = steps(metrics)
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= 3


def steps(metrics: Path) -> list[int]:
    """The optimizer steps in a metrics.jsonl, in its order."""
    whole, _, _ = metrics.read_text().rpartition("\n") if metrics.exists() else ("", "", "")
    rows = [json.loads(line) for line in whole.splitlines()]
    return [row["step"] for row in rows if any(name.startswith("train_optim") for name in row)]


def written(result: Path) -> int:
    """Bytes of what the loop has drawn and judged, which grow while it works."""
    return sum(path.stat().st_size for path in result.glob("*_temp/rank_*.json"))


def test_a_server_that_fails_fails_the_job(cluster: dict[str, str], workshop: Workshop, tmp_path: Path) -> None:
    command, settings = hetjob(workshop, tmp_path)
    ended = submit(cluster, *command, **{**settings, "RM_NEMO_FILE": str(tmp_path / "no_such.nemo")})
    assert "JobState=FAILED" in ended
    *_, told, first = (tmp_path / "job.log").read_text().splitlines()
    assert told == "error: the reward server ended with status 1 before the actor"
    job = ended.partition("JobId=")[2].split()[0]
    assert first.startswith(f"{tmp_path}/critic_results/critic_error_{job}_0.err:error: rm_model_file=")


def test_a_rank_that_is_killed_ends_the_others_also_where_srun_would_let_them_wait(cluster: dict[str, str]) -> None:
    lines = fails("kill", "srun", "--ntasks=2", "--nodes=1", "--kill-on-bad-exit=0", "python", **cluster)
    assert "error: rank 1 is gone without a word; was it killed?" in lines
    assert any(line.startswith("srun: error: ") and line.endswith("task 1: Killed") for line in lines)


def test_after_scancel_the_actor_saves_and_every_log_ends_in_a_line_that_says_so(
    cluster: dict[str, str], workshop: Workshop, tmp_path: Path
) -> None:
    endless = ("trainer.ppo.max_steps=1000", "trainer.ppo.max_epochs=1000", "trainer.ppo.save_interval=1000")
    command, settings = hetjob(workshop, tmp_path, *endless)
    job = start(cluster, *command, **settings)
    metrics = tmp_path / "actor_results/metrics.jsonl"
    wait_for(lambda: bool(steps(metrics)), LIMIT_S)
    run("scancel", job, **cluster)
    assert "JobState=CANCELLED" in wait_for_end(cluster, job)
    logs = {path: path.read_text() for path in (*tmp_path.rglob("*.err"), tmp_path / "job.log")}
    last = {path.parent.name: text.splitlines()[-1] for path, text in logs.items()}
    assert not [path for path, text in logs.items() if "Traceback" in text]
    assert last.pop("actor_results").startswith("stopped early: SIGTERM at step ")
    assert "CANCELLED" in last.pop("critic_results")
    assert [line.partition(";")[0] for line in last.values()] == ["error: cancelled"]
    assert len(list((tmp_path / "actor_results/checkpoints").glob("*-last/state.json"))) == 1


def test_after_scancel_the_loop_has_saved_its_stage_and_says_so_last(
    cluster: dict[str, str], workshop: Workshop, tmp_path: Path
) -> None:
    prompts = workshop.write("many.jsonl", [{"input": f"prompt {i}"} for i in range(5000)])
    job = start(
        cluster,
        *(f"--output={tmp_path}/job.log", "--nodes=2", "--ntasks-per-node=1", "scripts/slurm/online_rs.sh"),
        PROMPTS_PATH=str(prompts),
        POLICY_MODEL_PATH=str(workshop.path("sft_model.nemo")),
        REWARD_MODEL_PATH=str(workshop.path("reward_model.nemo")),
        RESULT_PATH=str(tmp_path),
        ROLLOUT_BATCH_SIZE="5000",
        SAMPLER_ARGS="data.n=1 inference.tokens_to_generate=20 checkpoint_interval=1 trainer.precision=32",
    )
    journal = tmp_path / "generated_samples.jsonl_temp"
    wait_for(lambda: any(path.stat().st_size for path in journal.glob("rank_*.json")), LIMIT_S)
    run("scancel", job, **cluster)
    assert "JobState=CANCELLED" in wait_for_end(cluster, job)
    said = (tmp_path / "job.log").read_text()
    assert "stopped early: SIGTERM" in said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: cancelled; the same command goes on"), said
