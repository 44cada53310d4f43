"""How good policies are: plain samples on held-out prompts, their rewards, and the KL to the policy they began as.

The models are loaded one after another: each policy (generate, logprobs), the initial policy, the reward model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner.algorithms.best_of import best_of, pass_at, powers_up_to
from nemo_aligner.algorithms.comparison import Answers, compare, distinct
from nemo_aligner.algorithms.statistics import mean_and_std, standard_error
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.data.blending import Blend
from nemo_aligner.data.jsonl import without_nan, write_jsonl
from nemo_aligner.data.judged_text import TextEncoder
from nemo_aligner.engine.checks import check_is_policy, check_is_reward_model
from nemo_aligner.engine.interfaces import Cluster, GenerationRequest, Policy, Response, RewardModel
from nemo_aligner.files import write_atomically
from nemo_aligner.metrics import Progress
from nemo_aligner.stages.offline.data import (
    check_archive,
    check_output,
    check_template,
    open_rows,
    start_cluster,
    tell_empty,
)
from nemo_aligner.stages.offline.random_sampler import Prompts, sampling_params
from nemo_aligner.stages.run_owner import owning

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_aligner.engine.processes.cluster import MegatronCluster

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A response with the token ids of its prompt."""

    prompt_tokens: tuple[int, ...]
    response: Response

    @property
    def row(self) -> list[int]:
        return [*self.prompt_tokens, *self.response.tokens]


def run(cfg: EvaluationConfig) -> None:
    """Write reward_mean, reward_std, kl, ... of every policy to `cfg.output_file`, the samples beside it."""
    check_output(cfg)
    check_template(cfg.data.prompt_template, cfg.data.input_key)
    for path in cfg.policy_files:
        check_is_policy(path, "policy_files")
    if cfg.initial_policy_file is not None:
        check_is_policy(cfg.initial_policy_file, "initial_policy_file")
    check_is_reward_model(cfg.reward_model_file, "reward_model_file")
    check_archive(cfg)
    rows = open_rows(cfg.data, {cfg.data.input_key: "data.input_key"})

    with owning(cfg.output_file, cfg.trainer), start_cluster(cfg) as cluster:
        evaluate(cfg, rows, cluster)


def evaluate(cfg: EvaluationConfig, rows: Blend, cluster: MegatronCluster) -> None:
    """One model after another on the same prompts, then the reports."""
    from nemo_aligner.algorithms.reinforce import sequence_kl
    from nemo_aligner.engine.policy import load_policy
    from nemo_aligner.engine.reward_model import load_reward_model

    precision, batch = cfg.trainer.precision, cfg.data.micro_batch_size

    found: list[tuple[list[Drawn], list[Tensor]]] = []
    for path in cfg.policy_files:
        policy = load_policy(path, cluster, precision=precision, key="policy_files")
        drawn = draw(cfg, rows, policy, cluster, Path(path).name)
        own = [] if cfg.initial_policy_file is None else policy.logprobs(tokens_of(drawn), batch, starts_of(drawn))
        found.append((drawn, own))
        del policy  # one model at a time
    kls: list[list[float] | None] = [None] * len(found)
    if cfg.initial_policy_file is not None:
        initial = load_policy(cfg.initial_policy_file, cluster, precision=precision, key="initial_policy_file")
        for i, (drawn, own) in enumerate(found):
            starts = starts_of(drawn)
            first = initial.logprobs(tokens_of(drawn), batch, starts)
            kls[i] = [
                sequence_kl(a[start:], b[start:], "k1", "sum") for start, a, b in zip(starts, own, first, strict=True)
            ]
        del initial
    judge = load_reward_model(cfg.reward_model_file, cluster, precision=precision, key="reward_model_file")
    reports = [
        report(cfg, path, rows, drawn, score(cfg, rows, drawn, judge), kl, cluster)
        for path, (drawn, _), kl in zip(cfg.policy_files, found, kls, strict=True)
    ]
    figures = [told for told, _ in reports]
    for told, answers in reports[1:]:
        told.update(compare(answers, reports[0][1]))
        low, high = told["win_rate_interval"]
        log.info(
            "%s: reward %+.4g ± %.2g over %s on the same prompts; wins %.0f %% (%.0f to %.0f), at equal length %.0f %%",
            told["policy"], told["gain"], told["gain_standard_error"], cfg.policy_files[0],
            100 * told["win_rate"], 100 * low, 100 * high, 100 * told["win_rate_length_controlled"],
        )  # fmt: skip
    if cluster.is_main:
        write_atomically(cfg.output_file, [json.dumps(without_nan(figures), indent=1), "\n"])


