"""The random sampler: prompts.jsonl ─▶ n responses per prompt ─▶ generated.jsonl.

    rows of the blend ─▶ chunk (sample_split_*) ─▶ template, tokens ─▶ generate ─▶ journal ─▶ merged in prompt order

Every response has a place of its own in the output, prompt position × n + sample index; the journal knows which places
are taken, so an interrupted run goes on with the missing ones, on any number of processes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.offline import SamplerConfig
from nemo_aligner.config.schema import InferenceConfig
from nemo_aligner.data.blending import Blend, split_chunk
from nemo_aligner.data.journal import Journal, refuse_other_run
from nemo_aligner.data.jsonl import Row, write_jsonl
from nemo_aligner.data.prompts import filled, with_bos
from nemo_aligner.data.provenance import write_provenance
from nemo_aligner.data.token_texts import ids_key, spelling
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from nemo_aligner.engine.checks import check_is_policy
from nemo_aligner.engine.interfaces import Cluster, GenerationRequest, Policy, Response
from nemo_aligner.errors import DataError, StoppedEarly
from nemo_aligner.metrics import MetricsLogger, Progress
from nemo_aligner.stages.offline.data import (
    check_archive,
    check_output,
    check_template,
    data_fingerprint,
    open_rows,
    start_cluster,
)
from nemo_aligner.stages.run_checks import check_duration
from nemo_aligner.stages.run_control import RunControl
from nemo_aligner.stages.run_logger import output_logger
from nemo_aligner.stages.run_owner import owning

if TYPE_CHECKING:
    from nemo_aligner.algorithms.sampling import SamplingParams

log = logging.getLogger(__name__)

_FLUSH_EVERY_S = 15.0
"""Where `checkpoint_interval` does not say when, a kill loses this much at most."""


def run(cfg: SamplerConfig) -> None:
    """Sample `cfg.data.n` responses for each prompt of the chunk into `cfg.output_file`."""
    check_output(cfg)
    check_template(cfg.data.prompt_template, cfg.data.input_key)
    check_duration(cfg.max_time_per_run, "max_time_per_run")
    check_archive(cfg, cfg.gpt_model_file)
    check_is_policy(cfg.gpt_model_file, "gpt_model_file")
    rows = open_rows(cfg.data, {cfg.data.input_key: "data.input_key"})

    with owning(cfg.output_file, cfg.trainer), start_cluster(cfg, cfg.gpt_model_file) as cluster:
        from nemo_aligner.engine.policy import load_policy

        refuse_other_run(cfg.output_file, lambda: fingerprint(cfg, archive_hash(cfg.gpt_model_file)), cluster)
        sample(cfg, rows, load_policy(cfg.gpt_model_file, cluster, precision=cfg.trainer.precision), cluster)


def sampling_params(inference: InferenceConfig, seed: int) -> SamplingParams:
    """`inference.*` as the engine takes it."""
    from nemo_aligner.algorithms.sampling import SamplingParams

    return SamplingParams(
        greedy=inference.greedy,
        temperature=inference.temperature,
        top_k=inference.top_k,
        top_p=inference.top_p,
        repetition_penalty=inference.repetition_penalty,
        min_tokens=inference.min_tokens_to_generate,
        max_tokens=inference.tokens_to_generate,
        end_strings=tuple(inference.end_strings),
        seed=seed,
    )


def sample(cfg: SamplerConfig, rows: Blend, policy: Policy, cluster: Cluster) -> None:
    """Draw what the journal lacks, then merge. Raises StoppedEarly at the time limit or SIGTERM, with all rows kept."""
    chunk = split_chunk(len(rows), cfg.data.sample_split_size, cfg.data.sample_split_iter)
    archive = cluster.broadcast(policy.archive_hash() if cluster.is_main else "")
    journal = Journal(cfg.output_file, fingerprint(cfg, archive), cluster)
    with output_logger(cfg, cluster, journal.made_with) as logger:
        draw(cfg, rows, chunk, policy, journal, cluster)
        if cluster.is_main:
            finish(cfg, journal, len(chunk), archive, logger)
        cluster.barrier()


def draw(cfg: SamplerConfig, rows: Blend, chunk: range, policy: Policy, journal: Journal, cluster: Cluster) -> None:
    """Fill the journal. Raises StoppedEarly."""
    prompts = Prompts(cfg, rows, policy)
    if policy.tokenizer.chat_template is not None and cfg.data.prompt_template is None:
        log.info(
            "the model has a chat template, and prompts go to it as they are: data.prompt_template may hold its turns"
        )
    wanted = [
        GenerationRequest(position, s, prompts.tokens(position))
        for place, position in enumerate(chunk)
        if place % cluster.dp_size == cluster.dp_rank
        for s in range(cfg.data.n)
        if (position - chunk.start) * cfg.data.n + s not in journal.done
    ]
    prompts.report()
    slots = cfg.inference.max_batch_slots or cfg.data.micro_batch_size * cfg.data.n
    interval = cfg.checkpoint_interval and cfg.checkpoint_interval * cfg.data.micro_batch_size * cfg.data.n
    left, total = sum(cluster.gather(len(wanted))), len(chunk) * cfg.data.n
    if not left:
        log.info("all %d samples are drawn already", total)
    reason, flushed = None, time.monotonic()
    with (
        RunControl(cfg.max_time_per_run, cluster) as control,
        Progress("sampling", total, show=cluster.is_main, done=total - left) as progress,
    ):
        responses = policy.generate(wanted, sampling_params(cfg.inference, cfg.seed), slots)
        for count, response in enumerate(responses, 1):
            place = (response.prompt_index - chunk.start) * cfg.data.n + response.sample_index
            row = output_row(cfg, rows[response.prompt_index % len(rows)], response)
            if cfg.data.export_tokens:
                row[ids_key(cfg.data.output_key)] = prompts.spelling(response)
            journal.add(place, row)
            progress.advance(cluster.dp_size, cluster.dp_size * len(response.tokens))
            if count % interval == 0 if interval else time.monotonic() - flushed >= _FLUSH_EVERY_S:
                journal.flush()
                flushed = time.monotonic()
            # the ranks of a replica walk in step and leave together; replicas leave by themselves
            reason = control.replica_reason()
            if reason:
                break
        journal.flush()
    if cluster.any(reason is not None):
        raise StoppedEarly(f"{reason or 'another rank was told to stop'}; progress is in {journal.folder}")


class Prompts:
    """Prompt positions as token ids: template, BOS, and the head of prompts longer than `data.max_seq_length`."""

    def __init__(self, cfg: SamplerConfig, rows: Blend, policy: Policy) -> None:
        self._cfg, self._rows, self._policy = cfg, rows, policy
        self._cut = 0
        self._tokens: dict[int, tuple[int, ...]] = {}

    def tokens(self, position: int) -> tuple[int, ...]:
        """Raises DataError when the prompt leaves the model no room for a response."""
        if position not in self._tokens:
            self._tokens[position] = self._encoded(position)
        return self._tokens[position]

    def _encoded(self, position: int) -> tuple[int, ...]:
        data, tokenizer = self._cfg.data, self._policy.tokenizer
        index = position % len(self._rows)
        ids = tokenizer.encode(filled(data.prompt_template, data.input_key, self._rows[index][data.input_key]))
        ids = with_bos(ids, tokenizer.bos_id if data.add_bos or self._cfg.inference.add_BOS else None)
        if len(ids) > data.max_seq_length:
            self._cut += 1
            ids = ids[: data.max_seq_length]
        if not ids:
            raise DataError(
                f"field {data.input_key!r} is empty, there is nothing to go on from", *self._rows.where(index)
            )
        if len(ids) >= self._policy.max_sequence_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens and the model's context is {self._policy.max_sequence_length}; "
                "set data.max_seq_length below it to cut prompts",
                *self._rows.where(index),
            )
        return tuple(ids)

    def spelling(self, response: Response) -> list[int] | None:
        """The response's tokens without what ended it; None where an end string begins inside a token."""
        before = self.tokens(response.prompt_index)
        return spelling(self._policy.tokenizer, before, response.tokens, response.text)

    def report(self) -> None:
        if self._cut:
            log.warning("%d prompts were cut to data.max_seq_length=%d", self._cut, self._cfg.data.max_seq_length)


