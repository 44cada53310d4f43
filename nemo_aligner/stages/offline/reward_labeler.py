"""The reward labeler: generated.jsonl ─▶ rewards ─▶ processor (rs, rest, dt or null) ─▶ filtered.jsonl.

The journal holds raw rewards, those of each source apart, so a rerun with another processor, threshold, standardisation
or other weights scores nothing again.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_aligner.algorithms.processors import Chosen, apply_processor, check_processor
from nemo_aligner.algorithms.statistics import mean_and_std, standardised
from nemo_aligner.config.offline import LabelerConfig
from nemo_aligner.data.blending import Blend, split_chunk
from nemo_aligner.data.journal import Journal, refuse_other_run
from nemo_aligner.data.jsonl import Row, write_jsonl
from nemo_aligner.data.provenance import write_provenance
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash, read_architecture
from nemo_aligner.engine.checks import check_is_reward_model
from nemo_aligner.engine.interfaces import Cluster, RewardModel
from nemo_aligner.errors import DataError, StoppedEarly
from nemo_aligner.metrics import MetricsLogger, Progress
from nemo_aligner.records import Keys, ScoredSample, part_name
from nemo_aligner.rewards.functions import Functions
from nemo_aligner.rewards.interfaces import Candidate
from nemo_aligner.stages.offline.best_so_far import Earlier, EarlierSample, check_archive_of, check_best_so_far
from nemo_aligner.stages.offline.data import (
    check_archive,
    check_output,
    check_templates,
    data_fingerprint,
    open_rows,
    start_cluster,
    tell_empty,
)
from nemo_aligner.stages.offline.judged_rows import Judged, Samples, journaled, with_raw_rewards
from nemo_aligner.stages.rewarders import ModelSource, all_but, candidate_of, check_fields, functions_of, rewarder_of
from nemo_aligner.stages.run_checks import check_duration
from nemo_aligner.stages.run_control import RunControl
from nemo_aligner.stages.run_logger import one_of_each_prompt, output_logger
from nemo_aligner.stages.run_owner import owning

if TYPE_CHECKING:
    from nemo_aligner.engine.processes.cluster import MegatronCluster
    from nemo_aligner.engine.reward_model import MegatronRewardModel

log = logging.getLogger(__name__)

_WINDOW = 16
"""Micro-batches scored between two looks at the clock; rows are sorted by length within a window."""


def run(cfg: LabelerConfig) -> None:
    """Score the rows of `cfg.data.file_names` and write what the processor makes of them to `cfg.output_file`."""
    keys = keys_of(cfg)
    check_output(cfg)
    check_processor(cfg.processor, cfg.reward_template, keys)
    check_best_so_far(cfg)
    Earlier(cfg, keys)  # what is wrong with it is said before anything is scored
    check_templates(cfg.data)
    check_duration(cfg.max_time_per_run, "max_time_per_run")
    path = cfg.gpt_model_file
    if path is not None:
        check_archive(cfg, path)
        check_is_reward_model(path, "gpt_model_file")
    rows = open_rows(cfg.data, {keys.input: "data.input_key", keys.output: "data.output_key"})

    with owning(cfg.output_file, cfg.trainer), functions_of(cfg) as functions:
        check_fields(functions, rows, all_but(keys.input, keys.output))
        with start_cluster(cfg, path) as cluster:
            refuse_other_run(cfg.output_file, lambda: _fingerprint_of_archive(cfg, functions), cluster)
            model = _load(path, cfg, cluster)
            label(cfg, rows, model, cluster, functions)
            if model is not None:
                model.stay_in_memory()


def _load(path: str | None, cfg: LabelerConfig, cluster: MegatronCluster) -> MegatronRewardModel | None:
    if path is None:
        return None
    from nemo_aligner.engine.reward_model import load_reward_model

    return load_reward_model(path, cluster, precision=cfg.trainer.precision)


def _fingerprint_of_archive(cfg: LabelerConfig, functions: Functions | None) -> dict[str, Any]:
    """As the model itself will say, before it is loaded."""
    path = cfg.gpt_model_file
    model = None if path is None else (archive_hash(path), read_architecture(path, key="gpt_model_file").append_eod)
    return fingerprint(cfg, model, functions)


def keys_of(cfg: LabelerConfig) -> Keys:
    return Keys(cfg.data.input_key, cfg.data.output_key, cfg.data.reward_key)


def label(
    cfg: LabelerConfig, rows: Blend, model: RewardModel | None, cluster: Cluster, functions: Functions | None = None
) -> None:
    """Score what the journal lacks, then process. Raises StoppedEarly at the time limit or SIGTERM, rewards kept."""
    chunk = split_chunk(len(rows), cfg.data.sample_split_size, cfg.data.sample_split_iter)
    archive = None if model is None else cluster.broadcast(model.archive_hash() if cluster.is_main else "")
    known = None if model is None or archive is None else (archive, model.append_eod)
    journal = Journal(cfg.output_file, fingerprint(cfg, known, functions), cluster)
    with output_logger(cfg, cluster, journal.made_with) as logger:
        judge(cfg, rows, chunk, model, journal, cluster, functions)
        if cluster.is_main:
            stored = None if model is None else model.stored_standardization
            finish(cfg, rows, chunk, journal, stored, archive, logger)
        cluster.barrier()


def judge(
    cfg: LabelerConfig,
    rows: Blend,
    chunk: range,
    model: RewardModel | None,
    journal: Journal,
    cluster: Cluster,
    functions: Functions | None,
) -> None:
    """Fill the journal. Raises StoppedEarly."""
    own = (p for p in chunk if p % cluster.dp_size == cluster.dp_rank and p - chunk.start not in journal.done)
    mine = array("q", own)
    source = None if model is None else ModelSource(model, cfg.data)
    rewarder = rewarder_of(cfg.reward_plan, functions, source, cluster)
    window = cfg.data.micro_batch_size * (cfg.checkpoint_interval or _WINDOW)
    left = cluster.gather(len(mine))
    if not any(left):
        log.info("all %d rows are scored already", len(chunk))
    with (
        RunControl(cfg.max_time_per_run, cluster) as control,
        Progress("labeling", len(chunk), show=cluster.is_main, done=len(chunk) - sum(left)) as progress,
    ):
        for start in range(0, max(left), window):
            places = mine[start : start + window]
            before = 0 if source is None else source.tokens
            candidates = [_candidate(cfg, rows, p) for p in places]
            for place, judgement in zip(places, rewarder.submit(candidates).result(), strict=True):
                journal.add(place - chunk.start, journaled(judgement, functions))
            tokens = 0 if source is None else source.tokens - before
            progress.advance(cluster.dp_size * len(places), cluster.dp_size * tokens)
            # a window is seconds of work, the most that a kill may lose
            journal.flush()
            reason = control.stop_reason()
            if reason is not None:
                raise StoppedEarly(f"{reason}; progress is in {journal.folder}")
    if source is not None:
        source.report()
    cluster.barrier()


def _candidate(cfg: LabelerConfig, rows: Blend, position: int) -> Candidate:
    index = position % len(rows)
    return candidate_of(rows[index], rows.where(index), keys_of(cfg))


def fingerprint(cfg: LabelerConfig, model: tuple[str, bool] | None, functions: Functions | None) -> dict[str, Any]:
    """What decides the raw rewards; of the model, the hash of its archive and whether it reads an EOS by itself."""
    of_model = {}
    if model is not None:
        archive, append_eod = model
        of_model = {
            "gpt_model_file": archive,
            "trainer.precision": cfg.trainer.precision,
            "data.add_eos": append_eod if cfg.data.add_eos is None else cfg.data.add_eos,
        }
    of_functions = {} if functions is None else {"reward_function": functions.fingerprint()}
    return {"data.output_key": cfg.data.output_key, **of_model, **of_functions, **data_fingerprint(cfg.data)}


def finish(
    cfg: LabelerConfig,
    rows: Blend,
    chunk: range,
    journal: Journal,
    stored: tuple[float, float] | None,
    archive: str | None,
    logger: MetricsLogger | None = None,
) -> None:
    """Rewards → standardised → processed → output file, rows in the order of the input.

    In memory are rewards and places; rows are read from the disk whenever they are looked at.
    """
    judged = Judged(journal, len(chunk), cfg.reward_plan)
    counts: dict[str, Any] = {"rows": len(judged), **figures_of(cfg, rows, chunk, judged)}
    if cfg.best_so_far_file is not None:
        check_archive_of(cfg, archive)
    kept = choose(cfg, rows, chunk, judged, stored)
    counts |= {"kept": len(kept), **write(cfg, kept)}
    write_provenance(cfg.output_file, config=cfg, archive=archive, inputs=journal.made_with["data"], counts=counts)
    if logger is not None:
        tell_logger(logger, cfg, counts, with_raw_rewards(rows, chunk, judged, keys_of(cfg)))
    log.info(
        "wrote %d of %d rows to %s (processor=%s)", len(kept), len(judged), cfg.output_file, cfg.processor or "null"
    )


def figures_of(cfg: LabelerConfig, rows: Blend, chunk: range, judged: Judged) -> dict[str, Any]:
    """Of the raw rewards, and of each of several sources; a reward model's NaN is named with its line."""
    plan = cfg.reward_plan
    if not plan.functions:
        for position, reward in zip(chunk, judged.rewards, strict=True):
            if math.isnan(reward):
                path, line = rows.where(position % len(rows))
                log.warning("%s:%d: the reward is NaN", path, line)
    mean, std = mean_and_std(judged.rewards)
    if cfg.print_reward_info:
        log.info("reward mean: %.4f, std: %.4f, rows: %d", mean, std, len(judged))
    of_sources = {name: judged.figures(name) for name in plan.weights} if plan.functions else {}
    for name, figures in of_sources.items():
        log.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    return {"reward_mean": mean, "reward_std": std, **({"rewards": of_sources} if of_sources else {})}