def tokens_of(drawn: Sequence[Drawn]) -> list[list[int]]:
    return [d.row for d in drawn]


def starts_of(drawn: Sequence[Drawn]) -> list[int]:
    return [len(d.prompt_tokens) for d in drawn]


def draw(cfg: EvaluationConfig, rows: Blend, policy: Policy, cluster: Cluster, name: str) -> list[Drawn]:
    """`data.n` samples of each of this replica's prompts, in prompt order."""
    prompts = Prompts(cfg, rows, policy)
    requests = [
        GenerationRequest(p, s, prompts.tokens(p))
        for p in range(cluster.dp_rank, len(rows), cluster.dp_size)
        for s in range(cfg.data.n)
    ]
    slots = cfg.inference.max_batch_slots or cfg.data.micro_batch_size * cfg.data.n
    tokens = {request.prompt_index: request.prompt_tokens for request in requests}
    drawn = []
    with Progress(f"evaluating {name}", len(requests), show=cluster.is_main) as progress:
        for response in policy.generate(requests, sampling_params(cfg.inference, cfg.seed), slots):
            drawn.append(Drawn(tokens[response.prompt_index], response))
            progress.advance(1, len(response.tokens))
    return sorted(drawn, key=lambda d: (d.response.prompt_index, d.response.sample_index))


def score(cfg: EvaluationConfig, rows: Blend, drawn: Sequence[Drawn], judge: RewardModel) -> list[float]:
    """Rewards of the texts that the labeler would make of the same rows."""
    data, encoder = cfg.data, TextEncoder(cfg.data, judge)
    texts = [encoder.tokens({**rows[d.response.prompt_index], data.output_key: d.response.text}) for d in drawn]
    encoder.report()
    return [reward[0] for reward in judge.score(texts, data.micro_batch_size)]


def report(
    cfg: EvaluationConfig,
    policy_file: str,
    rows: Blend,
    drawn: Sequence[Drawn],
    rewards: Sequence[float],
    kl: Sequence[float] | None,
    cluster: Cluster,
) -> tuple[dict[str, Any], Answers]:
    """One policy's figures over all replicas, and its answers; its samples are written beside the output file."""
    own = [
        {
            **rows[d.response.prompt_index],
            cfg.data.output_key: d.response.text,
            cfg.data.reward_key: reward,
            "kl": None if kl is None else kl[i],
            "num_tokens": len(d.response.tokens),
            "finish_reason": d.response.finish_reason,
            "prompt_index": d.response.prompt_index,
        }
        for i, (d, reward) in enumerate(zip(drawn, rewards, strict=True))
    ]
    samples: list[dict[str, Any]] = sorted(
        (sample for part in cluster.gather(own) for sample in part), key=lambda sample: sample["prompt_index"]
    )
    found = Answers(
        [sample[cfg.data.reward_key] for sample in samples],
        [sample["prompt_index"] for sample in samples],
        [sample["num_tokens"] for sample in samples],
    )
    texts = [sample[cfg.data.output_key] for sample in samples]
    mean, std = mean_and_std(found.rewards)
    figures = {
        "policy": policy_file,
        "reward_mean": mean,
        "reward_standard_error": standard_error(found.rewards, found.prompts),
        "reward_std": std,
        "kl": None if kl is None else sum(sample["kl"] for sample in samples) / len(samples),
        "response_length": sum(found.lengths) / len(samples),
        "finished": sum(sample["finish_reason"] == "stop" for sample in samples) / len(samples),
        "samples": len(samples),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        **best_of_figures(found, cfg.data.n, cfg.pass_threshold),
    }
    if cluster.is_main:
        write_jsonl(f"{cfg.output_file}.{Path(policy_file).stem}.jsonl", samples)
        told = [f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float)]
        log.info("%s: %s", policy_file, ", ".join(told))
        tell_empty(texts)
    return figures, found


def best_of_figures(answers: Answers, n: int, pass_threshold: float | None) -> dict[str, dict[str, float]]:
    """`best_of` k samples of a prompt, k = 1, 2, 4, … n, and `pass_at` k where it is said what passes: means over the
    prompts of which all n samples have a reward."""
    groups = [[reward for reward, _ in samples] for samples in answers.by_prompt().values() if len(samples) == n]
    figures = {"best_of": {str(k): mean_and_std([best_of(group, k) for group in groups])[0] for k in powers_up_to(n)}}
    if pass_threshold is not None:
        passed = [sum(reward > pass_threshold for reward in group) for group in groups]
        figures["pass_at"] = {str(k): mean_and_std([pass_at(k, n, c) for c in passed])[0] for k in powers_up_to(n)}
    return figures
