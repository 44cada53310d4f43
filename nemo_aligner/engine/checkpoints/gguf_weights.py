"""Llama-shaped GGUF files: tensors under Hugging Face names, and the tokenizer rebuilt from its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.errors import CheckpointError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[Architecture, dict[str, Tensor], bytes]:
    """Shape, tensors under their Hugging Face names, and tokenizer.json of a GGUF file."""
    file = GgufFile(path)
    arch = file.architecture()
    return arch, file.tensors(arch), file.tokenizer_json()


class GgufFile:
    """A GGUF file of a Llama-shaped model with a byte-level BPE tokenizer."""

    def __init__(self, path: Path) -> None:
        import gguf

        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as fault:
            raise CheckpointError(f"{path}: not a GGUF file ({fault})") from None
        kind = self._value("general.architecture")
        if kind != "llama":
            raise CheckpointError(f"{path}: GGUF architecture {kind!r} is not llama")

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def architecture(self) -> Architecture:
        heads, hidden = self._value("llama.attention.head_count"), self._value("llama.embedding_length")
        tensors = {tensor.name for tensor in self._reader.tensors}
        return Architecture(
            num_layers=self._value("llama.block_count"),
            hidden_size=hidden,
            ffn_hidden_size=self._value("llama.feed_forward_length"),
            num_attention_heads=heads,
            num_query_groups=self._value("llama.attention.head_count_kv", heads),
            vocab_size=len(self._value("tokenizer.ggml.tokens")),
            encoder_seq_length=self._value("llama.context_length"),
            max_position_embeddings=self._value("llama.context_length"),
            rotary_base=float(self._value("llama.rope.freq_base", 10000.0)),
            layernorm_epsilon=round(float(self._value("llama.attention.layer_norm_rms_epsilon")), 12),
            share_embeddings_and_output_weights="output.weight" not in tensors,
            tokenizer=self._tokenizer_settings(),
        )

    def tensors(self, arch: Architecture) -> dict[str, Tensor]:
        """Every tensor, dequantised to float32, under its Hugging Face name."""
        import gguf

        out: dict[str, Tensor] = {}
        for tensor in self._reader.tensors:
            name = _hf_name(tensor.name)
            if name is None:
                continue  # rope frequencies: derived, not learned
            value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            if name.endswith("q_proj.weight"):
                value = unpermuted(value, arch.num_attention_heads)
            elif name.endswith("k_proj.weight"):
                value = unpermuted(value, arch.query_groups)
            out[name] = value
        return out

    def tokenizer_json(self) -> bytes:
        """The fast tokenizer: byte-level BPE with digits split one by one, as the SmolLM family is trained."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        if self._value("tokenizer.ggml.model") != "gpt2":
            raise CheckpointError("only GGUF files with a byte-level BPE tokenizer (gpt2) are read")
        tokens: list[str] = self._value("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self._value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if self._value("tokenizer.ggml.pre") in ("smollm", "default", None):
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self._value("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3 = control
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return tokenizer.to_str().encode()

    def _tokenizer_settings(self) -> dict[str, Any]:
        tokens = self._value("tokenizer.ggml.tokens")

        def token(name: str) -> str | None:
            index = self._value(f"tokenizer.ggml.{name}_token_id")
            return None if index is None else tokens[index]

        names = {f"{name}_token": token(short) for name, short in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
        return {"library": "huggingface", **names, "chat_template": self._value("tokenizer.chat_template")}


def _hf_name(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return None


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's row order of q and k: `[heads, D/2, 2]` (interleaved rotary pairs) → `[heads, 2, D/2]` (halves)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
