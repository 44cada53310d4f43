"""The smallest model of each kind, with something to train it on, shared by the tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.engine.training.trainable import MegatronTrainable
from tests.fakes import ByteTokenizer

ARCH = Architecture(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=258,
    encoder_seq_length=64,
    max_position_embeddings=64,
    init_method_std=0.3,  # far from uniform predictions, so that greedy choices are not near ties
)
EXPERTS = replace(ARCH, num_moe_experts=4, moe_ffn_hidden_size=24, moe_layer_freq=[0, 1], moe_router_pre_softmax=True)
"""With experts in the second layer, as Qwen3-MoE has them; of Mixtral's kind without the last two."""

ARCHIVED = replace(ARCH, vocab_size=259, tokenizer=BYTE_TOKENIZER)
"""The same with the tokenizer that goes into an archive."""

OPTIM = OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95])


def trainable(cluster: MegatronCluster, arch: Architecture = ARCH, optim: OptimConfig = OPTIM) -> MegatronTrainable:
    torch.manual_seed(5)
    run = RunOptions()
    model = MegatronTrainable(LoadedModel(build_model(arch, run), arch, ByteTokenizer(), run, Path("none")), cluster)  # type: ignore[arg-type]
    model.add_optimizer(optim, clip_grad=0.0, max_steps=10)
    return model


def rows(count: int = 4, seed: int = 0) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 250, (count, 9), generator=generator)
    lengths = torch.tensor([9, 5, 7, 3][:count])
    mask = (torch.arange(9) < lengths[:, None]) & (torch.arange(9) >= 2)
    return Microbatch(tokens, lengths, {"loss_mask": mask.float(), "weights": torch.ones(count)})


def plain_sft_loss(module: torch.nn.Module, batch: Microbatch) -> torch.Tensor:
    """The objective over the dense model, in plain torch."""
    positions = torch.arange(batch.tokens.size(1)).expand_as(batch.tokens)
    logprobs = module(batch.tokens, positions, None)[..., : ARCH.vocab_size].log_softmax(-1)
    picked = logprobs[:, :-1].gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
    mask = batch.fields["loss_mask"]
    return -(picked * mask[:, 1:]).sum() / mask.sum()
