"""Keys and settings of experts are used, or refused by their name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.experts import ExpertOverrides
from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine import checks
from nemo_aligner.errors import AlignerError, CheckpointError, ConfigError

NEEDED = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 4}
DENSE = Architecture(2, 8, 16, 4, 9)
ARCH = replace(DENSE, num_moe_experts=4, moe_ffn_hidden_size=12)
CONF = Path(__file__).resolve().parents[3] / "conf/model"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("moe_router_topk", 5), ("moe_router_topk", 0), ("moe_router_topk", 1), ("moe_layer_freq", 0),
        ("moe_layer_freq", [1]), ("moe_layer_freq", [0, 0]), ("moe_layer_freq", "([1]*2)"),
        ("moe_router_load_balancing_type", "sinkhorn"), ("moe_router_load_balancing_type", ["aux_loss"]),
        ("moe_expert_capacity_factor", 1.0), ("moe_shared_expert_intermediate_size", 8),
        ("moe_router_topk_scaling_factor", 2.0),
        ("moe_router_group_topk", 2), ("moe_input_jitter_eps", 0.1), ("moe_aux_loss_coeff", [0.1]),
    ],
)  # fmt: skip
def test_an_archive_with_other_experts_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"model_config.yaml: {setting}="):
        Architecture.from_nemo({**NEEDED, "num_moe_experts": 4, setting: value})


def test_biases_beside_experts_are_refused() -> None:
    with pytest.raises(CheckpointError, match="num_moe_experts=4 is not to be had with biases"):
        Architecture.from_nemo({**NEEDED, "num_moe_experts": 4, "bias": True})


def test_an_archive_without_experts_says_nothing_of_them_and_none_is_none() -> None:
    assert not [name for name in DENSE.to_nemo() if name.startswith("moe_")]
    for none in (None, 0, 1):
        arch = Architecture.from_nemo({**NEEDED, "num_moe_experts": none, "moe_aux_loss_coeff": 0.1})
        assert arch.num_moe_experts is None
        assert not any(arch.has_experts(layer) for layer in range(2))


def test_layers_with_experts_are_every_nth_or_those_named() -> None:
    for freq, expected in ((1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), (3, [1, 0, 0, 1]), ([0, 1, 1, 0], [0, 1, 1, 0])):
        arch = replace(ARCH, num_layers=4, moe_layer_freq=freq)
        assert [int(arch.has_experts(layer)) for layer in range(4)] == expected


@pytest.mark.parametrize(
    ("changes", "devices", "key", "says"),
    [
        ({"expert_model_parallel_size": 3}, 3, "model.expert_model_parallel_size", "does not divide the 4 experts"),
        ({"expert_model_parallel_size": 2}, 3, "model.expert_model_parallel_size", "does not divide the 3 ranks of a"),
        (
            {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2}, 4,
            "model.expert_model_parallel_size", "does not divide the 2 ranks of a pipeline stage",
        ),
        ({"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 5}, 10, "expert_tensor_parallel_size", "12"),
        ({"expert_tensor_parallel_size": 2}, 2, "model.expert_tensor_parallel_size", "is not tensor_model"),
        ({"tensor_model_parallel_size": 2}, 2, "model.sequence_parallel", "only if this is True"),
        (
            {"peft": PeftConfig("lora", lora_tuning=LoraTuning(target_modules=["attention", "mlp_fc2"]))}, 1,
            "model.peft.lora_tuning.target_modules", "in its attention alone",
        ),
    ],
)  # fmt: skip
def test_a_run_that_is_not_supported_is_refused_by_its_key(
    changes: dict[str, Any], devices: int, key: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "read_architecture", lambda path, key: ARCH)
    model = ModelOverrides(restore_from_path="m.nemo")
    for name, value in changes.items():
        setattr(model, name, value)
    with pytest.raises(AlignerError) as caught:
        checks.check_training(TrainerConfig(devices=devices), model, key="model.restore_from_path")
    assert key in str(caught.value)
    assert says in str(caught.value)


def test_the_cuts_that_are_supported_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "read_architecture", lambda path, key: replace(ARCH, pipeline_model_parallel_size=2))
    for devices, tensor, pipeline, context, ep, etp in (
        (1, 1, 1, 1, 1, None),
        (2, 1, 1, 1, 2, 1),
        (2, 2, 1, 1, 2, 1),
        (2, 2, 1, 1, 1, 2),
        (4, 1, 1, 1, 2, 2),
        (8, 2, 1, 1, 2, 4),
        (4, 1, 2, 1, 2, 1),
        (8, 1, 2, 2, 4, 1),
    ):
        model = ModelOverrides(restore_from_path="m.nemo", tensor_model_parallel_size=tensor, sequence_parallel=True)
        model.pipeline_model_parallel_size, model.context_parallel_size = pipeline, context
        model.peft.peft_scheme = "lora"
        model.expert_model_parallel_size, model.expert_tensor_parallel_size = ep, etp
        checks.check_training(TrainerConfig(devices=devices), model, key="model.restore_from_path")
    assert checks.parallel_sizes(TrainerConfig(devices=2), "m.nemo", key="k") == (1, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_model_parallel_size", 2), ("expert_tensor_parallel_size", 1), ("moe_aux_loss_coeff", 0.0),
        ("moe_z_loss_coeff", 0.1), ("moe_router_load_balancing_type", "none"),
    ],
)  # fmt: skip
def test_keys_of_experts_are_refused_for_a_model_without(key: str, value: Any) -> None:
    asked = ExpertOverrides(**{key: value})
    asked.check_experts()
    asked.check_model_has_experts(ARCH)
    with pytest.raises(ConfigError, match=f"model.{key}: the model has no experts"):
        asked.check_model_has_experts(DENSE)
    ExpertOverrides().check_model_has_experts(DENSE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_model_parallel_size", 0), ("expert_tensor_parallel_size", 0), ("moe_aux_loss_coeff", -1.0),
        ("moe_z_loss_coeff", float("nan")), ("moe_router_load_balancing_type", "sinkhorn"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"model.{key}"):
        ExpertOverrides(**{key: value}).check_experts()


def test_the_losses_of_a_run_stand_in_for_those_of_the_archive() -> None:
    stored = replace(ARCH, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.25)
    assert ExpertOverrides().with_router_settings(stored) == stored
    asked = ExpertOverrides(moe_aux_loss_coeff=0.0, moe_router_load_balancing_type="seq_aux_loss")
    expected = replace(stored, moe_aux_loss_coeff=0.0, moe_router_load_balancing_type="seq_aux_loss")
    assert asked.with_router_settings(stored) == expected


@pytest.mark.parametrize(("name", "billions"), [("mixtral_8x7b", 46.7), ("qwen3_30b_a3b", 30.5)])
def test_the_shapes_have_as_many_parameters_as_the_models_they_are_named_for(name: str, billions: float) -> None:
    arch = Architecture.from_nemo(yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    experts = 3 * arch.hidden_size * arch.expert_ffn_hidden_size * (arch.num_moe_experts or 0)
    heads = 2 * (arch.num_attention_heads + arch.query_groups) * arch.head_dim
    layer = experts + heads * arch.hidden_size
    assert (arch.num_layers * layer + 2 * arch.vocab_size * arch.hidden_size) / 1e9 == pytest.approx(billions, abs=0.06)
