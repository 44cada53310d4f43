"""Hugging Face's config.json ⇄ our shape: Llama, Qwen2, Qwen3, Qwen3-MoE, Mistral, Mixtral, Phi3 as the Llama it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_aligner.config.architecture import Architecture, RopeScaling
from nemo_aligner.engine.checkpoints.settings import Settings
from nemo_aligner.errors import CheckpointError

SUPPORTED = (
    *("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM"),
    *("MixtralForCausalLM", "Qwen3MoeForCausalLM"),
)

_QWEN_WINDOWS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_LEFT_OUT: dict[str, dict[str, Any]] = {  # what transformers takes where config.json does not say it, if not as Llama
    "Qwen2ForCausalLM": _QWEN_WINDOWS,
    "Qwen3ForCausalLM": {**_QWEN_WINDOWS, "head_dim": 128},
    "Qwen3MoeForCausalLM": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 0.001,
    },
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "MixtralForCausalLM": {"num_key_value_heads": 8, "rope_theta": 1e6, "router_aux_loss_coef": 0.001},
}
_WINDOWS_BY_LAYER = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")  # others have theirs in every layer

NOT_SUPPORTED = {  # what stands in the way of others that people ask for
    "GemmaForCausalLM": "norms by 1 + weight and scaled embeddings",
    "Gemma2ForCausalLM": "norms after attention and feed-forward, and soft caps on scores and logits",
    "Gemma3ForCausalLM": "norms after attention and feed-forward, and two rotary bases",
    "GraniteForCausalLM": "multipliers of embeddings, residuals, scores and logits",
    "Olmo2ForCausalLM": "norms after attention and feed-forward",
    "Qwen2MoeForCausalLM": "an expert that every token shares",
}

ACTIVATIONS = {  # theirs → ours, which is gated
    "silu": "fast-swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu-tanh",
    "gelu_new": "geglu-tanh",
    "relu": "reglu",
    "relu2": "squared-reglu",
}

_THEIRS = {  # ours → theirs
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "encoder_seq_length": "max_position_embeddings",
    "rotary_base": "rope_theta",
    "rotary_percentage": "partial_rotary_factor",
    "layernorm_epsilon": "rms_norm_eps",
    "window_size": "sliding_window",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}

_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "do_sample",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id", "max_length",
    "min_length", "model_type", "neftune_noise_alpha", "num_beams", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "repetition_penalty", "return_dict", "temperature", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache",
})  # fmt: skip


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The shape a `config.json` describes. Raises CheckpointError for other models and for settings not understood."""
    settings = Settings(config, where)
    names = settings.get("architectures") or ["none"]
    name = str(names[0] if isinstance(names, list) else names)
    if name in NOT_SUPPORTED:
        raise CheckpointError(f"{where}: {name} is not supported: it has {NOT_SUPPORTED[name]}")
    if name not in SUPPORTED:
        raise CheckpointError(f"{where}: architecture {name} is not one of {', '.join(SUPPORTED)}")
    kind = settings.get("model_type")
    if kind not in (None, _model_type(name)):  # transformers goes by it, and not by the architecture's name
        raise CheckpointError(f"{where}: model_type={kind} is not {_model_type(name)}, that of {name}")
    settings = Settings({**_LEFT_OUT.get(name, {}), **config}, where)
    if settings.get("is_causal") is False:
        raise CheckpointError(f"{where}: is_causal=False is not supported: tokens would see those after them")
    activation = settings.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(f"{where}: hidden_act={activation} is not one of {', '.join(ACTIVATIONS)}")
    length, biased = settings.needed("max_position_embeddings"), bool(settings.get("attention_bias"))
    base, fraction, scaling = _rope(settings, where)
    if fraction != 1.0 and name != "Phi3ForCausalLM":  # transformers' others turn whole heads, whatever it says
        raise CheckpointError(f"{where}: partial_rotary_factor={fraction} is not 1, and {name} turns whole heads")
    window, window_layers = _windows(name, settings)
    arch = Architecture(
        **_experts(name, settings, where),
        num_layers=settings.needed("num_hidden_layers"),
        hidden_size=settings.needed("hidden_size"),
        ffn_hidden_size=settings.needed("intermediate_size"),
        num_attention_heads=settings.needed("num_attention_heads"),
        num_query_groups=settings.get("num_key_value_heads"),
        kv_channels=settings.get("head_dim"),
        vocab_size=settings.needed("vocab_size"),
        encoder_seq_length=length,
        max_position_embeddings=length,
        rotary_base=base,
        rotary_percentage=fraction,
        rope_scaling=scaling,
        layernorm_epsilon=settings.needed("rms_norm_eps"),
        activation=ACTIVATIONS[activation],
        qkv_bias=name == "Qwen2ForCausalLM" or biased,
        proj_bias=biased or None,
        mlp_bias=bool(settings.get("mlp_bias")) or None,
        qk_layernorm=name.startswith("Qwen3"),
        window_size=window,
        window_layers=window_layers,
        attention_dropout=settings.get("attention_dropout") or 0.0,
        share_embeddings_and_output_weights=bool(settings.get("tie_word_embeddings", False)),
    )
    arch.check(where, _THEIRS)
    settings.check_all_used(_HARMLESS)
    return arch


