"""Whole offline runs on small real models: responses, rewards and KL are those of plain torch; faults come first."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.checksums import file_sum
from nemo_aligner.config.cut import AS_STORED, WHOLE
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.offline import LabelerConfig, OfflineConfig, SamplerConfig
from nemo_aligner.errors import AlignerError, CheckpointError, ConfigError
from nemo_aligner.event_file import shown_before
from nemo_aligner.stages.offline import evaluation, random_sampler, reward_labeler
from tests.unit.stages.conftest import MEAN, STD, Archives
from tests.unit.stages.plain import Plain, opened, read_rows, write_rows
from tests.unit.stages.refusals import check_refused, put

PROMPTS = [{"input": f"film {i}", "id": i} for i in range(4)]
SAMPLES = [{"input": f"film {i}", "output": f" was {word}", "id": i} for i, word in enumerate(["good", "bad", "so"])]


def set_up(cfg: OfflineConfig, folder: Path, archive: Path, rows: list[dict[str, Any]]) -> None:
    cfg.trainer.accelerator, cfg.trainer.precision = "cpu", "32"
    cfg.gpt_model_file, cfg.output_file, cfg.seed = str(archive), str(folder / "out.jsonl"), 41
    data: Any = cfg.data  # type: ignore[attr-defined]
    data.file_names, data.hf_dataset, data.micro_batch_size = [write_rows(folder / "rows.jsonl", rows)], False, 2


def sampler_config(folder: Path, archives: Archives) -> SamplerConfig:
    cfg = SamplerConfig()
    set_up(cfg, folder, archives.policy, PROMPTS)
    cfg.inference.tokens_to_generate, cfg.data.prompt_template = 6, "Q: {input}"
    return cfg


def labeler_config(folder: Path, archives: Archives) -> LabelerConfig:
    cfg = LabelerConfig(export_reward=True)
    set_up(cfg, folder, archives.judge, SAMPLES)
    cfg.data.prompt_template = "Q: {input}"
    return cfg


def evaluation_config(folder: Path, archives: Archives) -> EvaluationConfig:
    cfg = EvaluationConfig(policy_files=[str(archives.policy), str(archives.other)])
    set_up(cfg, folder, archives.policy, PROMPTS)
    cfg.initial_policy_file, cfg.reward_model_file = str(archives.policy), str(archives.judge)
    cfg.inference.tokens_to_generate, cfg.data.n = 6, 2
    return cfg


CONFIGS: dict[str, Any] = {
    "sampler": (sampler_config, random_sampler.run),
    "labeler": (labeler_config, reward_labeler.run),
    "evaluation": (evaluation_config, evaluation.run),
}


def reward(judge: Plain, text: str) -> float:
    """Of a text as the judge was trained to see it, with EOS."""
    with torch.no_grad():
        return judge.reward([*judge.tokenizer.encode(text), judge.tokenizer.eos_id]).item()


def test_greedy_samples_are_what_the_model_says_after_the_template(
    archives: Archives, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    cfg = sampler_config(tmp_path, archives)
    cfg.inference.greedy, cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size = True, 1, 1
    random_sampler.run(cfg)
    with opened(archives.policy) as plain:
        tokenizer = plain.tokenizer
        drawn = [plain.likeliest(tokenizer.encode(f"Q: {row['input']}"), 6) for row in PROMPTS]
        expected = [{**row, "output": tokenizer.decode(tokens)} for row, tokens in zip(PROMPTS, drawn, strict=True)]
    assert read_rows(tmp_path / "out.jsonl") == expected
    own = {"key": "gpt_model_file", "sizes": WHOLE, "seed": 41}
    assert started == [{"devices": 1, "path": str(archives.policy), **own}]


@pytest.mark.parametrize("task", ["sampler", "labeler"])
def test_archive_and_output_are_read_once_for_their_sums(
    archives: Archives, tmp_path: Path, hashed_files: list[str], task: str
) -> None:
    make, run = CONFIGS[task]
    cfg = make(tmp_path, archives)
    archive = shutil.copy(cfg.gpt_model_file, tmp_path / "own.nemo")
    cfg.gpt_model_file, cfg.exp_manager.create_tensorboard_logger = str(archive), True
    run(cfg)
    assert [hashed_files.count(path) for path in (cfg.gpt_model_file, cfg.output_file)] == [1, 1]


def test_rewards_are_those_of_prompt_and_response_under_the_template(
    archives: Archives, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    cfg = labeler_config(tmp_path, archives)
    reward_labeler.run(cfg)
    with opened(archives.judge) as judge:
        rewards = [reward(judge, f"Q: {row['input']}{row['output']}") for row in SAMPLES]
    assert read_rows(tmp_path / "out.jsonl") == [
        {**row, "reward": pytest.approx(r, abs=1e-4)} for row, r in zip(SAMPLES, rewards, strict=True)
    ]
    own = {"key": "gpt_model_file", "sizes": AS_STORED, "seed": 41}
    assert started == [{"devices": 1, "path": str(archives.judge), **own}]
    cfg.reward_standardization.enable = True
    reward_labeler.run(cfg)
    found = [row["reward"] for row in read_rows(tmp_path / "out.jsonl")]
    assert found == pytest.approx([(r - MEAN) / STD for r in rewards], abs=1e-4)


def test_an_evaluation_draws_as_the_sampler_does_and_reports_rewards_and_kl_of_what_was_drawn(
    archives: Archives, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    cfg = evaluation_config(tmp_path, archives)
    cfg.exp_manager.create_tensorboard_logger, cfg.exp_manager.log_samples = True, 3
    evaluation.run(cfg)
    own = {"key": "gpt_model_file", "sizes": AS_STORED, "seed": 41}
    assert started == [{"devices": 1, "path": str(archives.policy), **own}]
    figures = json.loads((tmp_path / "out.jsonl").read_text())
    assert [told["policy"] for told in figures] == cfg.policy_files
    reward_of_prompt = []
    for told, path in zip(figures, (archives.policy, archives.other), strict=True):
        samples = read_rows(tmp_path / f"out.jsonl.{path.stem}.jsonl")
        drawn = sampled(cfg, tmp_path, path)
        assert [(row["id"], row["output"]) for row in samples] == [(row["id"], row["output"]) for row in drawn]
        with opened(archives.judge) as judge:
            rewards = [reward(judge, row["input"] + row["output"]) for row in drawn]
        kls = [a - b for a, b in zip(total_logprobs(path, drawn), total_logprobs(archives.policy, drawn), strict=True)]
        assert [row["reward"] for row in samples] == pytest.approx(rewards, abs=1e-4)
        assert [row["kl"] for row in samples] == pytest.approx(kls, abs=1e-3)
        assert told["reward_mean"] == pytest.approx(sum(rewards) / 8, abs=1e-4)
        assert told["kl"] == pytest.approx(sum(kls) / 8, abs=1e-3)
        assert (told["samples"], told["kl"] > 1) == (8, path == archives.other)
        reward_of_prompt.append([(rewards[2 * p] + rewards[2 * p + 1]) / 2 for p in range(4)])
    differences = [b - a for a, b in zip(*reward_of_prompt, strict=True)]
    mean = sum(differences) / 4
    spread = math.sqrt(sum((difference - mean) ** 2 for difference in differences) / 3)
    assert "gain" not in figures[0]
    assert figures[1]["gain"] == pytest.approx(mean, abs=1e-4)
    assert figures[1]["gain_standard_error"] == pytest.approx(spread / 2, abs=1e-4)
    assert figures[1]["better_on"] == sum(difference > 0 for difference in differences) / 4
    logged = read_rows(tmp_path / "out.jsonl_log/metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1]
    for row, told in zip(logged, figures, strict=True):
        for name in ("reward_mean", "kl"):
            assert row[f"evaluation/{name}"] == pytest.approx(told[name])
        assert row["evaluation/best_of/2"] == pytest.approx(told["best_of"]["2"])
    texts = shown_before(tmp_path / "out.jsonl_log").texts
    assert [texts[place, "table/evaluation"].count("**reward") for place in (0, 1)] == [3, 3]
    assert texts[1, "output_sha256"] == file_sum(tmp_path / "out.jsonl")
    low, high = figures[1]["win_rate_interval"]
    assert 0 <= low <= figures[1]["win_rate"] <= high <= 1


def sampled(cfg: EvaluationConfig, folder: Path, archive: Path) -> list[dict[str, Any]]:
    """What the sampler draws with the settings of an evaluation, with tokens."""
    output = str(folder / f"{archive.stem}.jsonl")
    own = SamplerConfig(gpt_model_file=str(archive), output_file=output, seed=cfg.seed, trainer=cfg.trainer)
    own.inference = cfg.inference
    own.data.file_names, own.data.n, own.data.hf_dataset = cfg.data.file_names, cfg.data.n, False
    own.data.export_tokens = own.data.export_metadata = True
    random_sampler.run(own)
    return read_rows(Path(own.output_file))


@torch.no_grad()
def total_logprobs(archive: Path, drawn: list[dict[str, Any]]) -> list[float]:
    """log p of every response, with the EOS that ended it."""
    with opened(archive) as plain:
        found = []
        for row in drawn:
            prompt = plain.tokenizer.encode(row["input"])
            end = [plain.tokenizer.eos_id] if row["finish_reason"] == "stop" else []
            logprobs = plain.logprobs([*prompt, *row["output_token_ids"], *end])
            found.append(logprobs[len(prompt) - 1 :].sum().item())
        return found


def test_without_an_initial_policy_an_evaluation_has_no_kl(archives: Archives, tmp_path: Path, alone: None) -> None:
    cfg = evaluation_config(tmp_path, archives)
    cfg.policy_files, cfg.initial_policy_file = [str(archives.other)], None
    evaluation.run(cfg)
    [told] = json.loads((tmp_path / "out.jsonl").read_text())
    assert (told["kl"], told["samples"]) == (None, 8)
    assert {row["kl"] for row in read_rows(tmp_path / "out.jsonl.other.jsonl")} == {None}


@pytest.mark.parametrize("stage", CONFIGS)
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("data.file_names", ["OUT"], "output_file=OUT is also an input, OUT (data.file_names)"),
        ("data.prompt_template", "Q:", "data.prompt_template: 'Q:' lacks {input}"),
        ("tensor_model_parallel_size", 2, "tensor_model_parallel_size: 2 does not divide"),
        ("pipeline_model_parallel_size", 2, "pipeline_model_parallel_size: 2 does not divide"),
        ("gpt_model_file", "/no.nemo", "gpt_model_file=/no.nemo: no such file"),
        ("data.input_key", "prompt", "ROWS:1: no field 'prompt' (data.input_key)"),
        ("data.concat_sampling_probabilities", [1, 2], "data.concat_sampling_probabilities: 2 weights for 1 files"),
    ],
)
def test_what_is_wrong_with_an_offline_run_is_said_before_it_starts(
    archives: Archives, tmp_path: Path, never_starts: None, stage: str, key: str, value: Any, says: str
) -> None:
    make, run = CONFIGS[stage]
    cfg = make(tmp_path, archives)
    if key == "data.input_key":
        cfg.data.prompt_template = None
    put(cfg, key, [cfg.output_file] if value == ["OUT"] else value)
    with pytest.raises(AlignerError) as caught:
        run(cfg)
    for name, path in (("OUT", cfg.output_file), ("ROWS", str(tmp_path / "rows.jsonl"))):
        says = says.replace(name, path)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("stage", ["sampler", "labeler"])
def test_a_time_limit_of_another_form_is_refused_before_a_run_starts(
    archives: Archives, tmp_path: Path, never_starts: None, stage: str
) -> None:
    make, run = CONFIGS[stage]
    cfg = make(tmp_path, archives)
    cfg.max_time_per_run = "1h"
    with pytest.raises(ConfigError, match=r"^max_time_per_run: '1h' is not of the form"):
        run(cfg)


KINDS = [
    ("sampler", "gpt_model_file", "judge", "a reward model, not a language model"),
    ("labeler", "gpt_model_file", "policy", "a language model, not a reward model"),
    ("evaluation", "policy_files", "judge", "a reward model, not a language model"),
    ("evaluation", "initial_policy_file", "judge", "a reward model, not a language model"),
    ("evaluation", "reward_model_file", "policy", "a language model, not a reward model"),
]


@pytest.mark.parametrize(("stage", "key", "kind", "says"), KINDS)
def test_an_archive_of_the_other_kind_is_refused_by_its_key_before_a_run_starts(
    archives: Archives, tmp_path: Path, never_starts: None, stage: str, key: str, kind: str, says: str
) -> None:
    make, run = CONFIGS[stage]
    cfg, path = make(tmp_path, archives), str(getattr(archives, kind))
    put(cfg, key, [str(archives.other), path] if key == "policy_files" else path)
    with pytest.raises(CheckpointError) as caught:
        run(cfg)
    assert str(caught.value).startswith(f"{key}={path} is {says}")


@pytest.mark.parametrize(("stage", "key", "kind", "says"), KINDS)
def test_an_archive_that_was_replaced_meanwhile_is_refused_by_its_key_too(
    archives: Archives, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch,
    stage: str, key: str, kind: str, says: str,
) -> None:  # fmt: skip
    for module in (random_sampler, reward_labeler, evaluation):
        for name in ("check_is_policy", "check_is_reward_model"):
            monkeypatch.setattr(module, name, lambda *args: None, raising=False)
    test_an_archive_of_the_other_kind_is_refused_by_its_key_before_a_run_starts(
        archives, tmp_path, None, stage, key, kind, says
    )


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("processor", "best", "processor: 'best' is not one of rs, rest, dt, null"),
        ("data.reward_key", "score", "reward_template: '{input} <rm_score>: {reward} ' lacks {score}"),
        ("data.output_key", "response", "ROWS:1: no field 'response' (data.output_key)"),
    ],
)
def test_what_is_wrong_with_the_labelers_own_keys_is_said_before_it_starts(
    archives: Archives, tmp_path: Path, never_starts: None, key: str, value: Any, says: str
) -> None:
    cfg = labeler_config(tmp_path, archives)
    if key == "data.reward_key":
        cfg.processor = "dt"
    check_refused(reward_labeler.run, cfg, key, value, says, ROWS=str(tmp_path / "rows.jsonl"))
