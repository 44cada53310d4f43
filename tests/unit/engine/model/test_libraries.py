"""What is asked for of NVIDIA's libraries is in use or refused; a model is the same whoever computes it.

Transformer Engine runs on GPUs alone. Modules with its names and its layout of parameters stand in for it; that its
kernels compute the same is what scripts/gpu_check.sh compares on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine_spec_provider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.libraries import LibraryKeys
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints import archive_weights, nemo_archive
from nemo_aligner.engine.checkpoints.sharded import without_extra_state
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.checkpoints.whole_weights import pieces
from nemo_aligner.engine.generation.decode import Layer
from nemo_aligner.engine.interfaces import GenerationRequest
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model import libraries
from nemo_aligner.engine.model.build import RunOptions, activation_of, build_model, transformer_config
from nemo_aligner.engine.model.libraries import Libraries, Machine, choose
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.supervised.loop import sft_objective
from tests.tiny import ARCH, ARCHIVED, OPTIM, rows

ABSENT = "it is not installed"
NOTHING = Machine(True, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT, "torch")
ALL = Machine(True, None, None, None, None, None, "transformer_engine")
ON_CPU = replace(NOTHING, on_gpu=False, compiler=None)
WIDE = replace(ARCH, hidden_size=64, ffn_hidden_size=96)


def chosen(
    machine: Machine,
    arch: Architecture = WIDE,
    *,
    lora: bool = False,
    tp: int = 1,
    selective: bool = False,
    **keys: Any,
) -> Libraries:
    asked = LibraryKeys(**keys)
    asked.check_libraries()
    return choose(asked, machine, arch, activation=activation_of(arch), tp=tp, lora=lora, selective=selective)


def test_by_default_a_gpu_uses_what_there_is_and_a_cpu_nothing() -> None:
    assert chosen(NOTHING) == chosen(ON_CPU) == Libraries()
    everything = Libraries(
        transformer_engine=True,
        fuses_norms=True,
        gradient_accumulation=True,
        bias_activation=True,
        bias_dropout_add=True,
        rope=True,
        adam="transformer_engine",
    )
    assert chosen(ALL) == everything
    own = replace(everything, transformer_engine=False, fuses_norms=False)
    assert chosen(ALL, transformer_engine=False) == own
    adapted = replace(everything, fuses_norms=False, gradient_accumulation=False)
    assert chosen(ALL, lora=True) == adapted
    layer_norm = replace(WIDE, normalization="layernorm")
    assert chosen(ALL, layer_norm, transformer_engine=False) == replace(own, layer_norm=True)


@pytest.mark.parametrize(
    "key", ["gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_add_fusion", "apply_rope_fusion"]
)
def test_each_fusion_is_switched_off_by_its_own_key(key: str) -> None:
    name = key.removesuffix("_fusion").removeprefix("apply_")
    assert chosen(ALL, **{key: False}) == replace(chosen(ALL), **{name: False})


def test_a_fused_form_that_computes_something_else_is_for_those_who_ask() -> None:
    gelu = replace(WIDE, activation="geglu")
    assert chosen(ALL, gelu) == replace(chosen(ALL), bias_activation=False)
    assert chosen(ALL, gelu, bias_activation_fusion=True) == chosen(ALL)


def test_without_a_gpu_a_fusion_that_needs_none_is_in_use_where_it_is_asked_for() -> None:
    assert chosen(ON_CPU, bias_activation_fusion=True) == Libraries(bias_activation=True)
    assert chosen(ON_CPU, bias_dropout_add_fusion=True) == Libraries(bias_dropout_add=True)


def test_selective_recomputation_takes_the_activation_by_itself_where_it_is_megatrons() -> None:
    said = r"^model\.bias_activation_fusion: True, and selective recomputation has the activation by itself; leave"
    with pytest.raises(ConfigError, match=said):
        chosen(ON_CPU, selective=True, bias_activation_fusion=True)
    bare = replace(ALL, transformer_engine=ABSENT)
    assert (chosen(bare).bias_activation, chosen(bare, selective=True).bias_activation) == (True, False)
    assert chosen(ALL, selective=True) == chosen(ALL), "Transformer Engine's layers keep theirs"
    experts = replace(WIDE, num_moe_experts=4)
    assert chosen(bare, experts, selective=True) == chosen(bare, experts)


@pytest.mark.parametrize(
    ("machine", "changes", "keys", "message"),
    [
        (NOTHING, {}, {"transformer_engine": True}, "model.transformer_engine: True, and it is not installed; pip"),
        (NOTHING, {}, {"fp8": True}, "model.fp8: True, and it is not installed; leave it out"),
        (NOTHING, {}, {"gradient_accumulation_fusion": True}, "model.gradient_accumulation_fusion: True, and it is"),
        (NOTHING, {}, {"bias_activation_fusion": True}, "model.bias_activation_fusion: True, and it is not installed"),
        (NOTHING, {}, {"bias_dropout_add_fusion": True}, "model.bias_dropout_add_fusion: True, and it is not"),
        (NOTHING, {}, {"apply_rope_fusion": True}, "model.apply_rope_fusion: True, and it is not installed"),
        (ALL, {}, {"persist_layer_norm": True}, "model.persist_layer_norm: True, and the model's norms are RMSNorm"),
        (
            ALL,
            {"position_embedding_type": "learned_absolute"},
            {"apply_rope_fusion": True},
            "model.apply_rope_fusion: True, and the model's positions are learned",
        ),
        (
            ALL,
            {"activation": "squared-relu"},
            {"bias_activation_fusion": True},
            "model.bias_activation_fusion: True, and there is no fused form of squared-relu without a bias",
        ),
        (
            ALL,
            {"normalization": "layernorm"},
            {"persist_layer_norm": True},
            "model.persist_layer_norm: True, and the norms are Transformer Engine's",
        ),
        (ALL, {"ffn_hidden_size": 72}, {"fp8": True}, "model.fp8: it takes multiples of 16, and ffn_hidden_size"),
        (ALL, {}, {"fp8": True, "transformer_engine": False}, "model.fp8: it takes Transformer Engine, and"),
        (ALL, {}, {"fp8": True, "fp8_e4m3": True}, "model.fp8: give one of model.fp8_e4m3 and model.fp8_hybrid"),
        (ALL, {}, {"transformer_engine": "yes"}, "model.transformer_engine: 'yes' is not auto, True or False"),
        (ALL, {}, {"fp8_amax_compute_algo": "min"}, "model.fp8_amax_compute_algo: 'min' is not max or most_recent"),
        (ALL, {}, {"masked_softmax_fusion": False}, "model.masked_softmax_fusion: False is not offered"),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_not_there_is_one_line(
    machine: Machine, changes: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as fault:
        chosen(machine, replace(WIDE, **changes), **keys)
    assert str(fault.value).startswith(message)


def test_one_line_says_what_is_in_use() -> None:
    assert str(Libraries()) == "layers of Megatron; fused: nothing; Adam of torch"
    assert str(chosen(ALL, fp8=True)) == (
        "layers of Transformer Engine, products in fp8 (hybrid); fused: gradient_accumulation, bias_activation, "
        "bias_dropout_add, rope; Adam of Transformer Engine"
    )


def test_a_library_that_is_broken_is_not_there_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError("libcudnn.so.9:\nno such file")

    assert libraries._missing("no_such_library.part", True) == "no_such_library is not installed"
    assert libraries._missing("torch", False) == "this run is on a CPU"
    monkeypatch.setattr("importlib.import_module", fails)
    assert libraries._missing("apex", True) == "apex cannot be imported (libcudnn.so.9: no such file)"


class _NormThenLinear(ColumnParallelLinear):
    """A norm and the product after it as one module, with the parameters that Transformer Engine's has."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shape, weight, eps = self.layer_norm_weight.shape, self.layer_norm_weight, self.config.layernorm_epsilon
        if self.config.normalization == "RMSNorm":
            return super().forward(F.rms_norm(x, shape, weight, eps), *args, **kwargs)
        return super().forward(F.layer_norm(x, shape, weight, self.layer_norm_bias, eps), *args, **kwargs)


