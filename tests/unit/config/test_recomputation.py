"""What is said of recomputation is done, or refused by its key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_aligner.config.recomputation import RecomputationKeys
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine import checks
from nemo_aligner.errors import ConfigError, LaunchError
from nemo_aligner.planning.config import PlanConfig
from nemo_aligner.planning.plan import make_plan
from tests.tiny import ARCH

KEY = "model.activations_checkpoint"


@pytest.mark.parametrize(
    ("granularity", "method", "layers", "says"),
    [
        ("some", None, None, f"{KEY}_granularity: 'some' is not selective or full"),
        ("full", "nonsense", None, f"{KEY}_method: 'nonsense' is not uniform or block"),
        (None, "nonsense", None, f"{KEY}_method: 'nonsense' is not uniform or block"),
        ("full", None, 1, f"{KEY}_method: {KEY}_granularity=full takes uniform or block"),
        ("full", "block", 0, f"{KEY}_num_layers: 0 is below 1"),
        ("full", "block", -1, f"{KEY}_num_layers: -1 is below 1"),
        (None, "uniform", None, f"{KEY}_method: uniform is for {KEY}_granularity=full alone; leave it out"),
        ("selective", "block", None, f"{KEY}_method: block is for {KEY}_granularity=full alone; leave it out"),
        ("selective", "uniform", 7, f"{KEY}_num_layers: 7 is for {KEY}_granularity=full alone; leave it out"),
        (None, None, 2, f"{KEY}_num_layers: 2 is for {KEY}_granularity=full alone; leave it out"),
    ],
)
def test_what_would_not_be_done_is_refused(
    granularity: str | None, method: str | None, layers: int | None, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RecomputationKeys(granularity, method, layers).check_recomputation()
    assert str(caught.value) == says


def test_what_is_done_is_let_through_and_uniform_beside_selective_as_nemos_yamls_have_it() -> None:
    for keys in ((), ("selective",), ("selective", "uniform"), ("full", "uniform"), ("full", "block", 9)):
        RecomputationKeys(*keys).check_recomputation()


def test_the_layers_of_a_stage_are_a_whole_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = replace(ARCH, num_layers=12)
    monkeypatch.setattr(checks, "read_architecture", lambda path, key: arch)
    for pipeline, virtual, method, layers, fits in (
        (1, None, "uniform", 12, True), (1, None, "uniform", 5, False), (2, None, "uniform", 6, True),
        (2, None, "uniform", 12, False), (2, 3, "uniform", 2, True), (2, 3, "uniform", 3, False),
        (1, None, "block", 5, True), (1, None, "uniform", None, True),
    ):  # fmt: skip
        model = ModelOverrides(
            activations_checkpoint_granularity="full",
            activations_checkpoint_method=method,
            activations_checkpoint_num_layers=layers,
            restore_from_path="m.nemo",
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual,
        )
        sizes = {
            "pipeline_model_parallel_size": pipeline, "virtual_pipeline_model_parallel_size": virtual,
            "activations_checkpoint_method": method, "activations_checkpoint_num_layers": layers,
        }  # fmt: skip
        plan = PlanConfig("m", 2, 80, gpus_per_node=2, activations_checkpoint_granularity="full", **sizes)
        if fits:
            checks.check_training(TrainerConfig(devices=2), model, key="k")
            make_plan(plan, arch)
            continue
        with pytest.raises(
            ConfigError, match=f"^{KEY}_num_layers: {layers} does not divide the .* layers of a pipeline"
        ):
            checks.check_training(TrainerConfig(devices=2), model, key="k")
        with pytest.raises(LaunchError, match="cannot be cut over 2 GPUs"):
            make_plan(plan, arch)
