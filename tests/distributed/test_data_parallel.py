"""However data-parallel ranks share gradients, weights and Adam's state, a step is the step of plain Adam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from tests.distributed.helpers import run_ranks
from tests.distributed.test_parallel_invariance import EXAMPLES, ROWS, write_archives

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "summed in buckets": {"name": "adamw", "overlap_grad_sync": True, "bucket_cap_mb": 0.008},
    "sharded": {"name": "distributed_fused_adam"},
    "sharded, weights fetched late": {"name": "distributed_fused_adam", "overlap_param_sync": True},
    "sharded, all at once": {
        "name": "distributed_fused_adam",
        "overlap_grad_sync": True,
        "overlap_param_sync": True,
        "bucket_cap_mb": 0.008,
    },
}
PRECISIONS = ("32", "bf16")


def trained(cluster: Any, folder: Path, optim: dict[str, Any], precision: str) -> Any:
    from nemo_aligner.engine.policy import load_policy_for_training

    overrides = ModelOverrides(restore_from_path=str(folder / "policy.nemo"), precision=precision)
    model = load_policy_for_training(overrides, TrainerConfig(precision=precision), cluster)
    model.add_optimizer(OptimConfig(lr=1e-2, **optim), clip_grad=1.0, max_steps=4)
    return model


def steps(cluster: Any, model: Any, numbers: range) -> list[Any]:
    """Loss, gradient's norm and the log-probabilities afterwards of each step, on two micro-batches a rank."""
    from nemo_aligner.stages.batches import microbatches
    from nemo_aligner.stages.supervised.loop import sft_objective

    found = []
    for step in numbers:
        rows = [(step + i) % 4 for i in range(4)]
        batch = microbatches(EXAMPLES, rows, size=1, dp_rank=cluster.dp_rank, dp_size=cluster.dp_size, pad_id=258)
        metrics = model.train_step(batch, sft_objective)
        if step % 2:  # every other time another step comes next
            found.append([metrics.loss, metrics.grad_norm, [row.tolist() for row in model.logprobs(ROWS, 2)]])
    return found


def measure(cluster: Any, folder: Path) -> None:
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        for name, optim in {"plain": {"name": "adamw"}, **OPTIMIZERS}.items():
            model = trained(cluster, folder, optim, precision)
            found[f"{name} {precision}"] = steps(cluster, model, range(2))
            saving = model.save_in_background(folder / f"{name} {precision}", {"step": 2})
            found[f"{name} {precision} buckets"] = len(model._wrapped.bucket_groups)
            found[f"{name} {precision} goes on"] = steps(cluster, model, range(2, 4))
            saving.finish()
    if cluster.is_main:
        (folder / "found.json").write_text(json.dumps(found))


def resume(cluster: Any, folder: Path, ranks: str) -> None:
    """Every run from its checkpoint, state that was whole too, in buckets of another size; one rank has it whole."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        for name, optim in {"plain": {}, **OPTIMIZERS}.items():
            other = {"name": "distributed_fused_adam", **optim, "bucket_cap_mb": 0.003}
            model = trained(cluster, folder, other, precision)
            model.load_training_state(folder / f"{name} {precision}")
            found[f"{name} {precision}"] = steps(cluster, model, range(2, 4))
    if cluster.is_main:
        (folder / f"resumed {ranks}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(1, write_archives, folder, 2)  # of more, bf16 weights come to differ by what sums in another order leave
    run_ranks(2, measure, folder)
    for ranks in (1, 2):
        run_ranks(ranks, resume, folder, str(ranks))
    return folder


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharing_changes_when_ranks_speak_and_not_what_is_learnt(name: str, precision: str, folder: Path) -> None:
    found = json.loads((folder / "found.json").read_text())
    assert (found[f"{name} {precision} buckets"] > 1) == OPTIMIZERS[name].get("overlap_grad_sync", False)
    for key in (precision, f"{precision} goes on"):
        assert flat(found[f"{name} {key}"]) == pytest.approx(flat(found[f"plain {key}"]), abs=1e-4)


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["plain", *OPTIMIZERS])
def test_a_checkpoint_goes_on_in_other_buckets_on_any_number_of_ranks(
    name: str, precision: str, ranks: str, folder: Path
) -> None:
    resumed = json.loads((folder / f"resumed {ranks}.json").read_text())[f"{name} {precision}"]
    found = json.loads((folder / "found.json").read_text())[f"{name} {precision} goes on"]
    assert flat(resumed) == pytest.approx(flat(found), abs=1e-4)