class _EitherNorm:
    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> nn.Module:  # type: ignore[misc]
        return (nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm)(hidden_size, eps=eps)


class _StandIns:
    def column_parallel_layer_norm_linear(self) -> type:
        return _NormThenLinear

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return _EitherNorm


@pytest.fixture(scope="module")
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, cluster: MegatronCluster) -> Libraries:
    """Layers of Transformer Engine's, with its parameters."""
    monkeypatch.setattr(transformer_engine_spec_provider, "TESpecProvider", _StandIns)
    return Libraries(transformer_engine=True, fuses_norms=True)


SHAPES = {
    "llama": ARCHIVED,
    "norms of heads": replace(ARCHIVED, qk_layernorm=True),
    "biases": replace(ARCHIVED, bias=True, normalization="layernorm", activation="gelu"),
}
FUSED_NAMES = {"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"}


def saved(path: Path, model: nn.Module, arch: Architecture, cluster: MegatronCluster) -> Path:
    nemo_archive.save_archive(path, model, arch, FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER), cluster)  # type: ignore[arg-type]
    return path


def shaken(arch: Architecture, run: RunOptions) -> nn.Module:
    """A model of which no two weights are the same, its norms' least of all."""
    torch.manual_seed(3)
    model = build_model(arch, run)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def loaded(path: Path, arch: Architecture, run: RunOptions, cluster: MegatronCluster) -> nn.Module:
    model = build_model(arch, run)
    with nemo_archive.open_archive(path, cluster) as folder:
        archive_weights.load_weights(model, folder, cluster)
    return model


