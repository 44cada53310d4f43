"""Rollouts: responses of the policy to a step's prompts, their rewards, and their KL to the initial policy.

prompts ─▶ generate ─▶ responses, logprobs ─▶ initial policy's logprobs ─▶ KL ─┐
              └─ each few that finished ─▶ reward server, functions (meanwhile) ┴▶ Rollout, the same on every rank
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from nemo_aligner.algorithms.reinforce import sequence_kl
from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.engine.interfaces import Cluster, GenerationRequest, Policy, Response
from nemo_aligner.metrics import Timers
from nemo_aligner.ranks import together
from nemo_aligner.rewards.interfaces import Candidate, Judgement, Judgements, Rewarder


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
    reward: float | None = 0.0  # None where nobody can tell
    kl: float | None = None  # None where no initial policy is kept
    parts: Mapping[str, float | None] = field(default_factory=dict)  # rewards of several sources, by name

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
        self, policy: Policy, cluster: Cluster, rewards: Rewarder, *, forward_batch: int, kl: KL | None, timers: Timers
    ) -> None:
        self._policy, self._cluster, self._rewards = policy, cluster, rewards
        self._forward_batch, self._kl, self._timers = forward_batch, kl, timers

    def run(
        self, prompts: Sequence[tuple[int, PromptRow]], n: int, sampling: SamplingParams, slots: int
    ) -> list[Rollout]:
        """`n` responses to each of `prompts`, (index of its noise and its group, prompt), in order. Collective.

        Raises ServerError or RewardError on every rank when rewards cannot be had.
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
                prompt = rollout.prompt
                asked.add(Candidate(prompt.text, rollout.text, prompt.fields, prompt.where, prompt.turns))
            asked.flush()
        kls = self._divergences(drawn)
        with self._timers.phase("critic_wait"), together(cluster):
            judged = asked.answers()
        own = [
            replace(rollout, reward=judgement.reward, parts=judgement.parts, kl=kl)
            for rollout, judgement, kl in zip(drawn, judged, kls, strict=True)
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
    """Responses that wait for rewards, sent in batches; with no one to ask, nothing is sent and every reward is 0."""

    def __init__(self, rewards: Rewarder | None, batch: int) -> None:
        self._rewards, self._batch = rewards, batch
        self._unsent: list[Candidate] = []
        self._pending: list[Judgements] = []
        self._count = 0

    def add(self, candidate: Candidate) -> None:
        self._count += 1
        self._unsent.append(candidate)
        if len(self._unsent) == self._batch:
            self.flush()

    def flush(self) -> None:
        if self._unsent and self._rewards is not None:
            self._pending.append(self._rewards.submit(self._unsent))
        self._unsent = []

    def answers(self) -> list[Judgement]:
        """Judgements in the order of the responses. Raises the fault that kept them away."""
        if self._rewards is None:
            return [Judgement(0.0)] * self._count
        return [judgement for pending in self._pending for judgement in pending.result()]


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
