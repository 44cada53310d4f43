"""Several pipeline stages on a rank: which layers each has, tied weights, and files that any other layout reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.engine.checkpoints import resident
from nemo_aligner.engine.checkpoints.nemo_archive import save_archive
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.loading import load_for_inference
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import load_policy, load_policy_for_training
from nemo_aligner.engine.processes.cluster import start_cluster
from tests.distributed.helpers import Cut, Job, run_jobs
from tests.distributed.test_parallel_invariance import EXAMPLES, close, dealt
from tests.tiny import ARCHIVED

TIED = replace(
    ARCHIVED,
    num_layers=4,
    share_embeddings_and_output_weights=True,
    position_embedding_type="learned_absolute",
    normalization="layernorm",
    init_method_std=0.1,
)


def policy(cluster: Any, path: Path, stages: int | None) -> Any:
    overrides = ModelOverrides(restore_from_path=str(path), virtual_pipeline_model_parallel_size=stages)
    found = load_policy_for_training(overrides, TrainerConfig(precision="32"), cluster)
    optim = OptimConfig(name="adamw", lr=1e-2, overlap_grad_sync=True, bucket_cap_mb=0.01)
    found.add_optimizer(optim, clip_grad=1.0, max_steps=4)
    return found


def steps(cluster: Any, trained: Any) -> list[list[float]]:
    """Loss and norm of the gradient: of 4, 3 and 1 micro-batches."""
    from nemo_aligner.stages.supervised.loop import sft_objective

    batches = [dealt(cluster, EXAMPLES, range(count), 1) for count in (4, 3, 1)]
    metrics = [trained.train_step(batch, sft_objective) for batch in batches]
    return [[each.loss, each.grad_norm] for each in metrics]


def interleaved(cluster: Any, folder: Path) -> None:
    """Two stages on each of two ranks: trained, and handed to one stage on each and back."""
    trained = policy(cluster, folder / "policy.nemo", 2)
    found: dict[str, Any] = {"layers": cluster.gather_ranks([x.layer_number for x in trained.module.decoder.layers])}
    trained.save_nemo(folder / "untrained.nemo")
    found["steps"] = steps(cluster, trained)
    for name, stages in (("two", None), ("one", 2)):
        trained.save_training_state(folder / f"{name} stages", {"step": 3})
        trained = policy(cluster, folder / "policy.nemo", stages)
        trained.load_training_state(folder / f"{name} stages")
        trained.save_nemo(folder / f"after {name} stages.nemo")
    found["goes on"] = steps(cluster, trained)
    resident.stay_from_now_on()
    trained.save_nemo(folder / "left.nemo")
    trained.stay_in_memory()  # other layers than those of the next model's rank
    load_policy(folder / "left.nemo", cluster, precision="32").save_nemo(folder / "read again.nemo")
    if cluster.is_main:
        (folder / "found.json").write_text(json.dumps(found))


def weights(cluster: Any, path: Path) -> dict[str, torch.Tensor]:
    module = load_for_inference(path, cluster, precision="32", key="k").module
    return dict(module.named_parameters())


def test_two_stages_on_a_rank_are_trained_and_saved_as_one_process_does(tmp_path: Path) -> None:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=7) as cluster:
        model, tokenizer = build_model(TIED, RunOptions()), FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
        save_archive(tmp_path / "policy.nemo", model, TIED, tokenizer, cluster)
    run_jobs(2, [Job(Cut(pipeline=2), interleaved, (tmp_path,))])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["layers"] == [[1, 3], [2, 4]]
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=7) as cluster:
        one = policy(cluster, tmp_path / "policy.nemo", None)
        close(found["steps"], steps(cluster, one), 1e-4)
        close(found["goes on"], steps(cluster, one), 2e-3)
        begun = weights(cluster, tmp_path / "policy.nemo")
        untrained, first, second = (
            weights(cluster, tmp_path / f"{name}.nemo")
            for name in ("untrained", "after two stages", "after one stages")
        )
        left, again = (weights(cluster, tmp_path / f"{name}.nemo") for name in ("left", "read again"))
        for name, value in begun.items():
            assert torch.equal(untrained[name], value), name
            assert torch.equal(first[name], second[name]), name
            assert torch.equal(left[name], again[name]), name
            assert not torch.equal(first[name], value), name
