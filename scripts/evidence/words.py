"""What the figures support, in words: each sentence is chosen by a rule about intervals, and holds its figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from scripts.evidence.estimates import Interval, Point, Reference, difference
from scripts.evidence.methods import Method, Scale, contrasts

VERDICTS = {1: "higher", -1: "lower", 0: "not told apart"}


def shown(value: Interval) -> str:
    return f"{value.mean:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def listed(names: Sequence[str]) -> str:
    return "; ".join(names) if names else "none"


def sections(
    methods: Sequence[Method], points: Sequence[Point], reference: Reference, scale: Scale, seeds: int
) -> list[tuple[str, list[str]]]:
    """(heading, sentences) of everything that is said."""
    titles = {method.name: method.title for method in methods}
    last = {point.method: point for point in points}  # in the order of training
    return [
        ("Gain over the start model", gains(titles, last)),
        ("Which method gained most", most(titles, last)),
        ("Side by side", compared(titles, last, scale)),
        ("Reward for its KL", against_best_of_n(titles, last, reference)),
        ("Over-optimisation", over_optimised(titles, points, last)),
        ("What these data do not show", limits(last, seeds)),
    ]


def gains(titles: dict[str, str], last: dict[str, Point]) -> list[str]:
    found: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for name, point in last.items():
        found[point.gains["reward"].sign].append(f"{titles[name]}: {shown(point.gains['reward'])}")
    said = {1: "The interval is above 0", 0: "The interval holds 0", -1: "The interval is below 0"}
    return [f"{said[sign]}: {listed(names)}." for sign, names in found.items() if names]


def most(titles: dict[str, str], last: dict[str, Point]) -> list[str]:
    best = max(last, key=lambda name: last[name].gains["reward"].mean)
    others = [name for name in last if name != best]
    near = [titles[n] for n in others if last[n].gains["reward"].overlaps(last[best].gains["reward"])]
    below = [titles[n] for n in others if titles[n] not in near]
    return [
        f"The largest mean is that of {titles[best]}, {shown(last[best].gains['reward'])}.",
        f"Its interval overlaps with that of: {listed(near)}. Of these it cannot be said that they gain less.",
        f"It does not overlap with that of: {listed(below)}.",
    ]


def compared(titles: dict[str, str], last: dict[str, Point], scale: Scale) -> list[str]:
    """The questions that were there before the figures."""
    said = []
    for question, own, other in contrasts(scale):
        if own in last and other in last:
            found = difference(last[own].rewards["reward"], last[other].rewards["reward"])
            said.append(f"{question}: {VERDICTS[found.sign]}, {shown(found)}.")
    return said


def against_best_of_n(titles: dict[str, str], last: dict[str, Point], reference: Reference) -> list[str]:
    """Where a method's interval lies to what best-of-n gains at the method's mean KL."""
    places: dict[str, list[str]] = {"above": [], "around": [], "below": [], "beyond": []}
    for name, point in last.items():
        gain, line = point.gains["reward"], reference.at("reward", point.kl.mean)
        if line is None:
            places["beyond"].append(f"{titles[name]} (KL {point.kl.mean:.2f})")
            continue
        place = "above" if gain.low > line else "below" if gain.high < line else "around"
        places[place].append(f"{titles[name]} ({shown(gain)} at KL {point.kl.mean:.2f}, best-of-n {line:+.2f})")
    said = {
        "above": "More reward than best-of-n at the same KL",
        "around": "Not told apart from best-of-n at the same KL",
        "below": "Less reward than best-of-n at the same KL",
        "beyond": f"Further from the start than best-of-{reference.ns[-1]} may be, {reference.kl[-1]:.2f} nats, so "
        "that there is no line to compare with",
    }
    return [f"{said[place]}: {listed(names)}." for place, names in places.items() if names]


def over_optimised(titles: dict[str, str], points: Sequence[Point], last: dict[str, Point]) -> list[str]:
    """Whether what was gained by the reward of training is gained by rewards that were not."""
    said = []
    for gold, called in (("gold", "the second reward model"), ("vader", "VADER")):
        found: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for name, point in last.items():
            if point.gains["reward"].sign > 0:
                found[point.gains[gold].sign].append(f"{titles[name]} ({shown(point.gains[gold])})")
        for sign, verdict in ((1, "rises too"), (0, "is not told apart from that of the start"), (-1, "falls")):
            if found[sign]:
                said.append(f"Where the reward of training rose, that of {called} {verdict}: {listed(found[sign])}.")
        for before, after in pairwise(points):
            if before.method == after.method:
                trained, other = (
                    difference(after.rewards[reward], before.rewards[reward]) for reward in ("reward", gold)
                )
                if trained.sign > 0 > other.sign:
                    said.append(
                        f"{titles[after.method]} is over-optimised from point {before.at} to {after.at}: the reward of "
                        f"training {shown(trained)}, that of {called} {shown(other)}."
                    )
    return said or ["The reward of training rose for no method, so there is nothing to over-optimise."]


def limits(last: dict[str, Point], seeds: int) -> list[str]:
    unknown = sum(point.gains["reward"].sign == 0 for point in last.values())
    intervals = (
        f"Intervals are Student's, 95 %, over {seeds} seeds, each seed one training on the same prompts."
        if seeds > 1
        else "There is one seed: intervals (95 %) are over prompts, and what another seed would do is not in them."
    )
    return [
        intervals,
        f"Of {len(last)} methods {unknown} are not told apart from the start model.",
        "One start model, one reward model, one set of prompts, short responses, and one learning rate for all offline "
        "methods and one for REINFORCE, tuned for no method: another setting may order the methods otherwise.",
        "Many intervals are looked at here, each with its own 5 %: of twenty, one may miss.",
    ]