def output_row(cfg: SamplerConfig, row: Row, response: Response) -> Row:
    """The prompt's own fields, the response, and what `data.export_metadata` adds."""
    metadata = {
        "sample_index": response.sample_index,
        "finish_reason": response.finish_reason,
        "num_tokens": len(response.tokens),
        "logprob": sum(response.logprobs),
    }
    return {**row, cfg.data.output_key: response.text, **(metadata if cfg.data.export_metadata else {})}


def fingerprint(cfg: SamplerConfig, archive: str) -> dict[str, Any]:
    """What decides the rows; batch size, slots, devices and intervals do not."""
    inference = dataclasses.asdict(cfg.inference)
    inference.pop("max_batch_slots")
    return {
        "gpt_model_file": archive,
        "seed": cfg.seed,
        "trainer.precision": cfg.trainer.precision,
        "data.n": cfg.data.n,
        "data.output_key": cfg.data.output_key,
        "data.export_metadata": cfg.data.export_metadata,
        "data.export_tokens": cfg.data.export_tokens,
        **{f"inference.{name}": value for name, value in inference.items()},
        **data_fingerprint(cfg.data),
    }


def finish(
    cfg: SamplerConfig, journal: Journal, prompts: int, archive: str, logger: MetricsLogger | None = None
) -> None:
    """Merge the journal into the output file, n responses of a prompt after one another, in prompt order."""
    keys, samples = (cfg.data.input_key, cfg.data.output_key), prompts * cfg.data.n
    lengths: list[int] = []
    shown: list[Row] = []
    unfinished = 0

    def in_order() -> Iterator[Row]:
        nonlocal unfinished
        for place, row in journal.merged(samples):
            response = row[cfg.data.output_key]
            lengths.append(len(response))
            unfinished += response.endswith("\N{REPLACEMENT CHARACTER}")
            if place % cfg.data.n == 0 and len(shown) < cfg.exp_manager.log_samples:
                shown.append({key: row[key] for key in keys})
            yield row

    write_jsonl(cfg.output_file, in_order())
    if unfinished:
        log.warning("%d responses end within a character, which is written as \N{REPLACEMENT CHARACTER}", unfinished)
    counts = {"prompts": prompts, "samples": samples}
    write_provenance(cfg.output_file, config=cfg, archive=archive, inputs=journal.made_with["data"], counts=counts)
    if logger is not None:
        empty, characters = lengths.count(0) / samples, sum(lengths) / samples
        logger.log(0, "sampler", {**counts, "response_characters": characters, "empty": empty}, shown)
    log.info("wrote %d samples of %d prompts to %s", samples, prompts, cfg.output_file)
