"""Rollouts: responses of the policy to a step's prompts, their rewards, and their KL to the initial policy.

prompts ─▶ generate ─▶ responses, logprobs ─▶ initial policy's logprobs ─▶ KL ─┐
              └─ each few finished texts ─▶ reward server (meanwhile) ─────────┴▶ Rollout, the same on every rank
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from nemo_aligner.algorithms.reinforce import sequence_kl
from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.engine.interfaces import Cluster, GenerationRequest, Policy, Response
from nemo_aligner.errors import AlignerError, ServerError
from nemo_aligner.metrics import Timers


class Rewards(Protocol):
    """Whoever gives rewards, such as servers.reward_client.RewardClient.

    `archive` is the sha256 of the reward model's archive, as far as it is known; once it is, rewards of another are
    refused.
    """

    archive: str | None

    def submit(self, texts: Sequence[str]) -> Future[list[float]]: ...

    def hurry(self) -> None:
        """Do not wait any longer for what does not come."""


@dataclass(frozen=True)
class Rollout:
    """One response with what is known of it; `group` says which responses answer the same prompt of the step."""

    group: int
    sample_index: int
    prompt: PromptRow
    tokens: list[int]
    text: str
    finished: bool  # ended by itself, not by the length limit
    logprobs: list[float]  # of each token, under the policy that drew it
    reward: float = 0.0
    kl: float | None = None  # None where no initial policy is kept

    @property
    def row(self) -> list[int]:
        return [*self.prompt.tokens, *self.tokens]


@dataclass(frozen=True)
class KL:
    """How the KL to the initial policy is measured."""

    estimator: str
    reduction: str


class RolloutWorker:
    """Draws and scores rollouts; every rank calls it with the same prompts and gets the same answer."""

    def __init__(
        self, policy: Policy, cluster: Cluster, rewards: Rewards, *, forward_batch: int, kl: KL | None, timers: Timers
    ) -> None:
        self._policy, self._cluster, self._rewards = policy, cluster, rewards
        self._forward_batch, self._kl, self._timers = forward_batch, kl, timers

    def run(
        self, prompts: Sequence[tuple[int, PromptRow]], n: int, sampling: SamplingParams, slots: int
    ) -> list[Rollout]:
        """`n` responses to each of `prompts`, (index of its noise and its group, prompt), in order. Collective.

        Raises ServerError on every rank when rewards cannot be had.
        """
        cluster = self._cluster
        mine = dict(prompts[cluster.dp_rank :: cluster.dp_size])
        requests = [GenerationRequest(index, s, prompt.tokens) for index, prompt in mine.items() for s in range(n)]
        with self._timers.phase("generate"):
            asked = _Asked(self._rewards if cluster.speaks_for_replica else None, self._forward_batch)
            drawn = []
            for response in self._policy.generate(requests, sampling, slots):
                rollout = _rollout(mine[response.prompt_index], response)
                drawn.append(rollout)
                asked.add(rollout.prompt.text + rollout.text)
            asked.flush()
        kls = self._divergences(drawn)
        with self._timers.phase("critic_wait"):
            scores, fault = asked.answers()
        if cluster.any(fault is not None):
            raise ServerError(str(fault or "another rank got no rewards"))
        own = [
            replace(rollout, reward=score, kl=kl) for rollout, score, kl in zip(drawn, scores, kls, strict=True)
        ]  # ranks that do not speak for their replica have no scores, and nothing to say
        everyone = [rollout for part in cluster.gather(own) for rollout in part]
        return sorted(everyone, key=lambda rollout: (rollout.group, rollout.sample_index))

    def _divergences(self, drawn: Sequence[Rollout]) -> list[float | None]:
        if self._kl is None:  # a rank that drew nothing may have a part in what others ask for
            return [None] * len(drawn)
        rows, starts = [rollout.row for rollout in drawn], [len(rollout.prompt.tokens) for rollout in drawn]
        with self._timers.phase("init_logprobs"):
            initial = self._policy.initial_logprobs(rows, self._forward_batch, starts)
        # the policy is still the one that drew them, so its own log-probabilities are known
        return [
            sequence_kl(torch.tensor(r.logprobs), first[start:], self._kl.estimator, self._kl.reduction)
            for r, first, start in zip(drawn, initial, starts, strict=True)
        ]


class _Asked:
    """Texts that wait for rewards, sent in batches; with no one to ask, nothing is sent and every reward is 0."""

    def __init__(self, rewards: Rewards | None, batch: int) -> None:
        self._rewards, self._batch = rewards, batch
        self._unsent: list[str] = []
        self._futures: list[Future[list[float]]] = []
        self._count = 0

    def add(self, text: str) -> None:
        self._count += 1
        self._unsent.append(text)
        if len(self._unsent) == self._batch:
            self.flush()

    def flush(self) -> None:
        if self._unsent and self._rewards is not None:
            self._futures.append(self._rewards.submit(self._unsent))
        self._unsent = []

    def answers(self) -> tuple[list[float], AlignerError | None]:
        """Rewards in the order of the texts, or the fault that kept them away."""
        if self._rewards is None:
            return [0.0] * self._count, None
        try:
            return [score for future in self._futures for score in future.result()], None
        except AlignerError as fault:
            return [0.0] * self._count, fault


def _rollout(prompt: PromptRow, response: Response) -> Rollout:
    return Rollout(
        response.prompt_index,
        response.sample_index,
        prompt,
        response.tokens,
        response.text,
        response.finish_reason == "stop",
        response.logprobs,
    )


def token_count(rollouts: Iterable[Rollout]) -> int:
    """Response tokens of all rollouts."""
    return sum(len(rollout.tokens) for rollout in rollouts)
