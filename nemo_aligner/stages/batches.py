"""The order of training: which examples make up global batch s, and which of them a rank gets in which micro-batch.

Everything is a function of (seed, step), so a run resumed at step s goes on with the batch it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_aligner.algorithms.batching import deal, pad_rows
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import Microbatch


@dataclass(frozen=True)
class BatchPlan:
    """Global batches over `count` examples; the last of an epoch may be smaller, and is trained unless `drop_last`.

    With a `limit`, an epoch is the first so many of its batches, or such a share of them.
    """

    count: int
    global_batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool = False
    limit: int | float | None = None

    @property
    def _batches(self) -> int:
        """Of an epoch without limit."""
        whole = self.count / self.global_batch_size
        # fewer examples than one batch are still a batch
        return max(1, math.floor(whole)) if self.drop_last else math.ceil(whole)

    @property
    def steps_per_epoch(self) -> int:
        if self.limit is None:
            return self._batches
        most = self.limit if isinstance(self.limit, int) else max(1, math.ceil(self._batches * self.limit))
        return min(self._batches, most)

    def indices(self, step: int) -> list[int]:
        """Examples of the global batch of optimizer step `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = list(range(self.count))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        return order[within * self.global_batch_size : (within + 1) * self.global_batch_size]

    def consumed(self, step: int) -> int:
        """Examples used in the first `step` steps, over all epochs; those that `drop_last` leaves out count too."""
        epoch, within = divmod(step, self.steps_per_epoch)
        limited = self.steps_per_epoch < self._batches
        whole = self.steps_per_epoch * self.global_batch_size if limited else self.count
        return epoch * whole + min(whole, within * self.global_batch_size)


def microbatches(
    examples: Sequence[Example],
    indices: Sequence[int],
    *,
    size: int,
    budget: int | None = None,
    dp_rank: int,
    dp_size: int,
    pad_id: int,
) -> list[Microbatch]:
    """This rank's part of a global batch, in micro-batches of at most `size` examples and `budget` tokens; see `deal`.

    Every rank gets the same number of micro-batches; one that a rank has nothing for is a masked example, which counts
    for nothing.
    """
    asked = [examples[i] for i in indices]
    filler = min(asked, key=lambda example: example.longest)
    return [
        collate([asked[i] for i in part] or [filler], pad_id, masked=not part)
        for part in deal([example.rows for example in asked], ranks=dp_size, size=size, budget=budget)[dp_rank]
    ]


def collate(examples: Sequence[Example], pad_id: int, *, masked: bool = False) -> Microbatch:
    """Examples as one micro-batch: `loss_mask` `[B, S]`, `weights` and `targets` `[B]` float32, all 0 when `masked`."""
    rows = [row for example in examples for row in example.rows]
    tokens, lengths = pad_rows(rows, pad_id)
    masks = [mask for example in examples for mask in example.masks]
    loss_mask, _ = pad_rows(masks, 0)
    loss_mask[:, 0] = 0  # nothing comes before the first token to predict it from
    keep = 0.0 if masked else 1.0
    weights = torch.tensor([example.weight for example in examples for _ in example.rows])
    counts = loss_mask.sum(1)
    given = [example.targets for example in examples for _ in example.rows]
    targets = torch.tensor([count if own is None else own for own, count in zip(given, counts.tolist(), strict=True)])
    fields = {"loss_mask": loss_mask.float(), "weights": weights, "targets": targets.float()}
    fields = {name: value * keep for name, value in fields.items()}
    return Microbatch(tokens, lengths, fields)
