"""What responses are drawn to, and how: prompts with room for one, and the settings of `model.ppo` for the engine."""

from __future__ import annotations

import logging

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.data.blending import Blend
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.prompts import PromptRow, bos_for, encode_prompts
from nemo_aligner.engine.interfaces import Policy
from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)


def encode(cfg: ReinforceConfig, policy: Policy, rows: Blend, chat: ChatTemplate | None) -> list[PromptRow]:
    """Prompts that leave room for a response; conversations through `chat`."""
    tokenizer = policy.tokenizer
    return encode_prompts(
        rows,
        tokenizer.encode,
        bos_id=bos_for(tokenizer, cfg.model.ppo.sampling_params.add_BOS, "model.ppo.sampling_params.add_BOS"),
        limit=cfg.model.data.seq_length or context_of(cfg, policy) // 2,
        key="model.data.data_prefix",
        chat=chat,
    )


def context_of(cfg: ReinforceConfig, policy: Policy) -> int:
    """Tokens of prompt and response together, at most."""
    return min(cfg.trainer.ppo.rollout_batch_seq_length or policy.max_sequence_length, policy.max_sequence_length)


def sampling_params(
    cfg: ReinforceConfig, policy: Policy, *, greedy: bool = False, seed_offset: int = 0
) -> SamplingParams:
    """`model.ppo.sampling_params` and `length_params` as the engine takes them. Raises ConfigError."""
    given, lengths = cfg.model.ppo.sampling_params, cfg.model.ppo.length_params
    context = context_of(cfg, policy)
    most = min(lengths.max_length or context // 2, context - 1)
    if lengths.min_length > most:
        raise ConfigError(
            f"{lengths.min_length} is above the {most} tokens that a response may have",
            "model.ppo.length_params.min_length",
        )
    return SamplingParams(
        greedy=greedy,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        min_tokens=lengths.min_length,
        max_tokens=most,
        end_strings=tuple(given.end_strings),
        seed=cfg.model.seed + seed_offset,
    )


def tell_what_changes_the_draw(sampling: SamplingParams) -> None:
    """Say where responses are drawn from another distribution than the one that is trained."""
    if sampling.min_tokens > 0:
        log.info(
            "model.ppo.length_params.min_length=%d: EOS is not drawn before, but log-probabilities, gradient and "
            "KL are those of the policy without this rule", sampling.min_tokens,
        )  # fmt: skip
    if sampling.changes_distribution:
        log.warning(
            "model.ppo.sampling_params draw from another distribution than the policy's own; "
            "gradient and KL are those of the policy itself, as if it had drawn the responses"
        )
