"""Virtual pipeline stages (arXiv 2104.04473, section 2.2): a rank has several stretches of layers instead of one.

A micro-batch passes every rank `chunks` times, so that ranks wait for one another that much less at both ends of a
step. Of 8 layers with 2 ranks and 2 chunks each:

    rank 0   layers 0 1 (chunk 0)   4 5 (chunk 1)
    rank 1   layers 2 3 (chunk 0)   6 7 (chunk 1)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn


class InterleavedStages(MegatronModule):
    """What one rank has of a model, in chunks that are GPTModels, with its parts named as those of a single stage.

    Megatron's schedules call the chunks. Optimizer, checkpoints, adapters and generation see this module, whose
    `decoder.layers` are the layers of all chunks in order.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        first, last = chunks[0], chunks[-1]
        super().__init__(first.config)
        self.chunks = tuple(chunks)  # which torch does not look into: their parts are registered below
        self.pre_process, self.post_process = first.pre_process, last.post_process
        self.gives_rewards: bool = first.gives_rewards
        self.share_embeddings_and_output_weights: bool = first.share_embeddings_and_output_weights
        self.adapters, self.router_losses = None, first.router_losses
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(layer for chunk in chunks for layer in chunk.decoder.layers)
        self.decoder.final_layernorm = last.decoder.final_layernorm
        for chunk in chunks:  # the embedding is the first one's, the output layer the last one's
            for name, part in chunk.named_children():
                if name != "decoder":
                    self.add_module(name, part)

    def train(self, mode: bool = True) -> InterleavedStages:
        for chunk in self.chunks:
            chunk.train(mode)
        super().train(mode)
        return self

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The embedding on the first stage; on the last the output layer's, where the two are tied."""
        return self.chunks[0 if self.pre_process else -1].shared_embedding_or_output_weight()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        state: ShardedStateDict = {}
        before = 0  # layers of the chunks before
        for chunk in self.chunks:
            own = chunk.sharded_state_dict(prefix, sharded_offsets, metadata)
            state |= {_counted_from(before, name): value for name, value in own.items()}
            before += len(chunk.decoder.layers)
        return state


def _counted_from(first: int, name: str) -> str:
    """The name of a chunk's tensor with its layer counted over all chunks of the rank."""
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(first + int(found[0])), name, count=1)
