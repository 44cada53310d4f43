"""From a shape (Architecture) to a Megatron model: this rank's stage of a GPTModel, or of a reward model."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from nemo_aligner.config.architecture import Architecture, padded_vocab_size
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.engine.model.attention import SdpaCoreAttention, StreamParams
from nemo_aligner.engine.model.experts import ExpertLayer, RouterLosses, expert_settings, expert_spec
from nemo_aligner.engine.model.fused import FusedRMSNorm, LeanMLP, StreamSelfAttention, silu_gate
from nemo_aligner.engine.model.interleaved import InterleavedStages
from nemo_aligner.engine.model.libraries import Libraries
from nemo_aligner.engine.model.lora import Adapters
from nemo_aligner.errors import CheckpointError


@dataclass(frozen=True)
class RunOptions:
    """How a model is run, as opposed to what it is: precision, cut over processes, recomputation, dropout."""

    dtype: torch.dtype = torch.float32
    tp: int = 1
    pp: int = 1
    vpp: int = 1  # stages of a rank
    context: int = 1
    ep: int = 1
    etp: int | None = None  # None: as tp
    sequence_parallel: bool = False
    activations_checkpoint_granularity: str | None = None
    activations_checkpoint_method: str | None = None
    activations_checkpoint_num_layers: int | None = None
    hidden_dropout: float | None = None  # None: as the archive says
    attention_dropout: float | None = None
    lora: LoraTuning | None = None  # None: no adapters
    lora_seed: int = 1234  # of their A
    libraries: Libraries = field(default_factory=Libraries)
    shapes_only: bool = False  # parameters on torch's meta device, which take no memory

    @classmethod
    def for_inference(cls, dtype: torch.dtype, tp: int = 1, pp: int = 1) -> RunOptions:
        return cls(dtype=dtype, tp=tp, pp=pp, hidden_dropout=0.0, attention_dropout=0.0)


def parse_precision(value: str | int) -> torch.dtype:
    """`trainer.precision` (one of config.schema.PRECISIONS) → the dtype of weights and matrix products.

    bf16 and bf16-mixed are the same here: bf16 weights, fp32 master weights in the optimizer.
    """
    return torch.float32 if str(value).startswith("32") else torch.bfloat16


def activation_of(arch: Architecture) -> dict[str, Any]:
    """The activation in the settings of Megatron's config. Raises CheckpointError for one that is not known."""
    known: dict[str, dict[str, Any]] = {
        "fast-swiglu": {"activation_func": F.silu, "gated_linear_unit": True},
        "swiglu": {"activation_func": F.silu, "gated_linear_unit": True},
        "geglu": {"activation_func": F.gelu, "gated_linear_unit": True},
        "geglu-tanh": {"activation_func": _gelu_tanh, "gated_linear_unit": True},
        "reglu": {"activation_func": F.relu, "gated_linear_unit": True},
        "squared-reglu": {"activation_func": _squared_relu, "gated_linear_unit": True},
        "gelu": {"activation_func": F.gelu},
        "relu": {"activation_func": F.relu},
        "squared-relu": {"activation_func": _squared_relu},
    }
    if arch.activation not in known:
        raise CheckpointError(f"activation {arch.activation!r} of the archive is not one of {', '.join(known)}")
    return known[arch.activation]


def _has_silu_gate(arch: Architecture) -> bool:
    activation = activation_of(arch)
    return activation["activation_func"] is F.silu and activation.get("gated_linear_unit", False)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _recomputation(run: RunOptions) -> dict[str, Any]:
    """`model.activations_checkpoint_*`: selective = all but products of matrices, full = whole layers."""
    granularity, method = run.activations_checkpoint_granularity, run.activations_checkpoint_method
    if granularity is None:
        return {}
    if granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]}
    layers = run.activations_checkpoint_num_layers or 1
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def transformer_config(arch: Architecture, run: RunOptions) -> TransformerConfig:
    """Megatron's config of this shape run this way."""
    on_cpu = run.shapes_only or not torch.cuda.is_available()
    init = functools.partial(nn.init.normal_, std=arch.init_method_std)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.query_groups,
        kv_channels=arch.head_dim,
        hidden_dropout=arch.hidden_dropout if run.hidden_dropout is None else run.hidden_dropout,
        attention_dropout=arch.attention_dropout if run.attention_dropout is None else run.attention_dropout,
        normalization="RMSNorm" if arch.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=arch.layernorm_epsilon,
        add_bias_linear=arch.has_mlp_bias,
        add_qkv_bias=arch.bias or arch.qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        init_method=init,
        output_layer_init_method=init,
        params_dtype=run.dtype,
        bf16=run.dtype == torch.bfloat16,
        pipeline_dtype=run.dtype,
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vpp if run.vpp > 1 else None,
        # of two ranks each is before and after the other: what goes either way must not meet in one exchange
        overlap_p2p_comm=run.vpp > 1,
        batch_p2p_comm=run.vpp == 1,
        context_parallel_size=run.context,
        sequence_parallel=run.sequence_parallel and run.tp > 1,
        use_cpu_initialization=on_cpu,
        variable_seq_lengths=True,  # micro-batches are padded to their own longest row only
        moe_token_dispatcher_type="alltoall",  # Megatron checks it against the line above, with or without experts
        calculate_per_token_loss=True,  # gradient = Σ loss / Σ count over the global batch
        gradient_accumulation_fusion=run.libraries.gradient_accumulation,
        bias_activation_fusion=run.libraries.bias_activation,
        bias_dropout_fusion=run.libraries.bias_dropout_add,
        masked_softmax_fusion=True,  # which says nothing of the attention here: it has no softmax of its own
        apply_rope_fusion=run.libraries.rope,
        persist_layer_norm=run.libraries.layer_norm,
        **run.libraries.fp8,
        # that is, the one that the layer spec names
        use_te_activation_func=_has_silu_gate(arch) and not run.libraries.bias_activation,
        **expert_settings(arch, run.ep, run.etp or run.tp),
        **activation_of(arch),
        **_recomputation(run),
    )


