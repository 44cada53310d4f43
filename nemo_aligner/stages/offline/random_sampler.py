"""The random sampler: prompts.jsonl ─▶ n responses per prompt ─▶ generated.jsonl.

    rows of the blend ─▶ chunk (sample_split_*) ─▶ template, tokens ─▶ generate ─▶ journal ─▶ merged in prompt order

Every response has a place of its own in the output, prompt position × n + sample index; the journal knows which places
are taken, so an interrupted run goes on with the missing ones, on any number of processes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.offline import SamplerConfig
from nemo_aligner.config.schema import InferenceConfig
from nemo_aligner.data.blending import Blend, split_chunk
from nemo_aligner.data.journal import Journal, refuse_other_run
from nemo_aligner.data.jsonl import Row, write_jsonl
from nemo_aligner.data.prompts import bos_for, with_bos
from nemo_aligner.data.provenance import write_provenance
from nemo_aligner.data.row_texts import texts_of
from nemo_aligner.data.token_texts import ids_key, spelling
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from nemo_aligner.engine.checks import check_is_policy
from nemo_aligner.engine.interfaces import Cluster, GenerationRequest, Policy, Response
from nemo_aligner.errors import DataError, StoppedEarly
from nemo_aligner.metrics import MetricsLogger, Progress
from nemo_aligner.records import Keys, Turns
from nemo_aligner.stages.offline.data import (
    check_archive,
    check_output,
    check_templates,
    data_fingerprint,
    open_rows,
    start_cluster,
)
from nemo_aligner.stages.run_checks import check_duration
from nemo_aligner.stages.run_control import RunControl
from nemo_aligner.stages.run_logger import one_of_each_prompt, output_logger
from nemo_aligner.stages.run_owner import owning

if TYPE_CHECKING:
    from nemo_aligner.algorithms.sampling import SamplingParams

log = logging.getLogger(__name__)

_FLUSH_EVERY_S = 15.0
"""Where `checkpoint_interval` does not say when, a kill loses this much at most."""

_NEWEST = 256
"""Prompts whose tokens are kept: those that are being drawn, or most of them."""


def run(cfg: SamplerConfig) -> None:
    """Sample `cfg.data.n` responses for each prompt of the chunk into `cfg.output_file`."""
    check_output(cfg)
    check_templates(cfg.data)
    check_duration(cfg.max_time_per_run, "max_time_per_run")
    check_archive(cfg, cfg.gpt_model_file)
    check_is_policy(cfg.gpt_model_file, "gpt_model_file")
    rows = open_rows(cfg.data, {cfg.data.input_key: "data.input_key"})

    with owning(cfg.output_file, cfg.trainer), start_cluster(cfg, cfg.gpt_model_file) as cluster:
        from nemo_aligner.engine.policy import load_policy

        refuse_other_run(cfg.output_file, lambda: fingerprint(cfg, archive_hash(cfg.gpt_model_file)), cluster)
        policy = load_policy(cfg.gpt_model_file, cluster, precision=cfg.trainer.precision)
        sample(cfg, rows, policy, cluster)
        policy.stay_in_memory()


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
    bos_for(policy.tokenizer, cfg.data.add_bos, "data.add_bos")  # an evaluation's is its reward model's too
    prompts = Prompts(cfg, rows, policy)
    places = range(cluster.dp_rank, len(chunk), cluster.dp_size)
    if not journal.done:  # else the run that began has looked at them
        prompts.look_at(chunk[place] for place in places)

    def missing() -> Iterator[tuple[int, int]]:
        """Prompt and sample of what is not drawn yet."""
        for place in places:
            yield from ((chunk[place], s) for s in range(cfg.data.n) if place * cfg.data.n + s not in journal.done)

    wanted = (GenerationRequest(position, s, prompts.tokens(position)) for position, s in missing())
    slots = cfg.inference.max_batch_slots or cfg.data.micro_batch_size * cfg.data.n
    interval = cfg.checkpoint_interval and cfg.checkpoint_interval * cfg.data.micro_batch_size * cfg.data.n
    left, total = sum(cluster.gather(sum(1 for _ in missing()))), len(chunk) * cfg.data.n
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
    """Prompt positions as token ids: template, BOS, and the head of plain ones longer than `data.max_seq_length`.

    Prompts are read and tokenized when asked for; those of a long run would fill the memory.
    """

    def __init__(self, cfg: SamplerConfig, rows: Blend, policy: Policy) -> None:
        self._cfg, self._rows, self._policy = cfg, rows, policy
        self._texts = texts_of(cfg.data, policy.tokenizer)
        asked = bos_for(policy.tokenizer, cfg.inference.add_BOS, "inference.add_BOS")
        self._bos = policy.tokenizer.bos_id if cfg.data.add_bos else asked
        self._encoded = lru_cache(_NEWEST)(self._encode)

    def tokens(self, position: int) -> tuple[int, ...]:
        """Raises DataError when the prompt leaves the model no room for a response."""
        return self._encoded(position)[0]

    def look_at(self, positions: Iterable[int]) -> None:
        """Say how many of them are cut. Raises DataError for one as `tokens` does, before anything is drawn."""
        cut = plain = 0
        for position in positions:
            _, is_cut, is_plain = self._encoded(position)
            cut, plain = cut + is_cut, plain + is_plain
        if plain and self._policy.tokenizer.chat_template is not None and self._cfg.data.prompt_template is None:
            log.info(
                "the model has a chat template, and plain prompts go to it as they are: data.prompt_template may hold "
                "its turns, or rows may have `messages`"
            )
        if cut:
            log.warning("%d prompts were cut to data.max_seq_length=%d", cut, self._cfg.data.max_seq_length)

    def _encode(self, position: int) -> tuple[tuple[int, ...], bool, bool]:
        """Token ids, whether the prompt had more of them, and whether it is plain."""
        data, tokenizer = self._cfg.data, self._policy.tokenizer
        index = position % len(self._rows)
        row, where = self._rows[index], self._rows.where(index)
        ids = tokenizer.encode(self._texts.prompt(row, *where))
        ids = with_bos(ids, self._bos)
        is_plain, room = Turns.of(row, data.input_key) is None, self._policy.max_sequence_length - 1
        if not is_plain and len(ids) > min(room, data.max_seq_length):
            raise DataError(
                f"the conversation has {len(ids)} tokens; data.max_seq_length is {data.max_seq_length}, the model's "
                f"context {room + 1}, and one that is cut would ask for no answer",
                *where,
            )
        cut = len(ids) > data.max_seq_length
        ids = ids[: data.max_seq_length]
        if not ids:
            raise DataError(f"field {data.input_key!r} is empty, there is nothing to go on from", *where)
        if len(ids) >= self._policy.max_sequence_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens and the model's context is {self._policy.max_sequence_length}; "
                "set data.max_seq_length below it to cut prompts",
                *where,
            )
        return tuple(ids), cut, is_plain

    def spelling(self, response: Response) -> list[int] | None:
        """The response's tokens without what ended it; None where an end string begins inside a token."""
        before = self.tokens(response.prompt_index)
        return spelling(self._policy.tokenizer, before, response.tokens, response.text)


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
    samples = prompts * cfg.data.n
    unfinished = empty = characters = 0

    def in_order() -> Iterator[Row]:
        nonlocal unfinished, empty, characters
        for row in journal.merged(samples):
            response = row[cfg.data.output_key]
            characters += len(response)
            empty += not response
            unfinished += response.endswith("\N{REPLACEMENT CHARACTER}")
            yield row

    write_jsonl(cfg.output_file, in_order())
    if unfinished:
        log.warning("%d responses end within a character, which is written as \N{REPLACEMENT CHARACTER}", unfinished)
    counts = {"prompts": prompts, "samples": samples}
    write_provenance(cfg.output_file, config=cfg, archive=archive, inputs=journal.made_with["data"], counts=counts)
    if logger is not None:
        keys = Keys(cfg.data.input_key, cfg.data.output_key, cfg.data.reward_key)
        figures = {**counts, "response_characters": characters / samples, "empty": empty / samples}
        shown = one_of_each_prompt(journal.merged(samples), keys, cfg.exp_manager.log_samples)
        logger.log(0, "sampler", figures, shown)
    log.info("wrote %d samples of %d prompts to %s", samples, prompts, cfg.output_file)
