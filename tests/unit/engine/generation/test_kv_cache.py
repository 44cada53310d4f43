"""The cache against a dictionary of tensors, over random additions, growth and removals."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nemo_aligner.engine.generation.kv_cache import CachedPrompt, KVCache


@pytest.mark.parametrize("block_rows", [1, 3, 64])
def test_every_row_keeps_its_keys_and_values_whatever_comes_and_goes(block_rows: int) -> None:
    rng, cache = random.Random(block_rows), KVCache(300, grain=4, block_rows=block_rows, shares_prompts=False)
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
            cache.ensure(np.array([grown]), np.array([wanted[grown].size(3) + rng.randint(1, 30)]))
        assert sorted(cache.slots) == sorted(wanted)
        found = [block[:, :, row] for _, block in cache.blocks() for row in range(block.size(2))]
        for slot, row in zip(cache.slots, found, strict=True):
            length = wanted[slot].size(3)
            assert torch.equal(row[..., :length, :], wanted[slot])
            assert not row[..., length:, :].any()
            assert row.size(3) > length


@pytest.mark.parametrize("block_rows", [1, 3, 64])
def test_places_lead_to_the_shared_prompt_and_to_what_each_row_added(block_rows: int) -> None:
    rng, cache = random.Random(block_rows), KVCache(300, grain=4, block_rows=block_rows, shares_prompts=True)
    prompts = [torch.randn(2, 2, 2, length, 3) for length in (1, 5, 9)]
    wanted: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    for slot in range(200):
        if wanted and rng.random() < 0.3:
            gone = rng.choice(list(wanted))
            cache.drop(gone)
            del wanted[gone]
        else:
            wanted[slot] = prompts[slot % 3], []
            cache.add(slot, CachedPrompt(prompts[slot % 3], None))
        if not wanted:
            continue
        lengths = [prompt.size(3) + len(added) + 1 for prompt, added in wanted.values()]
        cache.ensure(np.array(list(wanted)), np.array(lengths))
        for slot, place in zip(cache.slots, cache.places().tolist(), strict=True):
            prompt, added = wanted[slot]
            row = cache._home[slot].row(slot)
            assert place == [prompt.size(3), prompt.data_ptr(), *prompt.stride()[:3], row.data_ptr(), *row.stride()[:3]]
            assert all(torch.equal(row[..., i, :], one) for i, one in enumerate(added))
            added.append(torch.randn(2, 2, 2, 3))
            row[..., len(added) - 1, :] = added[-1]
