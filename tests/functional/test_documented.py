"""What README and docs say works, run as they say it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_aligner.checksums import file_sum
from tests.functional.conftest import Workshop, run
from tests.functional.test_commands import LABELER, SAMPLER, SFT


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def label(shop: Workshop, rows: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    done = run(
        "python", LABELER, f"gpt_model_file={shop.path('reward_model.nemo')}", f"data.file_names=[{rows}]",
        f"output_file={output}", "trainer.precision=32", "data.hf_dataset=False", *more,
    )  # fmt: skip
    assert "Exception ignored" not in done.stderr, "it ends as quietly as it works"
    return lines(output)


def mean_and_std(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def stored(shop: Workshop, folder: Path) -> dict[str, Any]:
    """The settings in the reward model's archive."""
    shutil.unpack_archive(shop.path("reward_model.nemo"), folder, "tar")
    return yaml.safe_load((folder / "model_config.yaml").read_text())


def test_a_reward_model_stores_mean_and_std_of_its_rewards_on_the_validation_texts(
    workshop: Workshop, tmp_path: Path
) -> None:
    texts = workshop.write("texts.jsonl", [{"input": "", "output": r["text"]} for r in workshop.rows("pairs.jsonl")])
    rewards = [row["reward"] for row in label(workshop, texts, tmp_path / "o.jsonl")]
    assert len(rewards) == 32
    found = stored(workshop, tmp_path / "archive")["reward_standardization"]
    assert (found["mean"], found["std"]) == pytest.approx(mean_and_std(rewards), rel=1e-3)
    standard = label(workshop, texts, tmp_path / "s.jsonl", "reward_standardization.enable=True")
    expected = [(reward - found["mean"]) / found["std"] for reward in rewards]
    assert [row["reward"] for row in standard] == pytest.approx(expected, abs=1e-3)


def test_labeled_rows_are_the_same_bytes_on_any_number_of_processes_in_any_batches(
    workshop: Workshop, tmp_path: Path
) -> None:
    texts = workshop.write("films.jsonl", [{"input": f"p{i % 3} went", "output": " film" * (i % 7)} for i in range(20)])
    outputs = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for output, more in zip(
        outputs, ((), ("data.micro_batch_size=7",), ("trainer.devices=2", "data.micro_batch_size=3")), strict=True
    ):
        label(workshop, texts, output, *more)
    assert outputs[0].read_bytes() == outputs[1].read_bytes() == outputs[2].read_bytes()


def test_online_rest_keeps_what_lies_above_the_threshold_in_standard_deviations(
    workshop: Workshop, tmp_path: Path
) -> None:
    samples = tmp_path / "sampled.jsonl"
    shutil.copy(
        workshop.write("to_filter.jsonl", [{"input": f"p{i % 4}", "output": " film" * i} for i in range(16)]), samples
    )
    (tmp_path / "sampled.jsonl.meta.json").write_text("{}")
    raw = [row["reward"] for row in label(workshop, samples, tmp_path / "raw.jsonl")]
    known = stored(workshop, tmp_path / "archive")["reward_standardization"]
    standard = sorted((reward - known["mean"]) / known["std"] for reward in raw)
    threshold = (standard[9] + standard[10]) / 2
    settings = {
        "TRAINING_ITERS": "1", "ROLLOUT_BATCH_SIZE": "4", "RESULT_PATH": str(tmp_path / "loop"),
        "THRESHOLD": f"{threshold:.6f}", "PROMPTS_PATH": str(workshop.path("prompts_dataset.jsonl")),
        "POLICY_MODEL_PATH": str(workshop.path("sft_model.nemo")),
        "REWARD_MODEL_PATH": str(workshop.path("reward_model.nemo")),
        # what the sampler of an iteration left, and a training that fails, so that the labeled rows stay
        "GENERATE_SAMPLES_PATH": str(samples), "LABELED_SAMPLES_PATH": str(tmp_path / "kept.jsonl"),
        "LABELER_ARGS": "trainer.precision=32 data.hf_dataset=False export_reward=True", "SFT_ARGS": "no.such=key",
    }  # fmt: skip
    done = run("bash", "scripts/online_rest.sh", check=False, **settings)
    assert done.returncode == 1, done.stderr
    kept = [row["reward"] for row in lines(tmp_path / "kept.jsonl")]
    assert sorted(kept) == pytest.approx(standard[10:], abs=1e-3)
    assert not (tmp_path / "loop" / "iter.log").exists(), "a stage that failed is not counted"