def contents(path: Path, arch: Architecture, cluster: MegatronCluster) -> dict[str, torch.Tensor]:
    """The whole tensors of an archive, under their names where norms are modules of their own."""
    with nemo_archive.open_archive(path, cluster) as folder:
        whole = archive_weights.whole_tensors(build_model(arch, RunOptions(shapes_only=True)), folder)
        return {name: whole[name] for name in whole.parts}


@pytest.mark.processes
@pytest.mark.parametrize("shape", SHAPES)
def test_an_archive_of_one_kind_of_layers_is_that_of_the_other(
    shape: str, engine: Libraries, cluster: MegatronCluster, tmp_path: Path
) -> None:
    arch = SHAPES[shape]
    fused, plain = RunOptions(libraries=engine), RunOptions()
    first = saved(tmp_path / "fused.nemo", shaken(arch, fused), arch, cluster)
    there = loaded(first, arch, plain, cluster)
    names = {name.partition(".layers.0.")[2] for name, _ in build_model(arch, fused).named_parameters()}
    assert names >= FUSED_NAMES
    assert not {name for name in names if "layernorm" in name and "q_" not in name and "k_" not in name}
    second = saved(tmp_path / "plain.nemo", there, arch, cluster)
    back = loaded(second, arch, fused, cluster)
    third = saved(tmp_path / "again.nemo", back, arch, cluster)
    found = [contents(path, arch, cluster) for path in (first, second, third)]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert all(torch.equal(one, found[0][name]) for other in found[1:] for name, one in other.items())


def policy(model: nn.Module, arch: Architecture, run: RunOptions, cluster: MegatronCluster) -> MegatronPolicy:
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    return MegatronPolicy(LoadedModel(model, arch, tokenizer, run, Path("none")), cluster)  # type: ignore[arg-type]