class _Norm:
    """RMSNorm or LayerNorm of torch; its gradient is summed over TP ranks when sequence parallelism cuts its input."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        kind = FusedRMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class _SelfAttention(StreamSelfAttention):
    """Megatron has one setting for biases of attention and feed-forward; here the attention's output has its own."""

    def __init__(self, config: TransformerConfig, *args: Any, output_bias: bool, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.add_bias_linear = output_bias
        super().__init__(config, *args, **kwargs)


def _lean(submodules: MLPSubmodules) -> type[LeanMLP]:
    """As a class of its own: of a specification Megatron would say that it does not know its module."""

    class Lean(LeanMLP):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config, submodules)

    return Lean


def _block_spec(
    arch: Architecture, config: TransformerConfig, losses: RouterLosses, libraries: Libraries, chunk: int | None
) -> TransformerBlockSubmodules:
    """Megatron's own layers with torch's norms and our attention; checkpoint keys as Transformer Engine names them.

    With Transformer Engine its products and norms, which are one module where the second follows the first; experts
    have Megatron's products. `losses`: of the routers of layers with experts.
    """
    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_layernorm, normalization="RMSNorm")
    norm: Any = FusedLayerNorm if libraries.layer_norm else _Norm
    qk_norm: Any = _Norm
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    if libraries.transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        parts = TESpecProvider()
        norm, qk_norm = parts.layer_norm(), parts.layer_norm(for_qk=True)
        products = (spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules)
        column = parts.column_parallel_layer_norm_linear() if libraries.fuses_norms else parts.column_parallel_linear()
        products[0].linear_qkv = products[1].linear_fc1 = column
        products[0].linear_proj = products[1].linear_fc2 = parts.row_parallel_linear()
        alone = IdentityOp if libraries.fuses_norms else norm
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = alone
    own_bias = {} if arch.has_proj_bias == arch.has_mlp_bias else {"output_bias": arch.has_proj_bias}
    spec.submodules.self_attention = ModuleSpec(
        module=_SelfAttention if own_bias else StreamSelfAttention,
        params={**spec.submodules.self_attention.params, **own_bias},
        submodules=spec.submodules.self_attention.submodules,
    )
    if config.use_te_activation_func:
        spec.submodules.mlp.submodules.activation_func = silu_gate
    if config.recompute_granularity == "selective" and not libraries.transformer_engine:
        spec.submodules.mlp = _lean(spec.submodules.mlp.submodules)
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = functools.partial(SdpaCoreAttention, window_of=arch.window_of)
    if arch.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = qk_norm
    layers = [spec] * get_num_layers_to_build(config, chunk)
    if arch.num_moe_experts is not None:
        first = get_transformer_layer_offset(config, chunk)
        experts = copy.deepcopy(spec)
        experts.module = ExpertLayer
        experts.submodules.pre_mlp_layernorm = norm
        experts.submodules.mlp = expert_spec(arch, losses, silu_gate if config.use_te_activation_func else None)
        del experts.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]  # a part of no linear layer
        layers = [experts if arch.has_experts(first + i) else spec for i in range(len(layers))]
    # of a layer alone Megatron would make a block whose last norm refuses sequence parallelism
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


