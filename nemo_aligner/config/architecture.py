"""The model's shape, with NeMo's key names: what `model_config.yaml` inside a .nemo archive says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from nemo_aligner.config.other_models import check_is_built_here
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.errors import CheckpointError

_NORMALIZATIONS = ("rmsnorm", "layernorm")

BALANCING = ("aux_loss", "seq_aux_loss", "none")
"""Known kinds of load balancing of experts (`moe_router_load_balancing_type`); see engine/model/experts.py."""

EXPERT_KEYS = (
    *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq", "moe_router_pre_softmax"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
)
"""Settings that mean nothing without experts."""

_FROM_1 = frozenset({
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "encoder_seq_length",
    "max_position_embeddings", "make_vocab_size_divisible_by", "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
})  # fmt: skip
_ABOVE_0 = frozenset({"rotary_base", "rotary_percentage", "factor"})
_MOST = 2**31 - 1
_KINDS = {
    bool: "True or False",
    str: "a text",
    int: f"a whole number from 0 to {_MOST}",
    float: "a number from 0 on",
    list: "a list of such numbers",
    dict: "a mapping",
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value that was read from a file is what the annotation says, and within the bounds of its kind."""
    bare = get_origin(kind) or kind
    if bare is int:
        return type(value) is int and 0 <= value <= _MOST
    if bare is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    if bare is list:
        return isinstance(value, list) and all(_is_of(get_args(kind)[0], one) for one in value)
    return isinstance(value, bare)


def _adapter(peft: Any, where: str) -> dict[str, Any] | None:
    """The `peft` of an archive: None where it holds a whole model. Raises CheckpointError for what is not LoRA's."""
    if peft in (None, {}) or (isinstance(peft, dict) and peft.get("peft_scheme") in (None, "none")):
        return None
    base = peft.get("base") if isinstance(peft, dict) and peft.get("peft_scheme") == "lora" else None
    if not (isinstance(base, dict) and all(isinstance(base.get(name), str) for name in ("path", "sha256"))):
        raise CheckpointError(f"{where}: peft={peft} is not supported; of adapters, those written here are read")
    LoraTuning.from_nemo(peft, where)
    return peft