def choose(
    cfg: LabelerConfig, rows: Blend, chunk: range, judged: Judged, stored: tuple[float, float] | None
) -> Sequence[ScoredSample]:
    """What the processor makes of the rows, and of earlier ones where they are to be chosen from too."""
    keys = keys_of(cfg)
    known = None if cfg.reward_plan.functions else stored  # the model's are those of its own rewards
    samples: Sequence[ScoredSample] = Samples(rows, chunk, judged, standardize(cfg, judged.rewards, known), keys)
    if cfg.best_so_far_file is not None:
        samples = Earlier(cfg, keys, samples)
    filled = [index for index, sample in enumerate(samples) if sample.output]
    tell_empty(len(samples) - len(filled), len(samples))
    if cfg.skip_empty:
        samples = Chosen(samples, filled)
        if not samples:
            raise DataError("skip_empty=True leaves no sample: every response is empty")
    return apply_processor(
        cfg.processor, samples, threshold=cfg.threshold, reward_template=cfg.reward_template, keys=keys
    )


def write(cfg: LabelerConfig, kept: Sequence[ScoredSample]) -> dict[str, int]:
    """The output file; how many of its rows are earlier ones, where there may be such."""
    keys, empty, before, export = keys_of(cfg), 0, 0, cfg.export_reward or cfg.processor is None

    def in_order() -> Iterator[Row]:
        nonlocal empty, before
        for sample in kept:
            empty += not sample.output
            before += isinstance(sample, EarlierSample)
            yield sample.to_row(keys, export)

    write_jsonl(cfg.output_file, in_order())
    if empty:
        log.warning("%d of the %d rows kept have an empty response; skip_empty=True leaves them out", empty, len(kept))
    if cfg.best_so_far_file is None:
        return {}
    log.info("%d of the %d rows kept are those of %s", before, len(kept), cfg.best_so_far_file)
    return {"kept_from_before": before}