def test_policies_are_evaluated_by_rewards_and_kl_to_where_they_began(workshop: Workshop, tmp_path: Path) -> None:
    policy, again = workshop.path("sft_model.nemo"), tmp_path / "again.nemo"
    shutil.copy(policy, again)
    run(
        "python", "examples/nlp/gpt/offline/evaluate_policy.py", f"policy_files=[{policy},{again}]",
        f"initial_policy_file={policy}", f"reward_model_file={workshop.path('reward_model.nemo')}",
        f"data.file_names=[{workshop.path('prompts_dataset.jsonl')}]", "data.n=2", "trainer.precision=32",
        "inference.tokens_to_generate=6", "data.hf_dataset=False", f"output_file={tmp_path}/figures.json",
    )  # fmt: skip
    first, second = json.loads((tmp_path / "figures.json").read_text())
    hashes = json.loads((tmp_path / "figures.json.meta.json").read_text())["archive_sha256"]
    assert hashes[str(policy)] == hashes[str(again)] == file_sum(policy)
    samples = lines(tmp_path / "figures.json.sft_model.jsonl")
    judged = tmp_path / "judged.jsonl"
    judged.write_text("".join(json.dumps({"input": r["input"], "output": r["output"]}) + "\n" for r in samples))
    rewards = [row["reward"] for row in label(workshop, judged, tmp_path / "o.jsonl")]
    assert [sample["reward"] for sample in samples] == rewards, "evaluation and labeler, to the last digit"
    assert (first["reward_mean"], first["reward_std"]) == pytest.approx(mean_and_std(rewards), abs=1e-5)
    assert (first["samples"], first["policy"], second["policy"]) == (12, str(policy), str(again))
    assert first["kl"] == pytest.approx(0.0, abs=1e-4), "it is where it began"
    gain = {key: second.pop(key) for key in ("gain", "gain_standard_error", "better_on", "win_rate")}
    assert gain == {"gain": 0.0, "gain_standard_error": 0.0, "better_on": 0.0, "win_rate": 0.5}
    for key in ("win_rate_interval", "win_rate_length_controlled"):
        second.pop(key)
    assert first.pop("best_of") == pytest.approx(second.pop("best_of"))
    assert {**first, "policy": ""} == pytest.approx({**second, "policy": ""})


def test_a_blended_data_prefix_gives_each_file_its_share(workshop: Workshop, tmp_path: Path) -> None:
    files = []
    for name, count in (("good", 4), ("bad", 12)):
        texts = [{"text": f"{word} {name} {i}"} for i in range(count) for word in ("fine", "poor")]
        files.append(workshop.write(f"{name}_pairs.jsonl", texts))
    run(
        "python", "examples/nlp/gpt/train_reward_model.py", f"exp_manager.explicit_log_dir={tmp_path}",
        f"pretrained_checkpoint.restore_from_path={workshop.path('sft_model.nemo')}", "trainer.precision=32",
        f"model.data.data_prefix={{train: [0.75, {files[0]}, 0.25, {files[1]}], validation: [{files[0]}], "
        f"test: [{files[0]}]}}",
        "model.global_batch_size=4", "trainer.rm.val_check_interval=2",
    )  # fmt: skip
    rows = lines(tmp_path / "metrics.jsonl")
    assert max(row["step"] for row in rows if "train/loss" in row) == 4, "16 pairs, as many as both files have"
    assert any("val/accuracy" in row for row in rows)


def test_torchrun_gives_what_plain_python_gives(workshop: Workshop, tmp_path: Path) -> None:
    def sampler(name: str) -> tuple[str, ...]:
        return (
            SAMPLER, f"gpt_model_file={workshop.path('sft_model.nemo')}", "trainer.precision=32", "trainer.devices=2",
            f"data.file_names=[{workshop.path('prompts_dataset.jsonl')}]", "data.hf_dataset=False", "data.n=2",
            "inference.tokens_to_generate=6", f"output_file={tmp_path / name}",
        )  # fmt: skip

    run("python", *sampler("plain.jsonl"))
    run("torchrun", "--standalone", "--nproc-per-node=2", *sampler("torchrun.jsonl"))
    assert (tmp_path / "torchrun.jsonl").read_text() == (tmp_path / "plain.jsonl").read_text()
    assert len(lines(tmp_path / "plain.jsonl")) == 12
    wrong = run("torchrun", "--standalone", "--nproc-per-node=1", *sampler("none.jsonl"), check=False)
    assert wrong.returncode == 1
    assert "torchrun started 1 processes, but trainer.devices=2" in wrong.stderr


def test_an_adapter_is_trained_sampled_and_exported(workshop: Workshop, tmp_path: Path) -> None:
    base, adapter = workshop.path("sft_model.nemo"), tmp_path / "run/checkpoints/megatron_gpt_sft.nemo"
    run(
        "python", SFT, f"model.restore_from_path={base}", f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "model.peft.peft_scheme=lora", "model.peft.lora_tuning.target_modules=[all]", "model.optim.lr=3e-4",
        f"model.data.train_ds.file_path={workshop.path('sft_samples.jsonl')}", "trainer.precision=32",
        "++trainer.sft.skip_validation=True",
    )  # fmt: skip
    assert adapter.stat().st_size < base.stat().st_size
    run(
        "python", SAMPLER, f"gpt_model_file={adapter}", "trainer.precision=32", "data.hf_dataset=False",
        f"data.file_names=[{workshop.path('prompts_dataset.jsonl')}]", "inference.tokens_to_generate=6",
        f"output_file={tmp_path / 'samples.jsonl'}",
    )  # fmt: skip
    assert len(lines(tmp_path / "samples.jsonl")) == 6
    folder = tmp_path / "peft"
    run("python", "scripts/export_hf.py", "--input", str(adapter), "--adapter", "--output", str(folder))
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    imported = ("python", "scripts/import_hf.py", "--input", str(folder), "--output", str(tmp_path / "again.nemo"))
    assert "an adapter; give the archive of its model as --base" in run(*imported, check=False).stderr