def _model_type(name: str) -> str:
    """The `model_type` of an architecture."""
    return name.removesuffix("ForCausalLM").replace("Moe", "_moe").lower()


def _experts(name: str, settings: Settings, where: str) -> dict[str, Any]:
    """What an architecture with experts says of them; nothing of others."""
    if name not in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        return {}
    given = [settings.get(key) for key in ("num_local_experts", "num_experts")]
    found: dict[str, Any] = {
        "num_moe_experts": next((count for count in given if count), None),
        "moe_router_topk": settings.whole("num_experts_per_tok"),
        "moe_ffn_hidden_size": settings.get("moe_intermediate_size", settings.get("intermediate_size")),
        "moe_aux_loss_coeff": settings.get("router_aux_loss_coef") or 0.0,
    }
    if found["num_moe_experts"] is None:
        raise CheckpointError(f"{where} says neither num_local_experts nor num_experts")
    if settings.get("router_jitter_noise"):
        raise CheckpointError(f"{where}: router_jitter_noise={settings['router_jitter_noise']} is not 0")
    if name == "Qwen3MoeForCausalLM":
        step, dense = settings.whole("decoder_sparse_step", 1), settings.get("mlp_only_layers") or []
        layers = range(settings.needed("num_hidden_layers"))
        sparse = [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]
        if not any(sparse):
            raise CheckpointError(f"{where}: decoder_sparse_step={step}, mlp_only_layers={dense}: no layer has experts")
        found["moe_layer_freq"] = 1 if all(sparse) else sparse
        found["moe_router_pre_softmax"] = not settings.get("norm_topk_prob", False)
    if found["moe_router_topk"] == 1 and not found.get("moe_router_pre_softmax"):
        raise CheckpointError(
            f"{where}: num_experts_per_tok=1 is not above 1, and one weight that is normed is always 1"
        )
    return found