def tell_logger(logger: MetricsLogger, cfg: LabelerConfig, counts: Mapping[str, Any], judged: Iterator[Row]) -> None:
    """The figures, and some of the samples with their raw rewards."""
    of_sources, keys = counts.get("rewards", {}), keys_of(cfg)
    figures = {name: counts[name] for name in ("rows", "kept", "reward_mean", "reward_std")}
    figures |= {f"{part_name(name)}_{key}": value for name, own in of_sources.items() for key, value in own.items()}
    fields = [keys.reward, *(part_name(name, keys.reward) for name in of_sources)]
    logger.log(0, "labeler", figures, one_of_each_prompt(judged, keys, cfg.exp_manager.log_samples, fields))


def standardize(cfg: LabelerConfig, rewards: Sequence[float], stored: tuple[float, float] | None) -> Sequence[float]:
    """`reward_standardization`: explicit mean and std, else the archive's own, else those of the whole file."""
    given = cfg.reward_standardization
    if not given.enable:
        return rewards
    known = given.known(stored)
    mean, std = known or mean_and_std(rewards)
    source = "as given" if given.mean is not None else "as stored in the reward model" if known else "of these rows"
    log.info("standardising rewards with mean %.4f and std %.4f, %s", mean, std, source)
    return standardised(rewards, mean, std)
