"""Models with random weights, and what their products cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.engine.training.trainable import MegatronTrainable

Model = TypeVar("Model", bound=MegatronTrainable)

TRAINING_BYTES = 18
"""Of a parameter in training: bf16 weight, float32 gradient, master weight and two moments."""


def llama(layers: int, hidden: int, inner: int, heads: int, groups: int, vocabulary: int, tied: bool) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=vocabulary,
        encoder_seq_length=4096,
        max_position_embeddings=4096,
        share_embeddings_and_output_weights=tied,
    )


SHAPES = {
    "tiny": llama(2, 64, 96, 4, 2, 512, False),
    "135m": llama(30, 576, 1536, 9, 3, 49152, True),
    "1b": llama(16, 2048, 8192, 32, 8, 128256, True),
    "8b": llama(32, 4096, 14336, 32, 8, 128256, False),
}


class Ids:
    """A tokenizer whose text is the ids; the last of them ends a text."""

    bos_id, chat_template = None, None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eos_id = self.pad_id = vocab_size - 1
        self.stop_ids = frozenset({self.eos_id})
        self.files: dict[str, bytes] = {}

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{id} " for id in ids)

    def piece(self, token: int) -> str:
        return str(token)


def random_model(kind: type[Model], arch: Architecture, dtype: torch.dtype, cluster: MegatronCluster) -> Model:
    run, tokenizer = RunOptions.for_inference(dtype), Ids(arch.vocab_size)
    loaded = LoadedModel(build_model(arch, run), arch, tokenizer, run, Path("random"))
    return kind(loaded, cluster)


def product_parameters(arch: Architecture) -> int:
    """Of the matrices that every token meets."""
    heads, groups = arch.num_attention_heads, arch.query_groups
    attention = arch.hidden_size * arch.head_dim * (2 * heads + 2 * groups)
    return (
        arch.num_layers * (attention + 3 * arch.hidden_size * arch.ffn_hidden_size) + arch.hidden_size * arch.vocab_size
    )


def parameters(arch: Architecture) -> int:
    embedding = 0 if arch.share_embeddings_and_output_weights else arch.hidden_size * arch.vocab_size
    return product_parameters(arch) + embedding


def training_flops(arch: Architecture, parts: Sequence[tuple[int, int]]) -> float:
    """Of forward and backward pass over `parts` (before, length): so many tokens that go on from so many before.

    6 for each parameter and token; in each layer, for each unit of the attention's width, 12 for each token and token
    seen (PaLM, arXiv 2204.02311, appendix B), of which a part sees all before it and half of itself.
    """
    width, tokens = arch.num_attention_heads * arch.head_dim, sum(length for _, length in parts)
    seen = sum(length * (before + length / 2) for before, length in parts)
    return 6.0 * product_parameters(arch) * tokens + 12.0 * arch.num_layers * width * seen


def random_rows(count: int, length: int, arch: Architecture, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, arch.vocab_size - 1, (count, length), generator=generator).tolist()


def peer(arch: Architecture, device: torch.device) -> Any:
    """The shape in transformers, bf16; None where it cannot be imported."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.query_groups,
        max_position_embeddings=arch.max_position_embeddings,
        tie_word_embeddings=arch.share_embeddings_and_output_weights,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).to(device).eval()
