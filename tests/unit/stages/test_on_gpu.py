"""Whole runs on a GPU: the sampler, labeler, evaluation, trainers and server find there what they find on a CPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.loading import load_for_inference
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.stages.offline import evaluation, random_sampler, reward_labeler
from nemo_aligner.stages.serving import rewards
from nemo_aligner.stages.supervised import reward_training, sft
from tests.fakes import FakeTriton
from tests.pretend_gpu import pretend_gpu
from tests.unit.stages.conftest import Archives
from tests.unit.stages.offline.test_runs import evaluation_config, labeler_config, sampler_config
from tests.unit.stages.plain import opened, read_rows
from tests.unit.stages.serving import test_servers as servers
from tests.unit.stages.supervised.test_runs import rm_config, sft_config

OFFLINE: dict[str, Any] = {
    "sampler": (sampler_config, random_sampler.run),
    "labeler": (labeler_config, reward_labeler.run),
    "evaluation": (evaluation_config, evaluation.run),
}


def adapter_config(folder: Path, archives: Archives, *, merge: bool = False) -> Any:
    cfg = sft_config(folder, archives)
    lora = LoraTuning(adapter_dim=3, target_modules=["all"])
    cfg.model.peft = PeftConfig("lora", merge=merge, lora_tuning=lora)
    return cfg


TRAINERS: dict[str, Any] = {
    "sft": (sft_config, sft.run),
    "sft of an adapter": (adapter_config, sft.run),
    "sft of an adapter, merged": (functools.partial(adapter_config, merge=True), sft.run),
    "reward model": (rm_config, reward_training.run),
}


def on(
    accelerator: str, config: Callable[..., Any], run: Callable[[Any], None], archives: Archives, folder: Path
) -> Any:
    """The config of a run that is over."""
    folder.mkdir()
    cfg = config(folder, archives)
    cfg.trainer.accelerator = accelerator
    with pretend_gpu() if accelerator == "gpu" else nullcontext() as gpu:
        run(cfg)
        assert gpu is None or gpu.uploads


def assert_near(found: Any, expected: Any) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-3) if isinstance(expected, float) else expected)


pytestmark = pytest.mark.processes  # none is started, but they take as long


@pytest.mark.parametrize("stage", OFFLINE)
def test_an_offline_stage_writes_what_it_writes_on_a_cpu(
    stage: str, archives: Archives, tmp_path: Path, alone: None
) -> None:
    folders = [tmp_path / accelerator for accelerator in ("gpu", "cpu")]
    for folder in folders:
        on(folder.name, *OFFLINE[stage], archives, folder)
    read = (lambda path: json.loads(path.read_text())) if stage == "evaluation" else read_rows
    written = [read(folder / "out.jsonl") for folder in folders]
    assert_near(*written)


@pytest.mark.parametrize("stage", TRAINERS)
def test_a_trainer_learns_what_it_learns_on_a_cpu(stage: str, archives: Archives, tmp_path: Path, alone: None) -> None:
    logs, weights = [], []
    for accelerator in ("gpu", "cpu"):
        on(accelerator, *TRAINERS[stage], archives, tmp_path / accelerator)
        log = tmp_path / accelerator / "log"
        logs.append([{k: v for k, v in row.items() if "time" not in k} for row in read_rows(log / "metrics.jsonl")])
        [archive] = (log / "checkpoints").glob("*.nemo")
        with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1) as cluster:
            loaded = load_for_inference(archive, cluster, precision="32", key="path")
            weights.append({name: value.flatten().tolist() for name, value in loaded.module.named_parameters()})
    assert_near(*logs)
    assert_near(*weights)


def test_the_server_answers_as_on_a_cpu(archives: Archives, alone: None) -> None:
    with opened(archives.policy) as plain:
        expected = [plain.tokenizer.decode(plain.likeliest(plain.tokenizer.encode(text), 6)) for text in servers.TEXTS]
    cfg = servers.config(archives)
    cfg.trainer.accelerator = "gpu"

    def talk(client: openai.OpenAI) -> list[str]:
        asked: Any = {"model": "policy", "max_tokens": 6, "temperature": 0}
        return [client.completions.create(prompt=text, **asked).choices[0].text for text in servers.TEXTS]

    with pretend_gpu() as gpu:
        assert servers.serving(cfg, talk) == expected
        assert gpu.waits


def test_the_reward_server_answers_as_on_a_cpu(
    archives: Archives, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tritons = FakeTriton.put_in_place(monkeypatch)
    cfg = servers.reward_config(archives)
    cfg.trainer.accelerator = "gpu"
    sentences = np.array([[text.encode()] for text in servers.TEXTS], dtype=object)
    with pretend_gpu() as gpu:
        [answer] = servers.while_running(
            lambda: rewards.run(cfg),
            lambda: bool(tritons and tritons[0].runs),
            lambda: tritons[0].ask({"sentences": sentences}),
        )
        assert gpu.waits
    with opened(archives.judge) as plain:
        ends = [[*plain.tokenizer.encode(text), plain.tokenizer.eos_id] for text in servers.TEXTS]
        expected = [plain.reward(row).item() for row in ends]
    assert answer["rewards"][:, 0].tolist() == pytest.approx(expected, abs=1e-4)