def test_weights_of_other_programs_find_their_places(engine: Libraries, cluster: MegatronCluster) -> None:
    def names(run: RunOptions) -> set[str]:
        state = without_extra_state(build_model(ARCHIVED, run).sharded_state_dict(prefix="model."))
        return {piece.name for piece in pieces(state, "model.")}

    assert names(RunOptions(libraries=engine)) == names(RunOptions())


@pytest.mark.processes
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_gradients_and_text_are_those_of_the_other_kind(
    shape: str, engine: Libraries, cluster: MegatronCluster, tmp_path: Path
) -> None:
    arch, found = SHAPES[shape], []
    archive = saved(tmp_path / "m.nemo", shaken(arch, RunOptions()), arch, cluster)
    for run in (RunOptions(), RunOptions(libraries=engine)):
        model = policy(loaded(archive, arch, run, cluster), arch, run, cluster)
        requests = [GenerationRequest(i, 0, tuple(range(5, 9 + i))) for i in range(3)]
        text = {
            r.prompt_index: r.tokens for r in model.generate(requests, SamplingParams(max_tokens=6, greedy=True), 2)
        }
        scores = [row.tolist() for row in model.logprobs([[5, 9, 77, 30], [8, 8]], 2)]
        model.add_optimizer(OPTIM, clip_grad=1.0, max_steps=4)
        step = model.train_step([rows()], sft_objective)
        found.append((text, scores, step.loss, step.grad_norm))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert found[0][2:] == pytest.approx(found[1][2:], rel=1e-5)


def test_an_adapter_reads_what_the_product_reads(engine: Libraries, cluster: MegatronCluster) -> None:
    lora = LoraTuning(adapter_dim=4)
    run = RunOptions(libraries=replace(engine, fuses_norms=False), lora=lora)
    names = {name.partition(".layers.0.")[2] for name, _ in build_model(ARCHIVED, run).named_parameters()}
    assert {"input_layernorm.weight", "pre_mlp_layernorm.weight"} <= names
    assert not names & FUSED_NAMES


def test_a_bias_that_is_empty_is_none(cluster: MegatronCluster) -> None:
    layer = build_model(ARCHIVED, RunOptions()).decoder.layers[0]
    layer.mlp.linear_fc2.bias = nn.Parameter(torch.empty(0))
    assert Layer(layer).fc2.bias is None


def test_what_is_in_use_is_what_megatrons_config_says(
    cluster: MegatronCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda t, freqs: t)
    plain = transformer_config(WIDE, RunOptions())
    every = transformer_config(WIDE, RunOptions(libraries=chosen(ALL, fp8=True, fp8_margin=2)))
    for name in ("gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion"):
        assert (getattr(plain, name), getattr(every, name)) == (False, True)
    assert (plain.use_te_activation_func, every.use_te_activation_func) == (True, False)
    assert (plain.fp8, every.fp8, every.fp8_margin, every.fp8_amax_history_len) == (None, "hybrid", 2, 1024)
    apex = transformer_config(WIDE, RunOptions(libraries=Libraries(layer_norm=True)))
    assert (plain.persist_layer_norm, apex.persist_layer_norm) == (False, True)


@pytest.mark.processes
@pytest.mark.parametrize("activation", ["fast-swiglu", "geglu", "gelu"])
def test_fused_elementwise_parts_change_no_number(activation: str, cluster: MegatronCluster) -> None:
    arch, found = replace(ARCHIVED, activation=activation, bias=activation == "gelu"), []
    for used in (Libraries(), Libraries(bias_activation=True, bias_dropout_add=True)):
        torch.manual_seed(3)
        run = RunOptions(libraries=used)
        model = policy(build_model(arch, run), arch, run, cluster)
        with torch.compiler.set_stance("force_eager"):  # what is fused is the same text; compiling it takes a minute
            found.append(model.evaluate([rows()], sft_objective).loss)
    # Megatron's fused form of GeLU is the approximation by tanh
    assert found[0] == pytest.approx(found[1], rel=2e-3 if "swiglu" not in activation else 1e-6)