def _check_experts(values: dict[str, Any], where: str) -> None:
    """What is said of experts, in place. Raises CheckpointError for what is not known."""
    if values.get("num_moe_experts") in (None, 0, 1):  # one expert is none, as NeMo writes it
        for name in [name for name in values if name in EXPERT_KEYS]:
            del values[name]
        return
    experts, layers = values["num_moe_experts"], values["num_layers"]
    for name in ("moe_router_topk", "moe_layer_freq", "moe_aux_loss_coeff", "moe_router_load_balancing_type"):
        if name in values and values[name] is None:
            del values[name]
    topk, freq = values.get("moe_router_topk", 2), values.get("moe_layer_freq", 1)
    balancing = values.get("moe_router_load_balancing_type", "aux_loss")
    listed = isinstance(freq, list) and len(freq) == layers and set(freq) <= {0, 1} and 1 in freq
    coefficients = [values.get(name) or 0.0 for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")]
    for fault, name, wanted in (
        (not isinstance(coefficients[0], int | float), "moe_aux_loss_coeff", "one number"),
        (not isinstance(coefficients[1], int | float), "moe_z_loss_coeff", "one number"),
        (not 1 <= topk <= experts, "moe_router_topk", f"from 1 to num_moe_experts={experts}"),
        # the weight of a single expert would be 1 whatever the router says, and Megatron does not take it
        (topk == 1 and not values.get("moe_router_pre_softmax"), "moe_router_topk", "above 1 without pre_softmax"),
        (not (listed or (isinstance(freq, int) and freq >= 1)), "moe_layer_freq", f"a number, or {layers} of 0 and 1"),
        (balancing not in BALANCING, "moe_router_load_balancing_type", f"one of {', '.join(BALANCING)}"),
        (bool(values.get("bias")) or bool(values.get("mlp_bias")), "num_moe_experts", "to be had with biases"),
    ):
        if fault:
            raise CheckpointError(f"{where}: {name}={values.get(name)} is not {wanted}")


@dataclass
class RopeScaling:
    """Llama-3 style frequency scaling (as in Hugging Face `rope_scaling`), or plain linear interpolation."""

    rope_type: str = "llama3"  # llama3 or linear
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class Architecture:
    """A decoder-only transformer of the Llama family, with or without experts (Mixtral, Qwen3-MoE)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int  # rows of the tokenizer; the embedding is padded to make_vocab_size_divisible_by × TP
    num_query_groups: int | None = None  # null = num_attention_heads
    kv_channels: int | None = None  # head dimension; null = hidden_size / num_attention_heads
    encoder_seq_length: int = 2048  # tokens of a row at most
    max_position_embeddings: int = 2048  # rows of a table of learned positions; rotary ones go on past it
    position_embedding_type: str = "rope"
    rotary_percentage: float = 1.0
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    normalization: str = "rmsnorm"  # rmsnorm or layernorm
    layernorm_epsilon: float = 1e-5
    rope_freq_factors: list[float] | None = None  # divisors of the rotary frequencies, half a head's (GGUF)
    activation: str = "fast-swiglu"  # gated: [fast-]swiglu, geglu, geglu-tanh, reglu, squared-reglu; gelu, relu, ...
    bias: bool = False  # bias on every linear layer
    qkv_bias: bool = False  # bias on the QKV projection, without `bias` (Qwen2)
    proj_bias: bool | None = None  # on the attention's output; null = as `bias`
    mlp_bias: bool | None = None  # in the feed-forward; null = as `bias`
    qk_layernorm: bool = False  # RMSNorm on each head's q and k (Qwen3)
    window_size: int | None = None  # sliding-window attention (Mistral)
    window_layers: list[int] | None = None  # layers, from 0, that have the window; null = all
    share_embeddings_and_output_weights: bool = False
    make_vocab_size_divisible_by: int = 128
    num_moe_experts: int | None = None  # null = no experts
    moe_router_topk: int = 2  # experts of a token
    moe_ffn_hidden_size: int | None = None  # of an expert; null = ffn_hidden_size
    moe_layer_freq: int | list[int] = 1  # every n-th layer has experts, from the first; or 0 and 1 for each layer
    moe_router_pre_softmax: bool = False  # weights of all experts' softmax, whose chosen ones do not add up to 1
    moe_router_load_balancing_type: str = "aux_loss"  # aux_loss, seq_aux_loss or none
    moe_aux_loss_coeff: float = 0.0
    moe_z_loss_coeff: float | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    precision: str = "bf16"
    tokenizer: dict[str, Any] = field(default_factory=dict)  # {library: huggingface|sentencepiece, files...}
    reward_model_type: str | None = None  # binary_ranking: the archive holds an `rm_head`, no output layer
    reward_standardization: dict[str, float] | None = None  # {mean, std} of its rewards on validation data
    append_eod: bool = False  # reward models: texts ended with EOS in training
    peft: dict[str, Any] | None = None  # the archive holds an adapter: {peft_scheme, lora_tuning, base: {path, sha256}}
    other: dict[str, Any] = field(
        default_factory=dict
    )  # keys of the archive that are not ours; written back as they were

    @classmethod
    def from_nemo(cls, config: dict[str, Any], where: str = "model_config.yaml") -> Architecture:
        """From the mapping of `model_config.yaml`, or another file that `where` names.

        Raises CheckpointError naming the missing keys, or one whose value means another model than is built here.
        """
        known = {f.name for f in fields(cls)} - {"other"}
        required = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"}
        missing = sorted(required - config.keys())
        if missing:
            raise CheckpointError(f"{where} lacks {', '.join(missing)}")
        values = {k: _plain(k, v) for k, v in config.items() if k in known and (v is not None or k in required)}
        if isinstance(values.get("rope_scaling"), dict):
            unknown = sorted(map(str, values["rope_scaling"].keys() - {f.name for f in fields(RopeScaling)}))
            if unknown:
                raise CheckpointError(f"{where}: rope_scaling: {unknown[0]} is not understood")
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        elif config.get("scale_positional_embedding"):  # NeMo's name for the scaling of Llama 3.1
            values["rope_scaling"] = RopeScaling(factor=config.get("scale_factor", 8.0))
        check_is_built_here(config, where)
        if values.get("normalization", "rmsnorm") not in _NORMALIZATIONS:
            wanted = " or ".join(_NORMALIZATIONS)
            raise CheckpointError(f"{where}: normalization={values['normalization']} is not {wanted}")
        _check_experts(values, where)
        values["peft"] = _adapter(config.get("peft"), where)
        lengths = ("encoder_seq_length", "max_position_embeddings")
        for name, other in (lengths, lengths[::-1]):
            if other in values:
                values.setdefault(name, values[other])
        values.setdefault("vocab_size", 0)  # real NeMo archives leave it to the tokenizer
        arch = cls(**values, other={k: v for k, v in config.items() if k not in known})
        arch.check(where)
        return arch

    def check(self, where: str, theirs: Mapping[str, str] | None = None) -> None:
        """Raises CheckpointError for a value of another kind, and for sizes that do not fit one another.

        `where` names the file for messages, `theirs` its own names of our fields.
        """
        names = theirs or {}

        def told(name: str) -> str:
            return f"{names.get(name, name)}={str(getattr(self, name))[:80]}"

        _check_kinds(self, where, names, "")
        if self.rope_scaling is not None:
            _check_kinds(self.rope_scaling, where, {}, "rope_scaling.")
        given = self.reward_standardization
        if given is not None and not (set(given) == {"mean", "std"} and all(_is_number(one) for one in given.values())):
            raise CheckpointError(f"{where}: {told('reward_standardization')} is not a mean and a std, two numbers")
        for name in ("hidden_dropout", "attention_dropout"):
            if not getattr(self, name) < 1:
                raise CheckpointError(f"{where}: {told(name)} is not a number from 0 to below 1")
        for size, parts in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_query_groups")):
            if size == "hidden_size" and self.kv_channels:
                continue
            if getattr(self, size) % (getattr(self, parts) or 1):
                raise CheckpointError(f"{where}: {told(size)} is not a multiple of {told(parts)}")
        turned = int(self.head_dim * self.rotary_percentage) // 2
        if self.rope_freq_factors is not None and not (
            len(self.rope_freq_factors) == turned and all(self.rope_freq_factors)
        ):
            raise CheckpointError(f"{where}: {told('rope_freq_factors')} is not {turned} numbers above 0")
        if not self.takes_rows_of(self.encoder_seq_length):
            longest = told("max_position_embeddings")
            raise CheckpointError(
                f"{where}: {told('encoder_seq_length')} is above {longest}, and positions are learned"
            )

    def to_nemo(self) -> dict[str, Any]:
        """The mapping to write as `model_config.yaml`."""
        unsaid = {"other"} if self.num_moe_experts is not None else {"other", *EXPERT_KEYS} - {"num_moe_experts"}
        own = {k: v for k, v in asdict(self).items() if k not in unsaid}
        return {**self.other, **own}

    @property
    def has_proj_bias(self) -> bool:
        return self.bias if self.proj_bias is None else self.proj_bias

    @property
    def has_mlp_bias(self) -> bool:
        return self.bias if self.mlp_bias is None else self.mlp_bias

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, counted from 0."""
        return self.window_size if self.window_layers is None or layer in self.window_layers else None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts in place of one feed-forward."""
        freq = self.moe_layer_freq
        return self.num_moe_experts is not None and bool(freq[layer] if isinstance(freq, list) else layer % freq == 0)

    def takes_rows_of(self, length: int) -> bool:
        """Whether there are positions for a row of so many tokens."""
        return self.position_embedding_type != "learned_absolute" or length <= self.max_position_embeddings

    @property
    def positions(self) -> int:
        """Positions that rows may have."""
        return max(self.encoder_seq_length, self.max_position_embeddings)

    @property
    def expert_ffn_hidden_size(self) -> int:
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


def _plain(name: str, value: Any) -> Any:
    """What YAML made of a value: of `1e-5`, a text; of the precision 32, a number."""
    if name == "precision" and type(value) is int:
        return str(value)
    if isinstance(value, str) and get_type_hints(Architecture)[name] is float:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_kinds(block: Any, where: str, names: Mapping[str, str], prefix: str) -> None:
    """Raises CheckpointError for the first field of a dataclass that is not what its annotation says."""
    for name, annotation in get_type_hints(type(block)).items():
        value = getattr(block, name)
        kinds = get_args(annotation) if get_origin(annotation) not in (list, dict, None) else (annotation,)
        fits = any(value is None if kind is NoneType else _is_of(kind, value) for kind in kinds)
        if not fits or (name in _FROM_1 | _ABOVE_0 and value == 0):
            kind = get_origin(kinds[0]) or kinds[0]
            wanted = _KINDS.get(kind, "a mapping")
            wanted = wanted.replace("from 0", "from 1") if name in _FROM_1 else wanted
            wanted = wanted.replace("from 0 on", "above 0") if name in _ABOVE_0 else wanted
            raise CheckpointError(f"{where}: {prefix}{names.get(name, name)}={str(value)[:80]} is not {wanted}")


def padded_vocab_size(arch: Architecture, tp: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of make_vocab_size_divisible_by × tp."""
    multiple = arch.make_vocab_size_divisible_by * tp
    return -(-arch.vocab_size // multiple) * multiple
