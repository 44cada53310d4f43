"""The scripts as a user meets them: bad input, interruption, and the online loop under kill -9."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.functional.conftest import ENV, ROOT, Workshop, run, wait_for

SAMPLER = "examples/nlp/gpt/offline/launch_random_sampler.py"
LABELER = "examples/nlp/gpt/offline/launch_reward_labeler.py"
SFT = "examples/nlp/gpt/train_gpt_sft.py"


def sampler(shop: Workshop, output: Path, *more: str) -> list[str]:
    return [
        "python", SAMPLER, f"gpt_model_file={shop.path('sft_model.nemo')}", "trainer.precision=32",
        f"data.file_names=[{shop.path('prompts_dataset.jsonl')}]", "data.hf_dataset=False", "data.n=4",
        "inference.tokens_to_generate=8", f"output_file={output}", *more,
    ]  # fmt: skip


def test_bad_input_is_one_line_and_leaves_nothing(workshop: Workshop, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "a"}\n{"input": \n')
    labeler = [
        "python",
        LABELER,
        f"data.file_names=[{workshop.path('generated_samples.jsonl')}]",
        f"output_file={tmp_path}/o",
    ]
    reward = f"gpt_model_file={workshop.path('reward_model.nemo')}"
    cases = {
        "not valid JSON": sampler(workshop, tmp_path / "o", f"data.file_names=[{bad}]"),
        "nowhere.nemo: no such file": sampler(workshop, tmp_path / "o", "gpt_model_file=nowhere.nemo"),
        "data.max_seq_len": sampler(workshop, tmp_path / "o", "++data.max_seq_len=3"),
        "data.typo: no such key": sampler(workshop, tmp_path / "o", "data.typo=3"),
        "processor: 'best'": [*labeler, reward, "processor=best"],
        "threshold=1e+06 leaves no sample": [*labeler, reward, "processor=rest", "threshold=1e6"],
        "is a language model, not a reward model": [*labeler, f"gpt_model_file={workshop.path('sft_model.nemo')}"],
        "cannot write": sampler(workshop, Path("/proc/nowhere/o")),
        "does not divide": sampler(workshop, tmp_path / "o", "tensor_model_parallel_size=3"),
    }
    for message, command in cases.items():
        done = run(*command, check=False, HYDRA_FULL_ERROR="1")
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1, command
        assert len(errors) == 1, done.stderr
        assert message in errors[0], errors
        assert "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "flags", [["--cfg", "job"], ["--config-path", str(ROOT / "examples/nlp/gpt/conf"), "--cfg", "job"]]
)
@pytest.mark.parametrize("overrides_first", [False, True])
def test_shared_groups_are_reached_from_any_folder(tmp_path: Path, flags: list[str], overrides_first: bool) -> None:
    group = ["+model=tiny"]
    arguments = [*group, *flags] if overrides_first else [*flags, *group]
    done = run("python", str(ROOT / SFT), *arguments, cwd=tmp_path)
    assert "num_query_groups: 2" in done.stdout
    assert "answer_only_loss: true" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_keeps_the_work_and_says_so_with_its_exit_status(workshop: Workshop, tmp_path: Path) -> None:
    command = sampler(workshop, tmp_path / "o.jsonl")
    stopped = run(*command, "max_time_per_run=0:0:0", check=False)
    assert stopped.returncode == 75
    assert "stopped early: max_time_per_run=0:0:0" in stopped.stderr
    assert not (tmp_path / "o.jsonl").exists()
    run(*command)
    assert len(Workshop(tmp_path).rows("o.jsonl")) == 24


def test_sft_stopped_and_resumed_ends_with_the_weights_of_an_uninterrupted_run(
    workshop: Workshop, tmp_path: Path
) -> None:
    def sft(name: str, *more: str, check: bool = True) -> int:
        return run(
            "python", SFT, f"model.restore_from_path={workshop.path('sft_model.nemo')}", "trainer.precision=32",
            f"model.data.train_ds.file_path={workshop.path('generated_samples.jsonl')}", "trainer.sft.max_epochs=2",
            "model.data.train_ds.global_batch_size=4", f"exp_manager.explicit_log_dir={tmp_path / name}",
            "trainer.sft.save_interval=2", "exp_manager.checkpoint_callback_params.monitor=global_step",
            "exp_manager.checkpoint_callback_params.mode=max", "exp_manager.checkpoint_callback_params.save_top_k=1",
            *more, check=check,
        ).returncode  # fmt: skip

    background = "exp_manager.checkpoint_callback_params.async_save=True"
    sft("whole")
    assert sft("parts", "exp_manager.max_time_per_run=0:0:0", background, check=False) == 75
    [checkpoint] = (tmp_path / "parts/checkpoints").glob("*-last")
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 1
    sft("parts", background)
    a, b = ((tmp_path / name / "checkpoints/megatron_gpt_sft.nemo") for name in ("whole", "parts"))
    assert weights(a, tmp_path / "a") == weights(b, tmp_path / "b")
    kept = sorted(p.name for p in (tmp_path / "whole/checkpoints").glob("*/"))
    assert kept == ["megatron_gpt_sft--global_step=6.000-step=6-consumed_samples=18-last"]
    # a finished run started again only writes what is missing
    a.unlink()
    sft("whole")
    assert weights(a, tmp_path / "c") == weights(b, tmp_path / "b")


def weights(archive: Path, folder: Path) -> list[bytes]:
    """The weight bytes of an archive."""
    shutil.unpack_archive(archive, folder, "tar")
    return [path.read_bytes() for path in sorted((folder / "model_weights").glob("*.distcp"))]


def test_the_online_loop_killed_in_every_stage_ends_as_if_never_killed(workshop: Workshop, tmp_path: Path) -> None:
    """From another folder, whose paths are meant."""
    shutil.copy(workshop.path("prompts_dataset.jsonl"), tmp_path / "prompts.jsonl")

    def loop(name: str) -> subprocess.Popen[str]:
        settings = {
            "TRAINING_ITERS": "1", "ROLLOUT_BATCH_SIZE": "3", "RESULT_PATH": name, "KEEP_SAMPLES": "4",
            "PROMPTS_PATH": "prompts.jsonl",
            "POLICY_MODEL_PATH": str(workshop.path("sft_model.nemo")),
            "REWARD_MODEL_PATH": str(workshop.path("reward_model.nemo")),
            "SAMPLER_ARGS": "data.n=3 inference.tokens_to_generate=6 trainer.precision=32",
            "LABELER_ARGS": "trainer.precision=32",
            "SFT_ARGS": "'model.data.train_ds.prompt_template=\"{input}{output}\"' trainer.precision=32",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", ROOT / "scripts/online_rs.sh"], cwd=tmp_path, env={**ENV, **settings}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    whole = loop("whole")
    assert whole.wait() == 0, whole.stdout
    for stage in ("sample", "label", "train"):
        process = loop("killed")
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == f"== iteration 0: {stage}":
                break
        time.sleep(3)
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        process.wait()
    final = loop("killed")
    output = final.communicate()[0]
    assert final.returncode == 0, output
    paths = [tmp_path / name / "checkpoints/megatron_gpt_sft.nemo" for name in ("whole", "killed")]
    assert weights(paths[0], tmp_path / "a") == weights(paths[1], tmp_path / "b")
    assert (tmp_path / "killed/iter.log").read_text() == "1\n"
    [line], [killed] = (
        [json.loads(text) for text in (tmp_path / name / "iterations.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    assert (line["iteration"], line["samples"], line["prompts"]) == (0, 9, 3)
    assert {**line, "seconds": 0} == {**killed, "seconds": 0} | {k: v for k, v in line.items() if "seconds/" in k}
    assert len((tmp_path / "whole/iterations/0.jsonl").read_text().splitlines()) == 4
    assert list((tmp_path / "whole/tensorboard").glob("events.*"))
    (tmp_path / "killed/iter_0/checkpoints").mkdir(parents=True)  # as a kill leaves it while it is removed
    again = loop("killed")
    assert (again.wait(), again.stdout.read() if again.stdout else "") == (0, "")
    assert not (tmp_path / "killed/iter_0").exists()


@pytest.mark.parametrize("method", [[], ["--reinforce"], ["--math"]])
def test_the_tiny_quickstart_runs_through(tmp_path: Path, method: list[str]) -> None:
    done = run("bash", "scripts/quickstart.sh", "--tiny", *method, QUICKSTART_DIR=str(tmp_path))
    assert done.stdout.splitlines()[-1].endswith(f"look at {tmp_path}/report.html")
    assert (tmp_path / "report.html").read_text().endswith("</html>\n")
    summary = json.loads((tmp_path / "summary.json").read_text())
    keys = {"reward_before", "reward_after", "reward_std_before", "kl_after", "seconds", "iterations"}
    assert keys <= summary.keys()
    assert summary["kl_after"] > 0
    assert summary["iterations"][0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert len(summary["iterations"]) == {"": 4, "--reinforce": 3, "--math": 2}["".join(method)]
    assert (tmp_path / "reward.png").stat().st_size > 5000
    assert "- after" in (tmp_path / "samples.md").read_text()


def test_a_quickstart_of_other_settings_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("reinforce=false tiny=true seed=1234\n")
    found = run("bash", "scripts/quickstart.sh", QUICKSTART_DIR=str(tmp_path), check=False)
    assert found.returncode == 1
    assert found.stderr.startswith(
        f"error: {tmp_path} was made with reinforce=false tiny=true seed=1234, this run has "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["settings"]


def test_a_quickstart_whose_server_dies_ends_at_once_and_names_its_log(workshop: Workshop, tmp_path: Path) -> None:
    for name, made in (("sft_model", "sft_model"), ("backbone", "sft_model"), ("reward_model", "reward_model")):
        shutil.copy(workshop.path(f"{made}.nemo"), tmp_path / f"{name}.nemo")  # so that these are not made first
    (tmp_path / "data").mkdir()
    for name in ("pairs", "prompts", "repeated_held_out_prompts"):
        shutil.copy(workshop.path("prompts_dataset.jsonl"), tmp_path / f"data/{name}.jsonl")
    command = ["bash", "scripts/quickstart.sh", "--tiny", "--reinforce"]
    environment = {**ENV, "QUICKSTART_DIR": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (tmp_path / "reward_server.log").exists() or process.poll() is not None, 120)
        server = f"serve_reward_model.py rm_model_file={tmp_path}"
        wait_for(lambda: subprocess.run(["pkill", "-KILL", "-f", server], check=False).returncode == 0, 20)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert f"error: the reward server has ended; its log, {tmp_path}/reward_server.log, says: " in said
