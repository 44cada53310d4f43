"""What the samples of policies say of them, and of one beside another."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_aligner.algorithms.best_of import best_of, pass_at, powers_up_to
from nemo_aligner.algorithms.comparison import Answers, distinct
from nemo_aligner.algorithms.statistics import mean_and_std, standard_error
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.records import part_name

log = logging.getLogger(__name__)


def figures_of(
    cfg: EvaluationConfig, policy_file: str, samples: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Answers]:
    """What the samples of a policy say of it, and its answers to compare with another's."""

    def column(name: str) -> list[Any]:
        return [sample[name] for sample in samples]

    several = parts_of(cfg)
    answers = Answers(column(cfg.data.reward_key), column("prompt_index"), column("num_tokens"))
    texts = column(cfg.data.output_key)
    mean, std = mean_and_std(answers.rewards)
    figures = {
        "policy": policy_file,
        "reward_mean": mean,
        "reward_standard_error": standard_error(answers.rewards, answers.prompts),
        "reward_std": std,
        **({"unknown": sum(map(math.isnan, answers.rewards)) / len(samples)} if several else {}),
        **{
            f"{part_name(name)}_mean": mean_and_std(column(part_name(name, cfg.data.reward_key)))[0] for name in several
        },
        "kl": None if None in column("kl") else sum(column("kl")) / len(samples),
        "response_length": sum(answers.lengths) / len(samples),
        "finished": column("finish_reason").count("stop") / len(samples),
        "samples": len(samples),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        **best_of_figures(answers, cfg.data.n, cfg.pass_threshold),
    }
    return figures, answers


def best_of_figures(answers: Answers, n: int, pass_threshold: float | None) -> dict[str, dict[str, float]]:
    """`best_of` k samples of a prompt, k = 1, 2, 4, … n, and `pass_at` k where it is said what passes: means over the
    prompts of which all n samples have a reward."""
    groups = [[reward for reward, _ in samples] for samples in answers.by_prompt().values() if len(samples) == n]
    figures = {"best_of": {str(k): mean_and_std([best_of(group, k) for group in groups])[0] for k in powers_up_to(n)}}
    if pass_threshold is not None:
        passed = [sum(reward > pass_threshold for reward in group) for group in groups]
        figures["pass_at"] = {str(k): mean_and_std([pass_at(k, n, c) for c in passed])[0] for k in powers_up_to(n)}
    return figures


def parts_of(cfg: EvaluationConfig) -> Sequence[str]:
    """Names of several sources of rewards."""
    return [*cfg.reward_plan.weights] if cfg.reward_plan.functions else []


def tell_comparison(figures: Mapping[str, Any], first: str) -> None:
    low, high = figures["win_rate_interval"]
    log.info(
        "%s: reward %+.4g ± %.2g over %s on the same prompts; wins %.0f %% (%.0f to %.0f), at equal length %.0f %%",
        figures["policy"], figures["gain"], figures["gain_standard_error"], first,
        100 * figures["win_rate"], 100 * low, 100 * high, 100 * figures["win_rate_length_controlled"],
    )  # fmt: skip


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `figures`, those of a table or a list as name/key or name/place."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, list):
            value = {str(place): one for place, one in enumerate(value)}
        if isinstance(value, dict):
            found |= {f"{name}/{key}": one for key, one in numbers(value).items()}
        elif isinstance(value, int | float):
            found[name] = value
    return found
