"""The same archive gives the same numbers however it is cut: logprobs, rewards, samples, and one training step.

Cuts: TP 2, PP 2, DP 2 against one process, training also with sequence parallelism and with recomputation; TP 2,
PP 2 and DP 2 also on pretend GPUs. Not covered: virtual pipeline stages, NCCL itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import GenerationRequest, Orders, Progress, Response
from tests.distributed.helpers import run_ranks
from tests.tiny import ARCH

SHARED = [100, 3, 40, 41, 42, 43, 44, 9, 8]
ROWS = [[5, 9, 77, 30, 2], [*SHARED, 7], [*SHARED, 1, 2, 3], [8, 8]]
EXAMPLES = [Example((row,), ([0] + [1] * (len(row) - 1),)) for row in ROWS]
CUTS = {
    "TP 2": (2, 2, 1),
    "PP 2": (2, 1, 2),
    "DP 2": (2, 1, 1),
    "TP 2, sequence parallel": (2, 2, 1),
    "PP 2, recomputed": (2, 1, 2),
    "DP 2 on GPUs": (2, 1, 1),  # with an optimizer whose state is cut over the ranks there
    "TP 2 on GPUs": (2, 2, 1),
    "PP 2 on GPUs": (2, 1, 2),
}
TRAINED: dict[str, dict[str, Any]] = {
    "TP 2, sequence parallel": {"sequence_parallel": True},
    "PP 2, recomputed": {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform"},
}


def write_archives(cluster: Any, folder: Path) -> None:
    """A policy and a reward model, by whatever ranks there are."""
    import torch

    from nemo_aligner.engine.checkpoints import nemo_archive
    from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
    from nemo_aligner.engine.model.build import RunOptions, build_model

    bf16 = {"init_method_std": 0.1, "kv_channels": 16}  # far from saturation, and heads that the C kernels take
    for name, kind, more in (("policy", None, {}), ("reward", "binary_ranking", {}), ("bf16 policy", None, bf16)):
        arch = replace(ARCH, vocab_size=259, tokenizer=BYTE_TOKENIZER, reward_model_type=kind, **more)
        torch.manual_seed(3)
        model = build_model(arch, RunOptions(tp=cluster.tp, pp=cluster.pp))
        nemo_archive.save_archive(
            folder / f"{name}.nemo", model, arch, FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER), cluster
        )


def measure(cluster: Any, folder: Path, name: str) -> None:
    """Everything a stage asks of a model, written as JSON by rank 0."""
    from nemo_aligner.engine.policy import load_policy, load_policy_for_training
    from nemo_aligner.engine.reward_model import load_reward_model
    from nemo_aligner.stages.batches import microbatches
    from nemo_aligner.stages.reinforce.loop import reinforce_objective
    from nemo_aligner.stages.supervised.loop import sft_objective

    policy = load_policy(folder / "policy.nemo", cluster, precision="32")
    found: dict[str, Any] = {"logprobs": [row.tolist() for row in policy.logprobs(ROWS, 2)]}
    requests = [
        GenerationRequest(p, s, tuple(row))
        for p, row in enumerate(ROWS)
        for s in range(3)
        if p % cluster.dp_size == cluster.dp_rank
    ]
    drawn = [
        r for part in cluster.gather(list(policy.generate(requests, SamplingParams(max_tokens=8), 4))) for r in part
    ]
    found["samples"] = sorted((r.prompt_index, r.sample_index, r.tokens) for r in drawn)
    found["bf16 gap"] = bf16_gap(cluster, folder)
    if cluster.dp_size == 1:
        found["served tokens"], found["served scores"] = served(cluster, policy)
    reward_model = load_reward_model(folder / "reward.nemo", cluster, precision="32")
    found["rewards"] = reward_model.score(ROWS, 3)

    overrides = ModelOverrides(restore_from_path=str(folder / "policy.nemo"), **TRAINED.get(name, {}))
    trained = load_policy_for_training(overrides, TrainerConfig(precision="32"), cluster)
    trained.keep_initial_weights()
    optimizer = "distributed_fused_adam" if name == "DP 2 on GPUs" else "adamw"
    trained.add_optimizer(OptimConfig(name=optimizer, lr=1e-2), clip_grad=1.0, max_steps=3)
    for step in range(2):
        batch = microbatches(
            EXAMPLES, range(4 - step), size=1, dp_rank=cluster.dp_rank, dp_size=cluster.dp_size, pad_id=258
        )
        metrics = trained.train_step(batch, sft_objective)
        found[f"step {step}"] = [metrics.loss, metrics.grad_norm]
    trained.save_training_state(folder / f"checkpoint {name}", {"step": 2})
    weighted = [replace(example, weight=a) for example, a in zip(EXAMPLES, (0.7, -1.3, 0.2, 2.1), strict=True)]
    for size in (1, 2):  # evaluated, not stepped: the same weights for both
        batch = microbatches(
            weighted, range(4), size=size, dp_rank=cluster.dp_rank, dp_size=cluster.dp_size, pad_id=258
        )
        found[f"REINFORCE loss, {size} a micro-batch"] = trained.evaluate(batch, reinforce_objective).loss
    metrics = trained.train_step(batch, reinforce_objective)
    found["REINFORCE step"] = [metrics.loss, metrics.grad_norm]
    found["initial"] = [row.tolist() for row in trained.initial_logprobs(ROWS, 2)]
    found["after"] = [row.tolist() for row in trained.logprobs(ROWS, 4)]
    if cluster.is_main:
        (folder / f"{name}.json").write_text(json.dumps(found))


class OneBatch:
    """A desk with a few requests, given out two at a time."""

    def __init__(self) -> None:
        kinds = [SamplingParams(max_tokens=8, seed=seed, top_logprobs=2 * (seed % 2)) for seed in range(4)]
        self._new = [
            GenerationRequest(0, 0, tuple(row), sampling=kind, scores_prompt=True, uid=kind.seed)
            for row, kind in zip(ROWS, kinds, strict=True)
        ]
        self.responses: list[Response] = []

    def orders(self, *, idle: bool) -> Orders | None:
        new, self._new = self._new[:2], self._new[2:]
        return Orders(new) if new or len(self.responses) < len(ROWS) else None

    def drawn(self, progress: Sequence[Progress]) -> None:
        pass

    def finished(self, response: Response) -> None:
        self.responses.append(response)


def served(cluster: Any, policy: Any) -> tuple[list[Any], list[Any]]:
    """Tokens, and every figure of them, of requests that rank 0 alone knows; empty on the others."""
    desk = OneBatch() if cluster.is_main else None
    policy.serve(desk, 3)
    responses = sorted(desk.responses if desk else [], key=lambda response: response.uid)
    likeliest = [[r.top_logprobs, r.prompt_scores.top] for r in responses if r.prompt_scores]
    tokens = [
        [r.tokens, *([[[t for t, _ in top] for top in tops] for tops in both])]
        for r, both in zip(responses, likeliest, strict=True)
    ]
    figures = [
        [r.logprobs, r.prompt_scores.logprobs, *([[[v for _, v in top] for top in tops] for tops in both])]
        for r, both in zip(responses, likeliest, strict=True)
        if r.prompt_scores
    ]
    return tokens, figures


def bf16_gap(cluster: Any, folder: Path) -> float:
    """How far log-probabilities of tokens drawn in bf16 are, at most, from those of a full forward in bf16."""
    from nemo_aligner.engine.policy import load_policy

    policy = load_policy(folder / "bf16 policy.nemo", cluster, precision="bf16")
    requests = [GenerationRequest(p, s, tuple(row)) for p, row in enumerate(ROWS) for s in range(3)]
    drawn = list(policy.generate(requests, SamplingParams(max_tokens=8), 4))
    full = policy.logprobs([[*ROWS[r.prompt_index], *r.tokens] for r in drawn], 2)
    return max(
        abs(a - b)
        for response, row in zip(drawn, full, strict=True)
        for a, b in zip(response.logprobs, row[-len(response.logprobs) :].tolist(), strict=True)
    )


def resume(cluster: Any, folder: Path, checkpoint: str, name: str) -> None:
    """Go on from a checkpoint, on whatever cut this is."""
    from nemo_aligner.engine.policy import load_policy_for_training
    from nemo_aligner.stages.batches import microbatches
    from nemo_aligner.stages.supervised.loop import sft_objective

    overrides = ModelOverrides(restore_from_path=str(folder / "policy.nemo"))
    model = load_policy_for_training(overrides, TrainerConfig(precision="32"), cluster)
    model.add_optimizer(OptimConfig(name="adamw", lr=1e-2), clip_grad=1.0, max_steps=3)
    model.load_training_state(folder / f"checkpoint {checkpoint}")
    batch = microbatches(EXAMPLES, range(4), size=2, dp_rank=cluster.dp_rank, dp_size=cluster.dp_size, pad_id=258)
    metrics = model.train_step(batch, sft_objective)
    if cluster.is_main:
        (folder / f"{name}.json").write_text(json.dumps([metrics.loss, metrics.grad_norm]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuts")
    run_ranks(1, write_archives, folder)
    run_ranks(1, measure, folder, "one")
    run_ranks(1, resume, folder, "one", "one resumed")
    return folder


def close(a: Any, b: Any, tolerance: float) -> None:
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y, tolerance)
    else:
        assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_gives_the_numbers_of_one_process(cut: str, folder: Path) -> None:
    world, tensor, pipeline = CUTS[cut]
    run_ranks(world, measure, folder, cut, tensor=tensor, pipeline=pipeline, gpus="GPU" in cut)
    one, cut_found = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", cut))
    assert cut_found["samples"] == one["samples"]
    assert max(cut_found["bf16 gap"], one["bf16 gap"]) < 2e-2
    if "served tokens" in cut_found:
        assert cut_found["served tokens"] == one["served tokens"]
        close(cut_found["served scores"], one["served scores"], 1e-4)
    assert cut_found["initial"] == cut_found["logprobs"]
    for key in ("logprobs", "rewards", "step 0", "step 1"):
        close(cut_found[key], one[key], 1e-4)
    # the weights differ by then by what two Adam steps make of rounding
    for key in one:
        if key.startswith("REINFORCE"):
            close(cut_found[key], one[key], 1e-3)
    close(cut_found["after"], one["after"], 2e-3)


@pytest.mark.parametrize(("written", "read"), [("TP 2", "PP 2"), ("one", "TP 2 on GPUs")])
def test_a_checkpoint_of_one_cut_goes_on_in_another(written: str, read: str, folder: Path) -> None:
    if written != "one" and not (folder / f"checkpoint {written}").exists():
        pytest.skip("runs after the test above, which writes the checkpoint")
    world, tensor, pipeline = CUTS[read]
    run_ranks(world, resume, folder, written, "resumed", tensor=tensor, pipeline=pipeline, gpus="GPU" in read)
    close(*(json.loads((folder / f"{n}.json").read_text()) for n in ("resumed", "one resumed")), 1e-3)  # type: ignore[misc]
