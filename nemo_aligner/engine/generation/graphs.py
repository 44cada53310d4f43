"""Decode steps as CUDA graphs: one launch for a step, which as many kernels would take longer to launch than to run.

A graph is of fixed memory, so it is of whole blocks of the cache, rows that nobody uses included, and is recorded anew
when blocks come or go. What is computed of such a row meets no other row, and is not looked at.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nemo_aligner.engine.generation.kv_cache import KVCache

log = logging.getLogger(__name__)

MIN_STEPS = 8
"""Steps over the same blocks after which they are worth a recording, which takes as long as some tens of steps."""

_KEPT = 8
"""Graphs at once."""

Blocks = Iterable[tuple[slice, Tensor]]
"""Rows of a step, and their keys and values `[layers, 2, rows, G, T, D]`."""

Step = Callable[[Tensor, Tensor, Blocks], Tensor]
"""Tokens and positions `[B]`, and blocks of all B rows, to logits `[B, V]`."""


class _Recorded:
    """A graph with the memory it reads and writes: tokens and positions `[B]` of all rows of the blocks, logits."""

    logits: Tensor

    def __init__(self, rows: int, device: torch.device) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.tokens, self.positions = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))

    def fill(self, tokens: Tensor, positions: Tensor, sizes: Sequence[tuple[int, int]]) -> list[slice]:
        """Put them where they are read; returns where. `sizes`: of each block the rows in use, and all."""
        places, taken, start = [], 0, 0
        for used, size in sizes:
            places.append(slice(start, start + used))
            self.tokens[places[-1]], self.positions[places[-1]] = tokens[taken:][:used], positions[taken:][:used]
            taken, start = taken + used, start + size
        return places

    def replay(self, places: Sequence[slice]) -> Tensor:
        """Logits of the rows at `places`."""
        self.graph.replay()
        found = [self.logits[place] for place in places]
        return found[0] if len(found) == 1 else torch.cat(found)


class GraphedSteps:
    """`step`, replayed from a recording where the same blocks are decoded again and again."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._recorded: OrderedDict[tuple[int, ...], _Recorded] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._last: tuple[int, ...] = ()
        self._repeats = 0
        self._works = True

    def __call__(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Logits `[B, V]` of tokens and positions `[B]`, as CachedForward.step has them."""
        blocks = list(cache.whole_blocks())
        rows = sum(block.size(2) for _, block in blocks)
        key = tuple(number for _, block in blocks for number in (block.data_ptr(), *block.shape))
        self._repeats = self._repeats + 1 if key == self._last else 0
        self._last = key
        # few rows of large blocks cost more as a whole than their launches
        if not self._works or 2 * len(tokens) < rows or (key not in self._recorded and self._repeats < MIN_STEPS):
            return self._step(tokens, positions, cache.blocks())
        fresh = key not in self._recorded
        graph = _Recorded(rows, self._device) if fresh else self._recorded[key]
        places = graph.fill(tokens, positions, [(used, block.size(2)) for used, block in blocks])
        if fresh and not self._record(graph, [block for _, block in blocks]):
            return self._step(tokens, positions, cache.blocks())
        self._recorded[key] = graph
        self._recorded.move_to_end(key)
        if len(self._recorded) > _KEPT:
            self._recorded.popitem(last=False)
        return graph.replay(places)

    def clear(self) -> None:
        """Give back the memory of all recordings."""
        self._recorded.clear()
        self._last, self._repeats = (), 0

    def _record(self, recorded: _Recorded, blocks: Sequence[Tensor]) -> bool:
        """False where it cannot be done."""
        ends = itertools.accumulate(block.size(2) for block in blocks)
        parts = [(slice(end - block.size(2), end), block) for end, block in zip(ends, blocks, strict=True)]
        try:
            # NCCL has a thread of its own, which is none of a recording's business
            with torch.cuda.graph(recorded.graph, pool=self._pool, capture_error_mode="thread_local"):
                recorded.logits = self._step(recorded.tokens, recorded.positions, parts)
        except RuntimeError as fault:
            log.warning("decode steps are launched kernel by kernel, slower: no CUDA graph of them (%s)", fault)
            self._works = False
        return self._works
