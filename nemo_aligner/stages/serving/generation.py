"""megatron_gpt_eval: responses to a few prompts, and a server that draws for all of its clients together."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nemo_aligner.config.auth import read_token
from nemo_aligner.config.cut import Sizes
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.data.chat import ChatTemplate, check_template
from nemo_aligner.data.jsonl import dump_row, write_jsonl
from nemo_aligner.data.prompts import bos_for, with_bos
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.data.sources import files_read
from nemo_aligner.engine.checks import check_is_policy, parallel_sizes
from nemo_aligner.engine.interfaces import Cluster, GenerationRequest, Policy
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.extras import require_extra
from nemo_aligner.files import Inputs, refuse_overwriting
from nemo_aligner.stages.offline.random_sampler import sampling_params
from nemo_aligner.stages.run_control import StopSignal
from nemo_aligner.stages.run_owner import owning
from nemo_aligner.stages.serving.prompts import INPUT, Prompt, read_prompts

log = logging.getLogger(__name__)

_ARCHIVE = "gpt_model_file"
_TEMPLATE = "chat_template"
_SLOTS = 64


def run(cfg: GenerationConfig) -> None:
    """Answer the prompts of `cfg`, then serve where it says so."""
    if cfg.server:
        require_extra("server", "server=True")
    prompts = [Prompt({INPUT: text}) for text in cfg.prompts or []]
    if cfg.prompts_jsonl:
        prompts += read_prompts(Path(cfg.prompts_jsonl))
    if cfg.output_file:
        read = files_read(cfg.prompts_jsonl) if cfg.prompts_jsonl else []
        inputs: Inputs = {"prompts_jsonl": read, _ARCHIVE: [cfg.gpt_model_file]}
        refuse_overwriting(cfg.output_file, f"output_file={cfg.output_file}", inputs)
    sizes = Sizes(cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size)
    check_template(cfg, _TEMPLATE)
    tensor, pipeline = parallel_sizes(cfg.trainer, cfg.gpt_model_file, sizes, key=_ARCHIVE)
    copies = cfg.trainer.devices * cfg.trainer.num_nodes // (tensor * pipeline)
    if cfg.server and copies > 1:
        raise ConfigError(
            f"the server is one copy of the model, and these processes would hold {copies}; raise "
            "tensor_model_parallel_size or pipeline_model_parallel_size, or start several servers",
            "trainer.devices",
        )
    check_is_policy(cfg.gpt_model_file, _ARCHIVE)
    token = read_token(cfg.inference.auth_token_file, "inference.auth_token_file")

    with owning(cfg.output_file, cfg.trainer) if cfg.output_file else nullcontext():
        from nemo_aligner.engine.loading import start_for_archive
        from nemo_aligner.engine.policy import load_policy

        with start_for_archive(cfg.trainer, cfg.gpt_model_file, sizes, key=_ARCHIVE, seed=cfg.seed) as cluster:
            policy = load_policy(cfg.gpt_model_file, cluster, precision=cfg.trainer.precision)
            if prompts:
                scores = cfg.inference.compute_logprob
                rows = score(cfg, prompts, policy) if scores else answer(cfg, prompts, policy, cluster)
                if cluster.is_main:
                    write(cfg, rows)
            if cfg.server:
                serve(cfg, policy, cluster, token)


def encoded(cfg: GenerationConfig, prompts: Sequence[Prompt], policy: Policy) -> list[tuple[int, ...]]:
    """Raises ConfigError for a prompt that is empty or leaves the model no room, DataError for one of a file, and for a
    conversation without a chat template."""
    tokenizer, found = policy.tokenizer, []
    texts = RowTexts(None, INPUT, ChatTemplate.of(tokenizer, cfg, _TEMPLATE), _TEMPLATE)
    bos, limit = bos_for(tokenizer, cfg.inference.add_BOS, "inference.add_BOS"), policy.max_sequence_length - 1
    for number, prompt in enumerate(prompts, 1):
        text = texts.prompt(prompt.row, prompt.path, prompt.line)
        tokens = tuple(with_bos(tokenizer.encode(text), bos))
        if not 0 < len(tokens) <= limit:
            if prompt.line is not None:
                raise DataError(
                    f"the prompt has {len(tokens)} tokens; the model takes 1 to {limit}", prompt.path, prompt.line
                )
            raise ConfigError(f"prompt {number} has {len(tokens)} tokens; the model takes 1 to {limit}", "prompts")
        found.append(tokens)
    return found


def answer(cfg: GenerationConfig, prompts: Sequence[Prompt], policy: Policy, cluster: Cluster) -> list[dict[str, Any]]:
    """One response to each prompt, on all data-parallel ranks, in their order."""
    mine = [
        GenerationRequest(i, 0, tokens)
        for i, tokens in enumerate(encoded(cfg, prompts, policy))
        if i % cluster.dp_size == cluster.dp_rank
    ]
    own = list(policy.generate(mine, sampling_params(cfg.inference, cfg.seed), cfg.inference.max_batch_slots or _SLOTS))
    responses = sorted((r for part in cluster.gather(own) for r in part), key=lambda response: response.prompt_index)
    return [
        {
            **prompts[response.prompt_index].row,
            "output": response.text,
            "finish_reason": response.finish_reason,
            "num_tokens": len(response.tokens),
            "logprob": sum(response.logprobs),
        }
        for response in responses
    ]


def score(cfg: GenerationConfig, prompts: Sequence[Prompt], policy: Policy) -> list[dict[str, Any]]:
    """The log-probability of every token of the prompts but the first, given those before it."""
    rows = encoded(cfg, prompts, policy)
    found = policy.logprobs(rows, micro_batch_size=8)
    return [
        {
            **prompt.row,
            "tokens": [policy.tokenizer.piece(token) for token in tokens],
            "token_logprobs": logprobs[1:].tolist(),
            "logprob": float(logprobs.double().sum()),
        }
        for prompt, tokens, logprobs in zip(prompts, rows, found, strict=True)
    ]


def write(cfg: GenerationConfig, rows: Sequence[dict[str, Any]]) -> None:
    if cfg.output_file is None:
        sys.stdout.writelines(f"{dump_row(row)}\n" for row in rows)
        sys.stdout.flush()
    else:
        write_jsonl(cfg.output_file, rows)
        log.info("wrote %d responses to %s", len(rows), cfg.output_file)


def serve(cfg: GenerationConfig, policy: Policy, cluster: Cluster, token: str | None = None) -> None:
    """Answer clients until SIGTERM or SIGINT; rank 0 talks to them, every rank draws."""
    slots = cfg.inference.max_batch_slots or _SLOTS
    with StopSignal() as stop:
        if not cluster.is_main:
            policy.serve(None, slots)
            return

        from nemo_aligner.servers.doors import Door, open_doors
        from nemo_aligner.servers.generation.app import make_app, refusal
        from nemo_aligner.servers.generation.clerk import Served
        from nemo_aligner.servers.generation.desk import FrontDesk
        from nemo_aligner.servers.generation.requests import TOO_MANY

        served = Served(
            name=cfg.model_name or Path(cfg.gpt_model_file).name.removesuffix(".nemo"),
            tokenizer=policy.tokenizer,
            max_length=policy.max_sequence_length,
            vocab_size=policy.vocab_size,
            chat_template=ChatTemplate.of(policy.tokenizer, cfg, _TEMPLATE),
            end_strings=tuple(cfg.inference.end_strings),
            add_bos=cfg.inference.add_BOS,
            seed=cfg.seed,
        )
        shared: dict[str, Any] = {
            "refusal": refusal,
            "max_requests": cfg.inference.max_concurrent_requests,
            "busy": TOO_MANY,
        }
        doors = [Door(cfg.host, cfg.port, "port", token=token, **shared)]
        if cfg.web_server:
            doors.append(Door(cfg.host, cfg.web_port, "web_port", cfg.username, cfg.password, **shared))
        desk = FrontDesk(stopped=lambda: stop.name is not None)
        with open_doors(make_app(served, desk), doors):
            try:
                policy.serve(desk, slots)
            finally:
                desk.close()
