"""Weights that stay in memory are those of their archive, bit for bit, and no others are taken for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_aligner.config.peft import PeftConfig
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine.checkpoints import nemo_archive, resident
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import MegatronPolicy, load_policy, load_policy_for_training
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.reward_model import load_reward_model
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.stages.supervised.loop import sft_objective
from tests.tiny import ARCHIVED, OPTIM, rows

ON_CPU = TrainerConfig(accelerator="cpu", precision="bf16")
JUDGE = replace(ARCHIVED, reward_model_type="binary_ranking")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(ON_CPU, tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture
def archive(cluster: MegatronCluster, tmp_path: Path) -> Path:
    """Of float32 weights, so that what is loaded in bf16 is rounded."""
    for arch, name in ((ARCHIVED, "policy"), (JUDGE, "judge")):
        model, tokenizer = build_model(arch, RunOptions()), FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
        nemo_archive.save_archive(tmp_path / f"{name}.nemo", model, arch, tokenizer, cluster)
    return tmp_path / "policy.nemo"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the archives whose weights have been read, in a process that runs one stage after another."""
    names: list[str] = []
    open_archive = nemo_archive.open_archive
    monkeypatch.setattr(
        nemo_archive,
        "open_archive",
        lambda path, *more, **named: names.append(Path(path).name) or open_archive(path, *more, **named),
    )
    monkeypatch.setattr(resident, "_residents", {})
    return names


def bits(model: MegatronTrainable) -> dict[str, torch.Tensor]:
    """A copy of its weights."""
    state = model.module.state_dict().items()
    return {name: value.clone() for name, value in state if isinstance(value, torch.Tensor)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


def trained(archive: Path, cluster: MegatronCluster, steps: int) -> MegatronPolicy:
    policy = load_policy_for_training(ModelOverrides(restore_from_path=str(archive)), ON_CPU, cluster)
    policy.add_optimizer(OPTIM, clip_grad=0.0, max_steps=4)
    for _ in range(steps):
        policy.train_step([rows()], sft_objective)
    return policy


def test_what_a_training_wrote_is_what_the_next_stage_has(
    archive: Path, cluster: MegatronCluster, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_policy(archive, cluster, precision="bf16").stay_in_memory()
    before = torch.get_rng_state()
    policy = trained(archive, cluster, steps=2)
    after = torch.get_rng_state()
    assert opened == ["policy.nemo"], "read by the first alone"
    new = archive.with_name("new.nemo")
    policy.save_nemo(new)
    policy.stay_in_memory()
    own = bits(load_policy(new, cluster, precision="bf16"))
    assert opened == ["policy.nemo"]
    # all of it as in processes of their own
    monkeypatch.setattr(resident, "_residents", None)
    torch.set_rng_state(before)
    other = trained(archive, cluster, steps=2)
    assert after.equal(torch.get_rng_state()), "dropout is the same"
    other.save_nemo(archive.with_name("other.nemo"))
    assert archive.with_name("other.nemo").read_bytes() == new.read_bytes()
    assert same(own, bits(load_policy(new, cluster, precision="bf16")))


def test_a_policy_and_a_reward_model_stay_side_by_side(
    archive: Path, cluster: MegatronCluster, opened: list[str]
) -> None:
    judge = archive.with_name("judge.nemo")
    first = load_reward_model(judge, cluster, precision="bf16")
    rewards, weights = first.score([[5, 6, 7], [8, 9]], 2), bits(first)
    first.score([[5, 6, 7]], 1)  # its weights are packed now
    first.stay_in_memory()
    load_policy(archive, cluster, precision="bf16").stay_in_memory()
    again = load_reward_model(judge, cluster, precision="bf16")
    assert opened == ["judge.nemo", "policy.nemo"]
    assert same(bits(again), weights)
    assert again.score([[5, 6, 7], [8, 9]], 2) == rewards


@pytest.mark.parametrize("other", ["bytes", "precision", "trained since", "not left", "one process each"])
def test_an_archive_is_read_where_memory_has_other_weights(
    other: str, archive: Path, cluster: MegatronCluster, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if other == "one process each":
        monkeypatch.setattr(resident, "_residents", None)
    policy = trained(archive, cluster, steps=int(other == "trained since"))
    if other != "not left":
        policy.stay_in_memory()
    if other == "bytes":  # a tar file may end in more zeros than it needs
        archive.write_bytes(archive.read_bytes() + b"\0" * 10240)
    opened.clear()
    load_policy(archive, cluster, precision="32" if other == "precision" else "bf16")
    assert opened == ["policy.nemo"]


def test_an_adapter_is_trained_beside_weights_that_are_read(
    archive: Path, cluster: MegatronCluster, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapted(name: str) -> bytes:
        model = ModelOverrides(restore_from_path=str(archive), peft=PeftConfig("lora", merge=True))
        policy = load_policy_for_training(model, ON_CPU, cluster)
        policy.add_optimizer(OPTIM, clip_grad=0.0, max_steps=4)
        policy.train_step([rows()], sft_objective)
        policy.save_nemo(archive.with_name(name))
        policy.stay_in_memory()
        return archive.with_name(name).read_bytes()

    load_policy(archive, cluster, precision="bf16").stay_in_memory()
    before = torch.get_rng_state()
    merged = adapted("merged.nemo")
    load_policy(archive.with_name("merged.nemo"), cluster, precision="bf16")
    assert opened == ["policy.nemo", "policy.nemo", "merged.nemo"]
    monkeypatch.setattr(resident, "_residents", None)
    torch.set_rng_state(before)
    assert adapted("other.nemo") == merged, "as in a process of its own"


def test_what_is_not_asked_for_again_goes(archive: Path, cluster: MegatronCluster, opened: list[str]) -> None:
    load_policy(archive, cluster, precision="bf16").stay_in_memory()
    load_policy(archive, cluster, precision="32")
    load_policy(archive, cluster, precision="bf16")
    assert len(opened) == 3
