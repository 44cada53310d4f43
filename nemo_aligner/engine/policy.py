"""The policy: a language model that generates, gives log-probabilities, and may be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner.algorithms.batching import deal, pad_rows
from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine.checks import check_is_policy
from nemo_aligner.engine.generation.decode import CachedForward
from nemo_aligner.engine.generation.rows import RowForward
from nemo_aligner.engine.generation.scheduler import Generator
from nemo_aligner.engine.generation.serving import Server
from nemo_aligner.engine.interfaces import Desk, GenerationRequest, Microbatch, Response
from nemo_aligner.engine.loading import load_for_inference, load_for_training
from nemo_aligner.engine.model.forward import forward_outputs
from nemo_aligner.engine.model.kept_weights import KeptWeights
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.engine.training.trainable import MegatronTrainable


class MegatronPolicy(MegatronTrainable):
    """Implements interfaces.Policy."""

    _as_initial: Callable[[], AbstractContextManager[None]] | None = None  # inside it the weights are the initial ones

    def keep_initial_weights(self) -> None:
        """Remember the weights as they are now, in CPU memory, for `initial_logprobs`.

        With an adapter nothing is copied: the initial policy is the model without it.
        """
        adapters = self.module.adapters
        self._as_initial = KeptWeights(self.module).swapped_in if adapters is None else adapters.off

    def initial_logprobs(
        self, rows: Sequence[Sequence[int]], micro_batch_size: int, starts: Sequence[int] | None = None
    ) -> list[Tensor]:
        """`logprobs` under the initial weights, which take the place of the present ones meanwhile."""
        assert self._as_initial is not None, "keep_initial_weights comes first"
        with self._as_initial():
            return self.logprobs(rows, micro_batch_size, starts)

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: SamplingParams, max_slots: int
    ) -> Iterator[Response]:
        """Draw every request, `max_slots` at once, yielding each response as it finishes (any order)."""
        was_training = self.module.training
        self.module.eval()
        try:
            forward = CachedForward(self.module, self.arch)
            generator = Generator(forward, self.tokenizer, sampling, max_slots, self.max_sequence_length)
            yield from generator.run(requests)
        finally:
            self.module.train(was_training)

    def serve(self, desk: Desk | None, max_slots: int) -> None:
        """Draw what `desk` orders until it has had enough; see interfaces.Policy."""
        self.module.eval()
        forward = CachedForward(self.module, self.arch)
        unbounded = SamplingParams(max_tokens=self.max_sequence_length)
        server = Server(forward, self.tokenizer, unbounded, max_slots, self.max_sequence_length)
        server.serve(desk, self.cluster.broadcast, alone=self.cluster.world_size == 1)

    def logprobs(
        self, rows: Sequence[Sequence[int]], micro_batch_size: int, starts: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Log-probability of each token given those before it; see interfaces.Policy.

        On a CPU those of a row are a function of it alone, and as many rows run together as is good.
        """
        if self.on_cpu:
            forward = RowForward(self.module, self.arch)
            with forward.ready():
                return forward.logprobs(rows, starts or [0] * len(rows))
        was_training = self.module.training
        self.module.eval()
        results: list[Tensor] = [torch.empty(0)] * len(rows)
        [batches] = deal([[row] for row in rows], ranks=1, size=micro_batch_size)
        microbatches = []
        for batch in batches:
            tokens, lengths = pad_rows([rows[i] for i in batch], self.tokenizer.pad_id)
            firsts = torch.tensor([0 if starts is None else starts[i] for i in batch])
            asked = torch.arange(tokens.size(1)) >= firsts[:, None]
            microbatches.append(Microbatch(tokens, lengths, {"loss_mask": asked.float()}))
        for batch, logprobs in zip(
            batches, forward_outputs(self.module, microbatches, self.arch.vocab_size), strict=True
        ):
            for row, i in enumerate(batch):
                results[i] = logprobs[row, : len(rows[i])].clone()
        self.module.train(was_training)
        return results


def load_policy(
    path: str | Path, cluster: MegatronCluster, *, precision: str, key: str = "gpt_model_file"
) -> MegatronPolicy:
    """The policy of an archive, for generation and log-probabilities. Raises CheckpointError for a reward model's."""
    check_is_policy(path, key)
    return MegatronPolicy(load_for_inference(path, cluster, precision=precision, key=key), cluster)


def load_policy_for_training(
    model: ModelOverrides, trainer: TrainerConfig, cluster: MegatronCluster, *, key: str = "model.restore_from_path"
) -> MegatronPolicy:
    """The policy at `model.restore_from_path`; `add_optimizer` makes it trainable. Raises CheckpointError."""
    check_is_policy(model.restore_from_path, key)
    return MegatronPolicy(load_for_training(model, trainer, cluster, key=key), cluster)
