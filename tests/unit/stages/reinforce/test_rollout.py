"""Rollouts of several ranks: each its own prompts, one list in one order for all, every reward with its own text."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.reinforce import ReinforceLoopConfig
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.errors import RewardError, ServerError
from nemo_aligner.metrics import Timers
from nemo_aligner.rewards.interfaces import Candidate, Judgement
from nemo_aligner.stages.reinforce.advantages import score
from nemo_aligner.stages.reinforce.rollout import KL, Rollout, RolloutWorker, token_count
from tests.fakes import EchoPolicy, OneProcess, RankOfSeveral, on_ranks

# indices that are neither dense nor sorted: they are numbers of the run, not places
PROMPTS = [(index, PromptRow(f"p{index}", tuple(f"p{index}".encode()))) for index in (40, 7, 23, 11, 5)]
SAMPLING = SamplingParams(max_tokens=4, seed=3)


class Judge:
    """Rewards a text by its bytes, and remembers the batches it was asked for."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.batches: list[list[str]] = []
        self.fault = fault

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Judgement]]:
        texts = [candidate.prompt + candidate.response for candidate in candidates]
        self.batches.append(texts)
        answer: Future[list[Judgement]] = Future()
        if self.fault is None:
            answer.set_result([Judgement(reward_of(text)) for text in texts])
        else:
            answer.set_exception(self.fault)
        return answer

    def hurry(self) -> None:
        pass

    def close(self) -> None:
        pass


class Learner(EchoPolicy):
    """Its initial policy gave every token half of the log-probability, and minus a hundred to those of the prompt."""

    def initial_logprobs(
        self, rows: Sequence[Sequence[int]], micro_batch_size: int, starts: Sequence[int] | None = None
    ) -> list[Tensor]:
        assert starts is not None
        return [
            torch.tensor([-100.0] * start + [-0.25 * (1 + i) for i in range(len(row) - start)])
            for row, start in zip(rows, starts, strict=True)
        ]


def reward_of(text: str) -> float:
    return float(sum(text.encode()))


def worker(
    cluster: Cluster, judge: Judge, *, policy: EchoPolicy | None = None, batch: int = 2, kl: KL | None = None
) -> RolloutWorker:
    made = policy or Learner()
    return RolloutWorker(made, cluster, judge, forward_batch=batch, kl=kl, timers=Timers())  # type: ignore[arg-type]


def rolled(cluster: Cluster, *, n: int = 3, kl: KL | None = None) -> list[Rollout]:
    return worker(cluster, Judge(), kl=kl).run(PROMPTS, n, SAMPLING, 4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_rank_gets_every_response_once_in_prompt_order_with_its_own_prompt_and_reward(ranks: int) -> None:
    wanted = sorted((index, s) for index, _ in PROMPTS for s in range(3))
    for found in on_ranks(ranks, rolled):
        assert [(r.group, r.sample_index) for r in found] == wanted
        for r in found:
            assert r.prompt.text == f"p{r.group}"
            assert r.text == f"<{r.group}.{r.sample_index}>"
            assert r.reward == reward_of(r.prompt.text + r.text)


def test_ranks_share_the_prompts_and_none_is_drawn_twice() -> None:
    def asked(cluster: RankOfSeveral) -> set[int]:
        policy = Learner()
        worker(cluster, Judge(), policy=policy).run(PROMPTS, 2, SAMPLING, 4)
        assert policy.sampling is SAMPLING
        assert policy.slots == 4
        assert all(request.prompt_tokens == tuple(f"p{request.prompt_index}".encode()) for request in policy.asked)
        return {request.prompt_index for request in policy.asked}

    first, second = on_ranks(2, asked)
    assert first & second == set()
    assert first | second == {index for index, _ in PROMPTS}
    assert abs(len(first) - len(second)) <= 1


def test_the_number_of_ranks_changes_no_rollout() -> None:
    alone = rolled(OneProcess(), kl=KL("k1", "sum"))  # type: ignore[arg-type]
    assert all(found == alone for found in on_ranks(3, lambda cluster: rolled(cluster, kl=KL("k1", "sum"))))


def test_the_number_of_ranks_changes_no_digit_of_whitened_rewards() -> None:
    """Not even where ranks are dealt prompts of different rewards."""
    loop = ReinforceLoopConfig(whiten_rewards=True, baseline="none")

    def whitened(cluster: Cluster) -> list[float]:
        return score(rolled(cluster, kl=KL("k1", "sum")), loop, None).with_kl.tolist()

    alone = whitened(OneProcess())  # type: ignore[arg-type]
    for ranks in (2, 3):
        assert on_ranks(ranks, whitened) == [alone] * ranks  # type: ignore[arg-type]


def test_the_kl_is_that_of_the_response_alone_under_the_policy_that_drew_it() -> None:
    for r in rolled(OneProcess(), kl=KL("k1", "sum")):  # type: ignore[arg-type]
        # log p − log p₀ = −0.5·i + 0.25·i at the i-th token
        assert r.kl == pytest.approx(sum(-0.25 * (1 + i) for i in range(len(r.tokens))))
    assert all(r.kl is None for r in rolled(OneProcess()))  # type: ignore[arg-type]


def test_a_response_is_finished_when_it_ended_by_itself() -> None:
    for r in rolled(OneProcess()):  # type: ignore[arg-type]
        assert r.finished == (r.sample_index % 2 == 0)
        assert r.row == [*r.prompt.text.encode(), *r.text.encode()]


def test_texts_go_out_in_batches_while_others_are_drawn_and_the_last_batch_too() -> None:
    judge = Judge()
    found = worker(OneProcess(), judge, batch=4).run(PROMPTS, 2, SAMPLING, 4)  # type: ignore[arg-type]
    assert [len(batch) for batch in judge.batches] == [4, 4, 2]
    texts = sorted(text for batch in judge.batches for text in batch)
    assert texts == sorted(r.prompt.text + r.text for r in found)
    assert token_count(found) == sum(len(r.text) for r in found)


def test_only_the_rank_that_speaks_for_its_replica_asks_for_rewards() -> None:
    judge, silent = Judge(), OneProcess()
    silent.speaks_for_replica = False
    found = worker(silent, judge).run(PROMPTS, 2, SAMPLING, 4)  # type: ignore[arg-type]
    assert judge.batches == []
    assert [r.reward for r in found] == [0.0] * 10


def test_rewards_that_one_rank_cannot_have_end_the_step_on_every_rank() -> None:
    def fails_on_rank_1(cluster: RankOfSeveral) -> str:
        judge = Judge(ServerError("no answer from the reward server") if cluster.rank == 1 else None)
        with pytest.raises((ServerError, RewardError)) as fault:
            worker(cluster, judge).run(PROMPTS, 2, SAMPLING, 4)
        return str(fault.value)

    assert on_ranks(2, fails_on_rank_1) == ["no answer from the reward server"] * 2