def _rope(settings: Settings, where: str) -> tuple[float, float, RopeScaling | None]:
    """Base, part of the head dimension that is turned, and scaling of the rotary embedding."""
    given = [block for name in ("rope_scaling", "rope_parameters") if (block := settings.get(name))]
    if len(given) == 2 and given[0] != given[1]:  # transformers would take the first alone, without the second's base
        raise CheckpointError(f"{where}: rope_scaling and rope_parameters differ; leave one of them out")
    rope = Settings(given[0] if given else {}, f"{where}: rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    base, fraction = (rope.get(name, settings.get(name)) for name in ("rope_theta", "partial_rotary_factor"))
    if kind not in ("default", "llama3", "linear"):
        raise CheckpointError(f"{where}: rope_scaling type {kind!r} is not one of default, linear, llama3")
    scaling = _scaling(kind, rope, settings)
    # an export writes these for linear scaling too, which has no use for them
    rope.check_all_used(frozenset({"type", "rope_type", "low_freq_factor", "high_freq_factor"}))
    return 10000.0 if base is None else base, 1.0 if fraction is None else fraction, scaling


def _scaling(kind: str, rope: Settings, settings: Settings) -> RopeScaling | None:
    """What the block says of it. Raises CheckpointError for a factor that is missing: none is made up."""
    name = "original_max_position_embeddings"
    # in transformers' order: Phi3 has it beside the block
    lengths = (settings.get(name), rope.get(name), settings["max_position_embeddings"])
    if kind == "linear":
        return RopeScaling(kind, rope.needed("factor"))
    if kind == "llama3":
        factor, low, high = (rope.needed(one) for one in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeScaling(kind, factor, low, high, next(one for one in lengths if one is not None))
    return None


def _windows(name: str, settings: Settings) -> tuple[int | None, list[int] | None]:
    """Sliding window, and the layers that have it; None: all. Raises CheckpointError for layers that are not known."""
    if name == "LlamaForCausalLM":
        return None, None
    window, kinds = settings.get("sliding_window"), settings.get("layer_types")
    layers, first = settings.whole("num_hidden_layers"), settings.whole("max_window_layers", 0, low=0)
    asked = settings.get("use_sliding_window") or not name.startswith("Qwen")
    if window is None or not asked:
        return None, None
    by_layer = name in _WINDOWS_BY_LAYER
    if kinds is not None:
        known = ("sliding_attention", "full_attention") if by_layer else ("sliding_attention",)
        found = sorted(set(map(str, kinds))) if isinstance(kinds, list) else []
        if not set(known).issuperset(found) or len(kinds) != layers:
            said = f"{len(kinds)} of {found}" if found else str(kinds)[:80]
            raise CheckpointError(f"layer_types: {said} for {layers} layers; {name} has {' and '.join(known)} alone")
        chosen = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    else:
        chosen = list(range(first if by_layer else 0, layers))
    if not chosen:
        return None, None
    return window, None if len(chosen) == layers else chosen


def to_hf_config(arch: Architecture, torch_dtype: str) -> dict[str, Any]:
    """The `config.json` of a shape, as the architecture it belongs to. Raises CheckpointError where there is none."""
    name, own = _family(arch)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if arch.rope_scaling is not None:
        rope |= vars(arch.rope_scaling)
    return {
        "architectures": [name],
        "model_type": _model_type(name),
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.positions,
        "rope_theta": arch.rotary_base,
        "rope_parameters": rope,
        "rms_norm_eps": arch.layernorm_epsilon,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == arch.activation),
        "attention_dropout": arch.attention_dropout,
        "tie_word_embeddings": arch.share_embeddings_and_output_weights,
        "dtype": torch_dtype,
        **own,
    }


def _family(arch: Architecture) -> tuple[str, dict[str, Any]]:
    """Which of their architectures a shape is, and that one's own settings."""
    projection, mlp = arch.has_proj_bias, arch.has_mlp_bias
    windows = [arch.window_of(layer) for layer in range(arch.num_layers)]
    if len(set(windows)) == 1:
        arch = replace(arch, window_size=windows[0], window_layers=None)
    for fault, what in (
        (arch.normalization != "rmsnorm" or arch.bias, "its norms or biases"),
        (arch.position_embedding_type != "rope" or arch.rotary_percentage != 1.0, "its position embedding"),
        (arch.rope_freq_factors is not None, "its rotary frequencies, which came from a GGUF file"),
        (arch.activation not in ACTIVATIONS.values(), f"its activation {arch.activation}"),
        (projection and not arch.qkv_bias, "a bias on the attention's output alone"),
        (arch.window_size and mlp, "a sliding window beside biases"),
    ):
        if fault:
            raise CheckpointError(f"no Hugging Face architecture that is written here has {what}")
    window = {
        "sliding_window": arch.window_size,
        "use_sliding_window": arch.window_size is not None,
        "layer_types": ["full_attention" if one is None else "sliding_attention" for one in windows],
    }
    if arch.num_moe_experts is not None:
        return _family_with_experts(arch, arch.num_moe_experts)
    if arch.qk_layernorm and projection == arch.qkv_bias and not mlp:
        return "Qwen3ForCausalLM", {"attention_bias": projection, **window}
    if arch.qkv_bias and not (projection or mlp or arch.qk_layernorm):
        return "Qwen2ForCausalLM", window
    if arch.window_size and not (arch.qkv_bias or arch.qk_layernorm or arch.window_layers):
        return "MistralForCausalLM", {"sliding_window": arch.window_size}
    if projection == arch.qkv_bias and not (arch.window_size or arch.qk_layernorm):
        return "LlamaForCausalLM", {"attention_bias": projection, "mlp_bias": mlp}
    raise CheckpointError(
        "no Hugging Face architecture that is written here has this mixture of windows, norms and biases"
    )


def _family_with_experts(arch: Architecture, experts: int) -> tuple[str, dict[str, Any]]:
    dense = [layer for layer in range(arch.num_layers) if not arch.has_experts(layer)]
    shared = {
        "num_experts_per_tok": arch.moe_router_topk,
        "num_local_experts": experts,
        "router_aux_loss_coef": arch.moe_aux_loss_coeff,
    }
    if arch.qk_layernorm and arch.has_proj_bias == arch.qkv_bias and not arch.window_layers:
        own = {
            "attention_bias": arch.qkv_bias,
            "num_experts": experts,
            "moe_intermediate_size": arch.expert_ffn_hidden_size,
            "norm_topk_prob": not arch.moe_router_pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "use_sliding_window": arch.window_size is not None,
        }
        return "Qwen3MoeForCausalLM", {**shared, **own, "sliding_window": arch.window_size}
    plain = not (arch.qkv_bias or arch.has_proj_bias or arch.qk_layernorm or arch.window_layers)
    if plain and not dense and not arch.moe_router_pre_softmax and arch.expert_ffn_hidden_size == arch.ffn_hidden_size:
        return "MixtralForCausalLM", {**shared, "sliding_window": arch.window_size}
    raise CheckpointError("no Hugging Face architecture that is written here has experts of this kind")
