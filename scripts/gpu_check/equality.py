"""What a stage asks of a model, on the CPU in a process of its own and on the device, with the same weights."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import GenerationRequest
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.reward_model import MegatronRewardModel
from nemo_aligner.stages.batches import microbatches
from nemo_aligner.stages.reinforce.loop import reinforce_objective
from scripts.gpu_check.models import SHAPES, random_model, random_rows
from scripts.gpu_check.report import Report

ARCH = replace(SHAPES["tiny"], init_method_std=0.15)  # far from uniform predictions: greedy choices are no near ties
OPTIM = OptimConfig(name="distributed_fused_adam", lr=1e-2, eps=1e-3)  # a smooth step, where Adam's first is of signs
TOLERANCE = 1e-3  # float32, sums in another order
_SHARED, *_OTHERS = random_rows(5, 12, ARCH)
_WEIGHTS = (0.7, -1.3, 0.2, 2.1, -0.4, 1.0)
ROWS = [[*_SHARED, 1, 2], [*_SHARED, 3], *(row[:length] for row, length in zip(_OTHERS, (12, 5, 9, 3), strict=True))]


def facts(cluster: MegatronCluster, weights: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that is compared, and the weights it was found with; `weights` None: random ones."""
    policy = random_model(MegatronPolicy, ARCH, torch.float32, cluster)
    judge = random_model(MegatronRewardModel, replace(ARCH, reward_model_type="binary_ranking"), torch.float32, cluster)
    modules = {"policy": policy.module, "judge": judge.module}
    if weights is not None:
        for name, module in modules.items():
            module.load_state_dict(weights[name], strict=False)
    used = {
        name: {key: value.detach().cpu().clone() for key, value in module.state_dict().items() if value is not None}
        for name, module in modules.items()
    }
    device = next(policy.module.parameters()).device
    row = torch.tensor(ROWS[:1], device=device)
    with torch.no_grad():
        logits = policy.module.eval()(row, torch.arange(row.size(1), device=device)[None], None)
    requests = [GenerationRequest(i, 0, tuple(row)) for i, row in enumerate(ROWS)]
    drawn = policy.generate(requests, SamplingParams(greedy=True, max_tokens=16), 4)
    texts = {response.prompt_index: response.tokens for response in drawn}
    found: dict[str, Any] = {
        "logits": logits.float().cpu(),
        "log-probabilities": torch.cat(policy.logprobs(ROWS, 4)).cpu(),
        "rewards": torch.tensor(judge.score(ROWS, 4)),
        "greedy text": torch.tensor([token for i in sorted(texts) for token in texts[i]]),
    }
    policy.keep_initial_weights()
    policy.add_optimizer(OPTIM, clip_grad=0.0, max_steps=2)
    weighted = zip(ROWS, _WEIGHTS, strict=True)
    examples = [Example((row,), ([0] * 2 + [1] * (len(row) - 2),), weight) for row, weight in weighted]
    batches = microbatches(examples, range(len(ROWS)), size=4, dp_rank=0, dp_size=1, pad_id=0)
    policy.train_step(batches, reinforce_objective)
    found["gradients"] = {
        name: parameter.main_grad.float().cpu().clone() for name, parameter in policy.module.named_parameters()
    }
    found["initial log-probabilities"] = torch.cat(policy.initial_logprobs(ROWS, 4)).cpu()
    found["log-probabilities after a step"] = torch.cat(policy.logprobs(ROWS, 4)).cpu()
    return {"weights": used, "facts": found}


def write_reference(path: Path) -> None:
    """The CPU's facts; for a process of its own, as one that has seen a GPU goes on with it."""
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=1) as cluster:
        torch.manual_seed(1)
        torch.save(facts(cluster, None), path)


def check(cluster: MegatronCluster, report: Report) -> None:
    """Compare the device of `cluster` with the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.pt"
        other = multiprocessing.get_context("spawn").Process(target=write_reference, args=(path,))
        other.start()
        other.join()
        if other.exitcode != 0:
            raise SystemExit(f"error: the CPU's process ended with exit status {other.exitcode}")
        reference = torch.load(path, weights_only=True)
    found = facts(cluster, reference["weights"])["facts"]
    for name, expected in reference["facts"].items():
        if name == "gradients":
            gap = max(_relative(found[name][key], value) for key, value in expected.items())
        elif name == "greedy text":
            gap = 0.0 if torch.equal(found[name], expected) else 1.0
        else:
            gap = float((found[name] - expected).abs().max())
        report.compared(name, gap, 0.0 if name == "greedy text" else TOLERANCE)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))
