"""A model is cut only as its heads, key/value groups, FFN and layers can be shared out, whoever asks for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.cut import Sizes, can_cut, check_cut, uneven
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine import checks
from nemo_aligner.engine.conversion import Checkpoint, write_archive
from nemo_aligner.errors import CheckpointError, ConfigError
from nemo_aligner.planning.config import PlanConfig, of_run
from nemo_aligner.stages.offline.data import check_archive
from tests.tiny import ARCH, EXPERTS

WIDE = replace(ARCH, num_attention_heads=8, num_query_groups=2, ffn_hidden_size=64, num_layers=6)
GROUPS = "4 does not divide the 2 key/value groups of "


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the shape of every archive."""

    def put(arch: Architecture) -> None:
        monkeypatch.setattr(checks, "read_architecture", lambda path, key: arch)

    return put


@pytest.mark.parametrize(
    ("arch", "cut", "key", "says"),
    [
        (WIDE, {"tensor": 4}, "tensor_model_parallel_size", f"{GROUPS}m.nemo"),
        (replace(WIDE, num_query_groups=1), {"tensor": 2}, "tensor_model_parallel_size", "the 1 key/value groups"),
        (
            replace(WIDE, num_attention_heads=6, num_query_groups=3), {"tensor": 2},
            "tensor_model_parallel_size", "the 3 key/value groups",
        ),
        (replace(WIDE, num_query_groups=8), {"tensor": 16}, "tensor_model_parallel_size", "the 8 heads of m.nemo"),
        (
            replace(WIDE, num_query_groups=4, ffn_hidden_size=50), {"tensor": 4},
            "tensor_model_parallel_size", "4 does not divide the FFN size 50 of m.nemo",
        ),
        (WIDE, {"pipeline": 4}, "pipeline_model_parallel_size", "4 does not divide the 6 layers of m.nemo"),
        (
            WIDE, {"pipeline": 2, "virtual": 2}, "virtual_pipeline_model_parallel_size",
            "2 stages on each of 2 ranks do not divide the 6 layers of m.nemo",
        ),
        (
            WIDE, {"virtual": 2}, "virtual_pipeline_model_parallel_size",
            "2 stages on a rank take model.pipeline_model_parallel_size above 1, and it is 1",
        ),
    ],
)  # fmt: skip
def test_a_cut_that_the_model_does_not_take_is_refused_by_its_key(
    arch: Architecture, cut: dict[str, int], key: str, says: str, archive: Any
) -> None:
    archive(arch)
    assert not can_cut(arch, **cut)
    sizes = {"tensor": 1, "pipeline": 1, **cut}
    for prefix in ("", "model."):
        with pytest.raises(ConfigError) as caught:
            checks.parallel_sizes(TrainerConfig(devices=16), "m.nemo", Sizes(**sizes, prefix=prefix), key="k")
        assert str(caught.value).startswith(f"{prefix}{key}: ")
        assert says.replace("model.", prefix) in str(caught.value)
    model = ModelOverrides(restore_from_path="m.nemo")
    model.tensor_model_parallel_size, model.pipeline_model_parallel_size = sizes["tensor"], sizes["pipeline"]
    model.virtual_pipeline_model_parallel_size = sizes.get("virtual")
    with pytest.raises(ConfigError, match=f"^model.{key}: .*{says}"):
        checks.check_training(TrainerConfig(devices=16), model, key="model.restore_from_path")


def test_what_the_model_takes_is_let_through() -> None:
    for tensor, pipeline, virtual in ((1, 1, 1), (2, 1, 1), (1, 6, 1), (2, 3, 2), (1, 2, 3)):
        check_cut(WIDE, tensor=tensor, pipeline=pipeline, virtual=virtual)
    check_cut(replace(WIDE, num_query_groups=None), tensor=8)


def test_only_sizes_that_a_layer_has_are_looked_at() -> None:
    assert [*uneven(replace(EXPERTS, moe_ffn_hidden_size=25), 2)] == ["experts' FFN size 25"]
    assert [*uneven(replace(EXPERTS, ffn_hidden_size=49), 2)] == ["FFN size 49"], "of the layer without experts"
    assert [*uneven(replace(EXPERTS, ffn_hidden_size=49, moe_layer_freq=1), 2)] == []
    assert [*uneven(replace(ARCH, moe_ffn_hidden_size=25), 2)] == []


@pytest.mark.parametrize(
    ("tensor", "pipeline", "asked", "found"),
    [
        (8, 1, {}, (2, 1)),  # which the key/value groups allow
        (8, 1, {"tensor": 1}, (1, 1)),
        (1, 4, {}, (1, 2)),  # 4 does not divide 6 layers
        (2, 4, {}, (2, 2)),
        (1, 8, {"virtual": 3}, (1, 2)),
        (8, 2, {"pipeline": 2}, (2, 2)),
    ],
)
def test_stored_sizes_are_reduced_to_what_the_model_and_the_processes_allow_in_a_plan_too(
    tensor: int, pipeline: int, asked: dict[str, int], found: tuple[int, int], archive: Any
) -> None:
    arch = replace(WIDE, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    archive(arch)
    assert checks.parallel_sizes(TrainerConfig(devices=8), "m.nemo", Sizes(**asked), key="k") == found
    run = {f"{name}_model_parallel_size": asked.get(name, -1) for name in ("tensor", "pipeline")}
    run["virtual_pipeline_model_parallel_size"] = asked.get("virtual")
    counted = of_run(
        PlanConfig("m", gpu_memory_gb=80, run="r"),
        OmegaConf.create({"trainer": {"sft": {}, "devices": 8, "num_nodes": 1}, "model": run}),
        arch,
    )
    assert (counted.tensor_model_parallel_size, counted.pipeline_model_parallel_size) == found


def test_every_archive_of_an_evaluation_fits_its_processes(tmp_path: Path) -> None:
    for name, groups in (("one", 4), ("two", 2)):
        (tmp_path / name).mkdir()
        shape = replace(WIDE, num_query_groups=groups, tensor_model_parallel_size=4).to_nemo()
        (tmp_path / name / "model_config.yaml").write_text(yaml.safe_dump(shape))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    cfg = EvaluationConfig(policy_files=[one, two], trainer=TrainerConfig(devices=4))
    check_archive(cfg, one, one, None)
    with pytest.raises(ConfigError, match=f"^tensor_model_parallel_size: {GROUPS}{two}$"):
        check_archive(cfg, one, one, two)


def test_an_archive_is_written_by_as_many_processes_as_its_weights_can_be_shared_out_among(tmp_path: Path) -> None:
    for tensor, says in ((4, "it does not divide the model's 2 key/value groups"), (0, "it is below 1")):
        with pytest.raises(CheckpointError, match=f"^--tensor-parallel {tensor}: {says}$"):
            write_archive(Checkpoint(WIDE, {}, b""), tmp_path / "m.nemo", precision="32", seed=1, tensor=tensor)  # type: ignore[arg-type]
