"""The reward model: a transformer whose head gives one number per attribute at the last token of a text."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron.core.transformer.module import MegatronModule

from nemo_aligner.algorithms.batching import deal, pad_rows
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine.checks import check_is_reward_model
from nemo_aligner.engine.generation.rows import RowForward
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.loading import load_for_inference, load_for_training
from nemo_aligner.engine.model.forward import forward_outputs
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.engine.training.trainable import MegatronTrainable


class MegatronRewardModel(MegatronTrainable):
    """Implements interfaces.RewardModel."""

    _rows: RowForward | None = None  # with its weights packed, as long as nobody asks for the module
    _packed: ExitStack

    @property
    def module(self) -> MegatronModule:
        self._unpack()
        return super().module

    @property
    def append_eod(self) -> bool:
        return self.arch.append_eod

    @property
    def stored_standardization(self) -> tuple[float, float] | None:
        stored = self.arch.reward_standardization
        return None if not stored else (stored["mean"], stored["std"])

    def score(self, rows: Sequence[Sequence[int]], micro_batch_size: int) -> list[list[float]]:
        """K rewards of each token row, in their order, read at its last token.

        On a CPU a reward is a function of its row alone, and as many rows run together as is good.
        """
        if self.on_cpu:
            with self._row_forward() as forward:
                return forward.rewards(rows)
        results: list[list[float]] = [[]] * len(rows)
        [batches] = deal([[row] for row in rows], ranks=1, size=micro_batch_size)
        microbatches = [Microbatch(*pad_rows([rows[i] for i in batch], self.tokenizer.pad_id)) for batch in batches]
        for batch, rewards in zip(
            batches, forward_outputs(self.module, microbatches, self.arch.vocab_size), strict=True
        ):
            for row, i in enumerate(batch):
                results[i] = rewards[row].tolist()
        return results

    @contextmanager
    def _row_forward(self) -> Iterator[RowForward]:
        """To pack the weights takes as long as a few texts: those not in training stay packed from call to call."""
        if self._rows is None:
            rows, packed = RowForward(self.module, self.arch), ExitStack()
            packed.enter_context(rows.ready())
            self._rows, self._packed = rows, packed
            weakref.finalize(self, packed.close)  # or Python would, at its end, when what it takes is gone
        try:
            yield self._rows
        finally:
            if self._wrapped is not None:
                self._unpack()

    def _unpack(self) -> None:
        if self._rows is not None:
            self._packed.close()
            self._rows = None


def load_reward_model(
    path: str | Path, cluster: MegatronCluster, *, precision: str, key: str = "gpt_model_file"
) -> MegatronRewardModel:
    """The reward model of an archive, for scoring. Raises CheckpointError when the archive is a policy's."""
    check_is_reward_model(path, key)
    return MegatronRewardModel(load_for_inference(path, cluster, precision=precision, key=key), cluster)


def load_reward_model_for_training(
    model: ModelOverrides, trainer: TrainerConfig, cluster: MegatronCluster, *, reward_model_type: str
) -> MegatronRewardModel:
    """A reward model grown from the policy (or reward model) archive at `model.restore_from_path`."""
    key = "pretrained_checkpoint.restore_from_path"
    return MegatronRewardModel(load_for_training(model, trainer, cluster, key=key, new_head=reward_model_type), cluster)