class StreamGPTModel(GPTModel):
    """A GPTModel that takes a stream of rows (`StreamParams`), with rotary positions counted within the rows."""

    adapters: Adapters | None
    router_losses: RouterLosses | None  # None: without experts
    gives_rewards = False  # in place of logits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = self.router_losses = None

    @property
    def chunks(self) -> tuple[StreamGPTModel, ...]:
        """What a micro-batch passes on this rank, one after another; see InterleavedStages."""
        return (self,)

    def _preprocess(self, *args: Any, packed_seq_params: StreamParams | None = None, **kwargs: Any) -> tuple[Any, ...]:
        embedded, rotary, *more = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        if rotary is not None and packed_seq_params is not None:
            rotary = rotary[packed_seq_params.positions]
        if self.adapters is not None and embedded is not None and self.config.recompute_granularity is not None:
            # what is recomputed has a gradient only where its input has one, and a frozen embedding has none
            embedded.requires_grad_(torch.is_grad_enabled())
        return embedded, rotary, *more


class PolicyGPTModel(StreamGPTModel):
    """A model that computes logits only where they are asked for: most of a batch is prompt, and V is large.

    Of a stream it returns logits `[1, N, V/TP]` at the N places of `StreamParams.wanted`.
    """

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: StreamParams | None = None, **kwargs: Any
    ) -> Tensor:
        if self.post_process and packed_seq_params is not None and packed_seq_params.wanted is not None:
            hidden_states = hidden_states.index_select(0, packed_seq_params.wanted)
        return super()._postprocess(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)


class RewardGPTModel(StreamGPTModel):
    """A model with a reward head in place of the output layer: rewards of every position, `[B, S, K]` float32."""

    post_process: bool
    gives_rewards = True

    def __init__(self, *args: Any, attributes: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            del self.output_layer
            self.rm_head = nn.Linear(self.config.hidden_size, attributes)
            nn.init.normal_(self.rm_head.weight, std=self.config.hidden_size**-0.5)
            nn.init.zeros_(self.rm_head.bias)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        # float32 arithmetic over weights of the model's dtype: Megatron's optimizer wants one dtype
        head = self.rm_head
        return nn.functional.linear(hidden_states.float(), head.weight.float(), head.bias.float()).transpose(0, 1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # on the last stage GPTModel looks for the output layer's weight, which this model does not have
        post_process, self.post_process = self.post_process, False
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.post_process = post_process


def build_model(arch: Architecture, run: RunOptions) -> StreamGPTModel | InterleavedStages:
    """This rank's part of the model, with random weights, in `run.dtype`."""
    if run.shapes_only:
        with torch.device("meta"):
            return _built(arch, run)
    model = _built(arch, run)
    return model.cuda() if torch.cuda.is_available() else model


def _built(arch: Architecture, run: RunOptions) -> StreamGPTModel | InterleavedStages:
    if arch.position_embedding_type not in ("rope", "learned_absolute"):
        raise CheckpointError(
            f"position_embedding_type {arch.position_embedding_type!r} is not rope or learned_absolute"
        )
    config = transformer_config(arch, run)
    model: StreamGPTModel | InterleavedStages
    if run.vpp == 1:
        model = _stage(arch, run, config, None)
    else:
        model = InterleavedStages([_stage(arch, run, config, chunk) for chunk in range(run.vpp)])
    if run.lora is not None:
        Adapters(model, arch, run.lora, run.lora_seed).join(model)
    return model.to(run.dtype)


def _stage(arch: Architecture, run: RunOptions, config: TransformerConfig, chunk: int | None) -> StreamGPTModel:
    """One pipeline stage of this rank: its `chunk`-th; None where it has no other."""
    is_reward_model = arch.reward_model_type is not None
    scaling = arch.rope_scaling
    kind = RewardGPTModel if is_reward_model else PolicyGPTModel
    losses = RouterLosses.of(arch)
    model = kind(
        config=config,
        transformer_layer_spec=_block_spec(arch, config, losses, run.libraries, chunk),
        vocab_size=padded_vocab_size(arch, run.tp),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage() and chunk in (None, 0),
        post_process=parallel_state.is_pipeline_last_stage() and chunk in (None, run.vpp - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights and not is_reward_model,
        position_embedding_type=arch.position_embedding_type,
        rotary_percent=arch.rotary_percentage,
        rotary_base=arch.rotary_base,
        seq_len_interpolation_factor=scaling.factor if scaling and scaling.rope_type == "linear" else None,
        vp_stage=chunk,
    )
    if arch.num_moe_experts is not None:
        model.router_losses = losses
    if run.context > 1 and arch.position_embedding_type == "rope":
        model.rotary_pos_emb.cp_group = None  # a table of all positions: the model takes those of its places
    if scaling is not None and scaling.rope_type == "llama3":
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
    if arch.rope_freq_factors is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary.inv_freq / torch.tensor(arch.rope_freq_factors, device=rotary.inv_freq.device)
    return model
