"""The reward labeler: generated.jsonl ─▶ rewards ─▶ processor (rs, rest, dt or null) ─▶ filtered.jsonl.

The journal holds raw rewards, so a rerun with another processor, threshold or standardisation scores nothing again.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from nemo_aligner.algorithms.processors import apply_processor, check_processor
from nemo_aligner.algorithms.statistics import mean_and_std, standardised
from nemo_aligner.config.offline import LabelerConfig
from nemo_aligner.data.blending import Blend, split_chunk
from nemo_aligner.data.journal import Journal, refuse_other_run
from nemo_aligner.data.jsonl import write_jsonl
from nemo_aligner.data.judged_text import TextEncoder
from nemo_aligner.data.provenance import write_provenance
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash, read_architecture
from nemo_aligner.engine.checks import check_is_reward_model
from nemo_aligner.engine.interfaces import Cluster, RewardModel
from nemo_aligner.errors import DataError, StoppedEarly
from nemo_aligner.metrics import Progress
from nemo_aligner.records import Keys, ScoredSample
from nemo_aligner.stages.offline.data import (
    check_archive,
    check_output,
    check_template,
    data_fingerprint,
    open_rows,
    start_cluster,
    tell_empty,
)
from nemo_aligner.stages.run_checks import check_duration
from nemo_aligner.stages.run_control import RunControl
from nemo_aligner.stages.run_owner import owning

log = logging.getLogger(__name__)

_WINDOW = 16
"""Micro-batches scored between two looks at the clock; rows are sorted by length within a window."""


def run(cfg: LabelerConfig) -> None:
    """Score the rows of `cfg.data.file_names` and write what the processor makes of them to `cfg.output_file`."""
    keys = keys_of(cfg)
    check_output(cfg)
    check_processor(cfg.processor, cfg.reward_template, keys)
    cfg.reward_standardization.validate("reward_standardization")
    check_template(cfg.data.prompt_template, cfg.data.input_key)
    check_duration(cfg.max_time_per_run, "max_time_per_run")
    check_archive(cfg)
    check_is_reward_model(cfg.gpt_model_file, "gpt_model_file")
    rows = open_rows(cfg.data, {keys.input: "data.input_key", keys.output: "data.output_key"})

    with owning(cfg.output_file, cfg.trainer), start_cluster(cfg) as cluster:
        from nemo_aligner.engine.reward_model import load_reward_model

        refuse_other_run(cfg.output_file, lambda: _fingerprint_of_archive(cfg), cluster)
        label(cfg, rows, load_reward_model(cfg.gpt_model_file, cluster, precision=cfg.trainer.precision), cluster)


def _fingerprint_of_archive(cfg: LabelerConfig) -> dict[str, Any]:
    """As the model itself will say, before it is loaded."""
    arch = read_architecture(cfg.gpt_model_file, key="gpt_model_file")
    return fingerprint(cfg, arch.append_eod, archive_hash(cfg.gpt_model_file))


def keys_of(cfg: LabelerConfig) -> Keys:
    return Keys(cfg.data.input_key, cfg.data.output_key, cfg.data.reward_key)


def label(cfg: LabelerConfig, rows: Blend, model: RewardModel, cluster: Cluster) -> None:
    """Score what the journal lacks, then process. Raises StoppedEarly at the time limit or SIGTERM, rewards kept."""
    chunk = split_chunk(len(rows), cfg.data.sample_split_size, cfg.data.sample_split_iter)
    archive = cluster.broadcast(model.archive_hash() if cluster.is_main else "")
    journal = Journal(cfg.output_file, fingerprint(cfg, model.append_eod, archive), cluster)
    mine = [p for p in chunk if p % cluster.dp_size == cluster.dp_rank and p - chunk.start not in journal.done]
    encoder = TextEncoder(cfg.data, model)
    batch = cfg.data.micro_batch_size
    window = batch * (cfg.checkpoint_interval or _WINDOW)
    left = cluster.gather(len(mine))
    if not any(left):
        log.info("all %d rows are scored already", len(chunk))
    with (
        RunControl(cfg.max_time_per_run, cluster) as control,
        Progress("labeling", len(chunk), show=cluster.is_main, done=len(chunk) - sum(left)) as progress,
    ):
        for start in range(0, max(left), window):
            places = mine[start : start + window]
            tokens = [encoder.tokens(rows[p % len(rows)]) for p in places]
            for place, reward in zip(places, model.score(tokens, batch) if tokens else [], strict=True):
                journal.add(place - chunk.start, {"reward": reward[0]})
            progress.advance(cluster.dp_size * len(places), cluster.dp_size * sum(map(len, tokens)))
            # a window is seconds of work, the most that a kill may lose
            journal.flush()
            reason = control.stop_reason()
            if reason is not None:
                raise StoppedEarly(f"{reason}; progress is in {journal.folder}")
    encoder.report()
    cluster.barrier()
    if cluster.is_main:
        finish(cfg, rows, chunk, journal, model.stored_standardization, archive)
    cluster.barrier()


def fingerprint(cfg: LabelerConfig, append_eod: bool, archive: str) -> dict[str, Any]:
    """What decides the raw rewards."""
    return {
        "gpt_model_file": archive,
        "trainer.precision": cfg.trainer.precision,
        "data.output_key": cfg.data.output_key,
        "data.add_eos": append_eod if cfg.data.add_eos is None else cfg.data.add_eos,
        **data_fingerprint(cfg.data),
    }


def finish(
    cfg: LabelerConfig, rows: Blend, chunk: range, journal: Journal, stored: tuple[float, float] | None, archive: str
) -> None:
    """Rewards → standardised → processed → output file, rows in the order of the input."""
    keys = keys_of(cfg)
    rewards = [math.nan if row["reward"] is None else float(row["reward"]) for _, row in journal.merged(len(chunk))]
    for position, reward in zip(chunk, rewards, strict=True):
        if math.isnan(reward):
            path, line = rows.where(position % len(rows))
            log.warning("%s:%d: the reward is NaN", path, line)
    mean, std = mean_and_std(rewards)
    if cfg.print_reward_info:
        log.info("reward mean: %.4f, std: %.4f, rows: %d", mean, std, len(rewards))
    samples = [
        scored(rows[position % len(rows)], reward, keys)
        for position, reward in zip(chunk, standardize(cfg, rewards, stored), strict=True)
    ]
    tell_empty([sample.output for sample in samples])
    if cfg.skip_empty:
        samples = [sample for sample in samples if sample.output]
        if not samples:
            raise DataError("skip_empty=True leaves no sample: every response is empty")
    kept = apply_processor(
        cfg.processor, samples, threshold=cfg.threshold, reward_template=cfg.reward_template, keys=keys
    )
    chosen = sum(not sample.output for sample in kept)
    if chosen:
        log.warning("%d of the %d rows kept have an empty response; skip_empty=True leaves them out", chosen, len(kept))
    export = cfg.export_reward or cfg.processor is None
    write_jsonl(cfg.output_file, (sample.to_row(keys, export) for sample in kept))
    counts = {"rows": len(rewards), "kept": len(kept), "reward_mean": mean, "reward_std": std}
    write_provenance(cfg.output_file, config=cfg, archive=archive, inputs=journal.made_with["data"], counts=counts)
    log.info(
        "wrote %d of %d rows to %s (processor=%s)", len(kept), len(rewards), cfg.output_file, cfg.processor or "null"
    )


def scored(row: dict[str, Any], reward: float, keys: Keys) -> ScoredSample:
    """A row with its reward; the user's other fields travel along."""
    extra = {name: value for name, value in row.items() if name not in (keys.input, keys.output)}
    return ScoredSample(row[keys.input], row[keys.output], extra, reward)


def standardize(cfg: LabelerConfig, rewards: list[float], stored: tuple[float, float] | None) -> list[float]:
    """`reward_standardization`: explicit mean and std, else the archive's own, else those of the whole file."""
    given = cfg.reward_standardization
    if not given.enable:
        return rewards
    known = given.known(stored)
    mean, std = known or mean_and_std(rewards)
    source = "as given" if given.mean is not None else "as stored in the reward model" if known else "of these rows"
    log.info("standardising rewards with mean %.4f and std %.4f, %s", mean, std, source)
    return standardised(rewards, mean, std)
