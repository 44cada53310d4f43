"""Sums of two numbers for `quickstart.sh --math`: what a careless pupil wrote down, and problems to learn from reward.

pupil.jsonl      {"input": "37+45=", "output": "\\boxed{82}"}: always in a box, and right as often as --right says
problems.jsonl   {"input": "37+45=", "answer": "82"}, other sums than the held-out ones
held_out.jsonl   the same of sums that stand in no other file
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where it is not installed

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.data.jsonl import Row, write_jsonl

SLIPS = (-10, -2, -1, 1, 2, 10)


def sums(numbers: int) -> list[tuple[int, int]]:
    """Every pair of numbers from 0 to `numbers` - 1."""
    return [(a, b) for a in range(numbers) for b in range(numbers)]


def written_down(a: int, b: int, right: float, rng: random.Random) -> Row:
    """A sum as the pupil solves it: right, or wrong by a slip."""
    answer = a + b if rng.random() < right else max(0, a + b + rng.choice(SLIPS))
    return {"input": f"{a}+{b}=", "output": rf"\boxed{{{answer}}}"}


def problem(a: int, b: int) -> Row:
    return {"input": f"{a}+{b}=", "answer": str(a + b)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--numbers", type=int, default=50, help="those that are added are below it")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--problems", type=int, default=1024, help="to learn from reward")
    parser.add_argument("--written-down", type=int, default=30000, help="by the pupil, many of them several times")
    parser.add_argument("--right", type=float, default=0.5, help="part that the pupil gets right")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    pairs = sums(args.numbers)
    rng.shuffle(pairs)
    held_out, known = pairs[: args.held_out], pairs[args.held_out :]
    pupil = [written_down(*rng.choice(known), args.right, rng) for _ in range(args.written_down)]
    write_jsonl(args.folder / "held_out.jsonl", (problem(*pair) for pair in held_out))
    write_jsonl(args.folder / "problems.jsonl", (problem(*pair) for pair in rng.sample(known, args.problems)))
    write_jsonl(args.folder / "pupil.jsonl", pupil)


if __name__ == "__main__":
    with one_line_errors():
        main()
