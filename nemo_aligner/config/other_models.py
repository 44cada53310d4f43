"""What an archive of NeMo's may say that means another model than is built here."""

from __future__ import annotations

from typing import Any

from nemo_aligner.errors import CheckpointError

_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "apply_embedding_scaling": (None, False),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (None, False),
    "attention_type": ("multihead",),
    "attn_logit_softcapping": (None, 0),
    "drop_layers": (None, []),
    "embedding_multiplier": (None, 1.0),
    "final_logit_softcapping": (None, 0),
    "glu_linear_offset": (None, 0),
    "headscale": (False,),
    "hyena": (None, {}),
    "layernorm_zero_centered_gamma": (False,),
    "moe_apply_probs_on_input": (None, False),
    "moe_expert_capacity_factor": (None,),
    "moe_input_jitter_eps": (None, 0.0),
    "moe_router_enable_expert_bias": (None, False),
    "moe_router_group_topk": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_token_dropping": (None, False),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (None, False),
    "no_rope_freq": (None,),
    "normalize_attention_scores": (True,),
    "openai_gelu": (None, False),
    "qk_l2_norm": (None, False),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (None, 1, 1.0),
    "softmax_scale": (None,),
    "softmax_type": (None, "vanilla"),
    "transformer_block_type": ("pre_ln",),
    "window_attn_skip_freq": (None,),
}
"""Settings that change what is computed, by the values that are known here."""
_CUSTOM = "mcore_customization_config"


def check_is_built_here(config: dict[str, Any], where: str) -> None:
    """Raises CheckpointError for a setting that means another model than is built here."""
    for key, known_values in _ONLY.items():
        if key in config and config[key] not in known_values:
            raise CheckpointError(f"{where}: {key}={config[key]} is not supported")
    custom = config.get(_CUSTOM) or {}
    if not isinstance(custom, dict):
        raise CheckpointError(f"{where}: {_CUSTOM}={str(custom)[:80]} is not a mapping")
    for key, value in custom.items():  # NeMo puts each into its model's settings; Falcon's are there and off
        if value not in (None, False, [], {}, ""):
            raise CheckpointError(f"{where}: {_CUSTOM}: {key}={str(value)[:80]} is not supported")
