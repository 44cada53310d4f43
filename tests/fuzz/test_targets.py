"""What is fuzzed by hand (run.py) is sound to begin with: the inputs to start from, and small damages of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import FUZZED


def damaged(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, a stretch left out, or one doubled."""
    begin, end = sorted(dice.randrange(1, len(data) + 1) for _ in range(2))
    kind = dice.randrange(3)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(3):
            changed[dice.randrange(1, len(data))] = dice.randrange(256)
        return bytes(changed)
    return data[:begin] + data[begin:end] * (0 if kind == 1 else 2) + data[end:]


@pytest.mark.parametrize("name", FUZZED)
def test_each_input_to_begin_with_and_damages_of_it_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    dice = random.Random(name)
    for seed in FUZZED[name].seeds():
        for data in (seed, *(damaged(seed, dice) for _ in range(15))):
            FUZZED[name].target(data, tmp_path)
            for found in tmp_path.iterdir():
                found.unlink()
