"""The cache against a dictionary of tensors, over random additions, growth and removals."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_aligner.engine.kv_cache import CachedPrompt, KVCache


@pytest.mark.parametrize("block_rows", [1, 3, 64])
def test_every_row_keeps_its_keys_and_values_whatever_comes_and_goes(block_rows: int) -> None:
    rng, cache = random.Random(block_rows), KVCache(grain=4, block_rows=block_rows)
    wanted: dict[int, torch.Tensor] = {}
    for slot in range(300):
        if wanted and rng.random() < 0.45:
            gone = rng.choice(list(wanted))
            cache.drop(gone)
            del wanted[gone]
        else:
            wanted[slot] = torch.randn(2, 2, 2, rng.randint(1, 20), 3)
            cache.add(slot, CachedPrompt(wanted[slot], None))
        if wanted and rng.random() < 0.5:
            grown = rng.choice(list(wanted))
            cache.ensure(grown, wanted[grown].size(3) + rng.randint(1, 30))
        assert sorted(cache.slots) == sorted(wanted)
        found = [block[:, :, row] for _, block in cache.blocks() for row in range(block.size(2))]
        for slot, row in zip(cache.slots, found, strict=True):
            length = wanted[slot].size(3)
            assert torch.equal(row[..., :length, :], wanted[slot])
            assert not row[..., length:, :].any()
            assert row.size(3) > length
        places = cache.places() if wanted else torch.empty(0, 4)
        assert places[:, 0].tolist() == [row.data_ptr() for row in found]
