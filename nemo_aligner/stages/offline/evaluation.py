"""How good policies are: plain samples on held-out prompts, their rewards, and the KL to the policy they began as.

The models are loaded one after another: each policy (generate, logprobs), the initial policy, the reward model.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner.algorithms.comparison import Answers, compare
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.data.blending import Blend
from nemo_aligner.data.jsonl import without_nan, write_jsonl
from nemo_aligner.data.provenance import write_provenance
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from nemo_aligner.engine.checks import check_is_policy, check_is_reward_model
from nemo_aligner.engine.interfaces import Cluster, GenerationRequest, Policy, Response, RewardModel
from nemo_aligner.files import write_atomically
from nemo_aligner.metrics import Progress
from nemo_aligner.records import Keys, part_fields, part_name
from nemo_aligner.rewards.functions import Functions
from nemo_aligner.rewards.interfaces import Judgement
from nemo_aligner.stages.offline.data import (
    check_archive,
    check_output,
    check_prompt_template,
    check_templates,
    data_fingerprint,
    open_rows,
    start_cluster,
    tell_empty,
)
from nemo_aligner.stages.offline.evaluation_figures import figures_of, numbers, parts_of, tell_comparison
from nemo_aligner.stages.offline.random_sampler import Prompts, sampling_params
from nemo_aligner.stages.rewarders import ModelSource, all_but, candidate_of, check_fields, functions_of, rewarder_of
from nemo_aligner.stages.run_logger import one_of_each_prompt, output_logger
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


@dataclass(frozen=True)
class Report:
    """What is said of one policy."""

    figures: dict[str, Any]
    answers: Answers
    shown: list[dict[str, Any]]  # some of its samples, for loggers


def run(cfg: EvaluationConfig) -> None:
    """Write reward_mean, reward_std, kl, ... of every policy to `cfg.output_file`, the samples beside it."""
    check_output(
        cfg,
        beside=map(cfg.samples_file, cfg.policy_files),
        policy_files=cfg.policy_files,
        initial_policy_file=[cfg.initial_policy_file],
        reward_model_file=[cfg.reward_model_file],
    )
    check_templates(cfg.data)
    check_prompt_template(cfg.data.reward_prompt_template, cfg.data, "data.reward_prompt_template")
    for path in cfg.policy_files:
        check_is_policy(path, "policy_files")
    if cfg.initial_policy_file is not None:
        check_is_policy(cfg.initial_policy_file, "initial_policy_file")
    if cfg.reward_model_file is not None:
        check_is_reward_model(cfg.reward_model_file, "reward_model_file")
    check_archive(cfg, cfg.gpt_model_file, *cfg.policy_files, cfg.initial_policy_file, cfg.reward_model_file)
    rows = open_rows(cfg.data, {cfg.data.input_key: "data.input_key"})

    with owning(cfg.output_file, cfg.trainer), functions_of(cfg) as functions:
        check_fields(functions, rows, all_but(cfg.data.input_key, cfg.data.output_key))
        with start_cluster(cfg, cfg.gpt_model_file) as cluster:
            evaluate(cfg, rows, cluster, functions)


def evaluate(cfg: EvaluationConfig, rows: Blend, cluster: MegatronCluster, functions: Functions | None = None) -> None:
    """One model after another on the same prompts, then the reports."""
    archives = (*cfg.policy_files, cfg.initial_policy_file, cfg.reward_model_file)
    hashes = {path: archive_hash(path) for path in archives if path is not None} if cluster.is_main else {}
    inputs = data_fingerprint(cfg.data)
    made_with = {**inputs, **hashes, "reward_function": None if functions is None else functions.fingerprint()}
    with output_logger(cfg, cluster, made_with) as logger:
        reports = measured(cfg, rows, cluster, functions)
        figures = [own.figures for own in reports]
        for own in reports[1:]:
            own.figures.update(compare(own.answers, reports[0].answers))
            tell_comparison(own.figures, cfg.policy_files[0])
        if cluster.is_main:
            write_atomically(cfg.output_file, [json.dumps(without_nan(figures), indent=1), "\n"])
            counts = {"prompts": len(rows), "samples": cfg.data.n * len(rows)}
            write_provenance(cfg.output_file, config=cfg, archive=hashes, inputs=inputs["data"], counts=counts)
        if logger is not None:
            for place, own in enumerate(reports):
                logger.log(place, "evaluation", numbers(own.figures), own.shown)


def measured(cfg: EvaluationConfig, rows: Blend, cluster: MegatronCluster, functions: Functions | None) -> list[Report]:
    """What is to be said of each policy by itself."""
    from nemo_aligner.algorithms.reinforce import sequence_kl
    from nemo_aligner.engine.policy import load_policy

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
    model = load_judge(cfg, cluster)
    return [
        report(cfg, path, rows, drawn, score(cfg, rows, drawn, model, cluster, functions), kl, cluster)
        for path, (drawn, _), kl in zip(cfg.policy_files, found, kls, strict=True)
    ]


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


def load_judge(cfg: EvaluationConfig, cluster: MegatronCluster) -> RewardModel | None:
    """The reward model, where one gives rewards."""
    if cfg.reward_model_file is None:
        return None
    from nemo_aligner.engine.reward_model import load_reward_model

    return load_reward_model(cfg.reward_model_file, cluster, precision=cfg.trainer.precision, key="reward_model_file")


def score(
    cfg: EvaluationConfig,
    rows: Blend,
    drawn: Sequence[Drawn],
    model: RewardModel | None,
    cluster: Cluster,
    functions: Functions | None = None,
) -> list[Judgement]:
    """What the labeler would say of the same rows."""
    data = cfg.data
    source = None if model is None else ModelSource(model, data.judged)
    candidates = [
        candidate_of(
            {**rows[d.response.prompt_index], data.output_key: d.response.text},
            rows.where(d.response.prompt_index),
            Keys(data.input_key, data.output_key),
        )
        for d in drawn
    ]
    found = rewarder_of(cfg.reward_plan, functions, source, cluster).submit(candidates).result()
    if source is not None:
        source.report()
    return found


def report(
    cfg: EvaluationConfig,
    policy_file: str,
    rows: Blend,
    drawn: Sequence[Drawn],
    judgements: Sequence[Judgement],
    kl: Sequence[float] | None,
    cluster: Cluster,
) -> Report:
    """One policy's figures over all replicas, and its answers; its samples are written beside the output file."""
    own = [
        {
            **rows[d.response.prompt_index],
            cfg.data.output_key: d.response.text,
            cfg.data.reward_key: math.nan if judgement.reward is None else judgement.reward,
            **part_fields(judgement.parts, cfg.data.reward_key),
            "kl": None if kl is None else kl[i],
            "num_tokens": len(d.response.tokens),
            "finish_reason": d.response.finish_reason,
            "prompt_index": d.response.prompt_index,
        }
        for i, (d, judgement) in enumerate(zip(drawn, judgements, strict=True))
    ]
    samples: list[dict[str, Any]] = sorted(
        (sample for part in cluster.gather(own) for sample in part), key=lambda sample: sample["prompt_index"]
    )
    figures, answers = figures_of(cfg, policy_file, samples)
    if cluster.is_main:
        write_jsonl(cfg.samples_file(policy_file), samples)
        told = [f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float)]
        log.info("%s: %s", policy_file, ", ".join(told))
        tell_empty(sum(not sample[cfg.data.output_key] for sample in samples), len(samples))
    keys = Keys(cfg.data.input_key, cfg.data.output_key, cfg.data.reward_key)
    fields = [keys.reward, *(part_name(name, keys.reward) for name in parts_of(cfg)), "kl"]
    return Report(figures, answers, one_of_each_prompt(samples, keys, cfg.exp_manager.log_samples, fields))
