"""What scripts/bench/training.py asks of every engine: token rows, made of real film reviews.

A workload is a dict of plain lists, so that a file of JSON carries it into any environment:

    label_distinct, label_n16   rows
    sft                         rows, prompts: how many of each row's tokens are prompt
    rm                          rows: chosen and rejected by turns
    rloo_short, rloo_long       prompts, samples, new_tokens

and `items`, the number of what the figure of the key counts. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from workload import CLOCKS

STEP_ROWS = 64
"""Rows, or pairs, of one optimizer step."""


@dataclass(frozen=True)
class Key:
    """A workload: `count` texts, prompts, rows or pairs at scale 1, `least` at any; `goal`: ours over the peer."""

    unit: str
    goal: float
    count: int
    least: int

    def scaled(self, scale: float) -> int:
        return max(self.least, round(self.count * scale))


KEYS = {
    "label_distinct": Key("seq/s", 1.4, 2000, 32),
    "label_n16": Key("seq/s", 4.0, 64, 2),
    "sft": Key("tokens/s", 2.5, 1280, STEP_ROWS),
    "rm": Key("pairs/s", 3.0, 320, 16),
    "rloo_short": Key("rollouts/s", 5.0, 4, 4),
    "rloo_long": Key("rollouts/s", 12.0, 4, 1),
}
TRAINING = ("sft", "rm", "rloo_short", "rloo_long")
PRODUCTS_GOAL = 0.7
LONGEST = 1024
"""Tokens of a text to label, at most."""


def parser() -> argparse.ArgumentParser:
    """What every worker is told."""
    made = argparse.ArgumentParser()
    made.add_argument("--model", required=True)
    made.add_argument("--workload", required=True)
    made.add_argument("--key", choices=KEYS, required=True)
    made.add_argument("--dtype", choices=["32", "bf16"], required=True)
    made.add_argument("--threads", type=int, required=True)
    made.add_argument("--clock", choices=CLOCKS, required=True)
    return made


class Reviews:
    """Reviews as tokens, in a random order, over and over."""

    def __init__(self, texts: Sequence[str], encode: Callable[[str], list[int]], rng: random.Random) -> None:
        self._rng, self._encode = rng, encode
        self._drawn = self._forever(list(texts))

    def _forever(self, texts: list[str]) -> Iterator[list[int]]:
        while True:
            self._rng.shuffle(texts)
            yield from map(self._encode, texts)

    def whole(self) -> list[int]:
        """A review, its first LONGEST tokens at most."""
        return next(self._drawn)[:LONGEST]

    def opening(self, width: int) -> list[int]:
        """The first `width` tokens of a review that has so many."""
        return next(tokens for tokens in self._drawn if len(tokens) >= width)[:width]

    def response(self) -> list[int]:
        """An opening whose length is from a lognormal: mean 64 tokens, at most 256."""
        return self.opening(min(256, max(4, round(self._rng.lognormvariate(3.85, 0.78)))))

    def going_on(self, prompt: list[int], times: int) -> list[list[int]]:
        return [prompt + self.response() for _ in range(times)]


def make(key: str, reviews: Reviews, rng: random.Random, scale: float) -> dict[str, Any]:
    """The workload of `key`; the same for the same reviews and state of `rng`."""
    count = KEYS[key].scaled(scale)
    if key == "label_distinct":
        return {"rows": [reviews.whole() for _ in range(count)], "items": count}
    if key == "label_n16":
        rows = [row for _ in range(count) for row in reviews.going_on(reviews.opening(256), 16)]
        return {"rows": rows, "items": len(rows)}
    if key == "sft":
        prompts = [reviews.opening(rng.randint(16, 64)) for _ in range(count)]
        rows = [prompt + reviews.response() for prompt in prompts]
        return {"rows": rows, "prompts": [len(prompt) for prompt in prompts], "items": sum(map(len, rows))}
    if key == "rm":
        rows = [row for _ in range(count) for row in reviews.going_on(reviews.opening(128), 2)]
        return {"rows": rows, "items": count}
    width, samples = {"rloo_short": (80, 4), "rloo_long": (512, 16)}[key]
    prompts = [reviews.opening(width) for _ in range(count)]
    return {"prompts": prompts, "samples": samples, "new_tokens": 64, "items": count * samples}


def reward(tokens: Sequence[int]) -> float:
    """A reward that costs nothing: how many of a response's tokens have an even number, from 0 to 1."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)
