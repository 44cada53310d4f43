"""A model with experts gives the same numbers however its experts are cut: losses, norms of gradients, text, rewards.

Experts over 2 ranks that are data-, tensor- or context-parallel ones, whole or themselves cut in two, layers over
pipeline stages, over 2 and 4 processes against one, and on pretend GPUs; adapters beside them; and a checkpoint of one
cut goes on in another, with its optimizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import GenerationRequest
from tests.distributed.helpers import Cut, Job, run_jobs
from tests.distributed.test_parallel_invariance import PAIRS, ROWS, close, dealt, rollouts, through_megatron
from tests.tiny import EXPERTS

EXAMPLES = [Example((row,), ([0] + [1] * (len(row) - 1),)) for row in ROWS]
WEIGHTED = [replace(example, weight=a) for example, a in zip(EXAMPLES, (0.7, -1.3, 0.2, 2.1), strict=True)]
OPTIM = OptimConfig(name="distributed_fused_adam", lr=1e-2)  # cut over data-parallel ranks, where there are some
CUTS = {
    "EP 2": (2, Cut(expert=2)),
    "EP 2 of TP 2": (2, Cut(tensor=2, expert=2, expert_tensor=1)),
    "EP 2 on GPUs": (2, Cut(expert=2, gpus=True)),
    "EP 2, ETP 2": (4, Cut(expert=2, expert_tensor=2)),
    "EP 2 of CP 2": (2, Cut(context=2, expert=2)),
    "PP 2": (2, Cut(pipeline=2)),
    "EP 2, PP 2": (4, Cut(pipeline=2, expert=2)),
}
MORE = {
    "PP 2": {"activations_checkpoint_granularity": "full", "activations_checkpoint_method": "uniform"},
    "EP 2, PP 2": {"virtual_pipeline_model_parallel_size": 2},
}
RESUMED = [
    ("one", "EP 2"), ("EP 2", "one"), ("EP 2, ETP 2", "EP 2 of TP 2"), ("EP 2, PP 2", "PP 2"), ("PP 2", "EP 2 of CP 2"),
]  # fmt: skip
WRITTEN = ["EP 2", "EP 2, ETP 2", "EP 2, PP 2"]
LAYERS = {"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}


def write_archives(cluster: Any, folder: Path) -> None:
    import torch

    from nemo_aligner.engine.checkpoints import nemo_archive
    from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
    from nemo_aligner.engine.model.build import RunOptions, build_model

    for name, kind in (("policy", None), ("reward", "binary_ranking")):
        arch = replace(EXPERTS, **LAYERS, vocab_size=259, tokenizer=BYTE_TOKENIZER, reward_model_type=kind)
        torch.manual_seed(3)
        tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
        nemo_archive.save_archive(folder / f"{name}.nemo", build_model(arch, RunOptions()), arch, tokenizer, cluster)


def overrides(cluster: Any, path: Path, name: str) -> ModelOverrides:
    # micro-batches of one row each: a load-balancing loss of the micro-batch is then the same for any number of ranks
    return ModelOverrides(
        restore_from_path=str(path),
        expert_model_parallel_size=cluster.ep,
        expert_tensor_parallel_size=cluster.etp,
        context_parallel_size=cluster.cp,
        sequence_parallel=cluster.tp > 1,
        moe_aux_loss_coeff=0.2,
        moe_z_loss_coeff=0.01,
        **MORE.get(name, {}),
    )


def measure(cluster: Any, folder: Path, name: str) -> None:
    """Everything a stage asks of a model in training, written as JSON by rank 0."""
    from nemo_aligner.engine.policy import load_policy_for_training
    from nemo_aligner.engine.reward_model import load_reward_model_for_training
    from nemo_aligner.stages.supervised.loop import ranking_objective, sft_objective

    trainer = TrainerConfig(precision="32")
    policy = load_policy_for_training(overrides(cluster, folder / "policy.nemo", name), trainer, cluster)
    policy.add_optimizer(OPTIM, clip_grad=1.0, max_steps=4)
    found: dict[str, Any] = {"through Megatron": through_megatron(cluster, policy)}
    found["logprobs"] = [row.tolist() for row in policy.logprobs(ROWS, 2)]
    policy.keep_initial_weights()
    for step, indices in enumerate((range(4), range(3))):
        metrics = policy.train_step(dealt(cluster, EXAMPLES, indices, 1), sft_objective)
        found[f"SFT step {step}"] = [
            metrics.loss,
            metrics.grad_norm,
            *(metrics.terms[n] for n in sorted(metrics.terms)),
        ]
    assert sorted(metrics.terms) == ["load_balancing_loss", "router_z_loss"]
    found["validation"] = policy.evaluate(dealt(cluster, EXAMPLES, range(3), 1), sft_objective).loss
    policy.save_training_state(folder / f"checkpoint {name}", {"step": 2})
    found["rollout text"], found["rollout KL"] = rollouts(cluster, policy)
    found |= reinforce_step(cluster, policy)
    found["greedy text"] = greedy(cluster, policy)
    policy.save_nemo(folder / f"{name}.nemo")
    judge = load_reward_model_for_training(
        overrides(cluster, folder / "reward.nemo", name), trainer, cluster, reward_model_type="binary_ranking"
    )
    judge.add_optimizer(OPTIM, clip_grad=1.0, max_steps=4)
    found["rewards"] = judge.score(ROWS, 3)
    for step, pairs in enumerate((range(3), range(1))):
        metrics = judge.train_step(dealt(cluster, PAIRS, pairs, 1), ranking_objective)
        found[f"RM step {step}"] = [metrics.loss, metrics.grad_norm]
    found |= adapter(cluster, folder, name)
    if cluster.is_main:
        (folder / f"{name}.json").write_text(json.dumps(found))


def adapter(cluster: Any, folder: Path, name: str) -> dict[str, Any]:
    """A step of REINFORCE and one of SFT of an adapter in the attention: the experts stay as they are."""
    from nemo_aligner.engine.policy import load_policy_for_training
    from nemo_aligner.stages.supervised.loop import sft_objective

    asked = overrides(cluster, folder / "policy.nemo", name)
    asked.peft = PeftConfig("lora", lora_tuning=LoraTuning(adapter_dim=3, target_modules=["attention"]))
    policy = load_policy_for_training(asked, TrainerConfig(precision="32"), cluster)
    policy.keep_initial_weights()
    policy.add_optimizer(OPTIM, clip_grad=1.0, max_steps=4)
    found = {f"adapter's {key}": value for key, value in reinforce_step(cluster, policy).items()}
    metrics = policy.train_step(dealt(cluster, EXAMPLES, range(4), 1), sft_objective)
    return found | {
        "adapter's SFT step 1": [metrics.loss, metrics.grad_norm],
        "adapter's greedy text": greedy(cluster, policy),
        "adapter's base": [row.tolist() for row in policy.initial_logprobs(ROWS, 4)],
    }


def greedy(cluster: Any, policy: Any) -> list[Any]:
    requests = [
        GenerationRequest(p, 0, tuple(row)) for p, row in enumerate(ROWS) if p % cluster.dp_size == cluster.dp_rank
    ]
    drawn = list(policy.generate(requests, SamplingParams(max_tokens=8, greedy=True), 4))
    return sorted([r.prompt_index, r.tokens] for part in cluster.gather(drawn) for r in part)


def reinforce_step(cluster: Any, policy: Any) -> dict[str, Any]:
    from nemo_aligner.stages.reinforce.loop import reinforce_objective

    metrics = policy.train_step(dealt(cluster, WEIGHTED, range(4), 1), reinforce_objective)
    return {
        "REINFORCE step": [metrics.loss, metrics.grad_norm],
        "after": [row.tolist() for row in policy.logprobs(ROWS, 4)],
    }


def resume(cluster: Any, folder: Path, written: str, read: str) -> None:
    """Go on from a checkpoint, on whatever cut this is."""
    from nemo_aligner.engine.policy import load_policy_for_training

    policy = load_policy_for_training(
        overrides(cluster, folder / "policy.nemo", read), TrainerConfig(precision="32"), cluster
    )
    policy.add_optimizer(OPTIM, clip_grad=1.0, max_steps=4)
    policy.load_training_state(folder / f"checkpoint {written}")
    found = reinforce_step(cluster, policy)
    if cluster.is_main:
        (folder / f"{written} in {read}.json").write_text(json.dumps(found))


def read_again(cluster: Any, folder: Path, name: str) -> None:
    """What an archive written by any cut says on one process that only reads."""
    from nemo_aligner.engine.policy import load_policy

    policy = load_policy(folder / f"{name}.nemo", cluster, precision="32")
    (folder / f"{name} read.json").write_text(json.dumps([row.tolist() for row in policy.logprobs(ROWS, 4)]))


def jobs(folder: Path, world: int) -> Iterator[Job]:
    for name, (ranks, cut) in CUTS.items():
        if ranks == world:
            yield Job(cut, measure, (folder, name))
    for written, read in RESUMED:
        if read in CUTS and CUTS[read][0] == world:
            yield Job(CUTS[read][1], resume, (folder, written, read))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    run_jobs(1, [Job(Cut(), write_archives, (folder,)), Job(Cut(), measure, (folder, "one"))])
    for world in (4, 2):
        run_jobs(world, list(jobs(folder, world)))
    last = [Job(Cut(), read_again, (folder, name)) for name in ("one", *WRITTEN)]
    run_jobs(1, [Job(Cut(), resume, (folder, "EP 2", "one")), *last])
    return folder


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_of_experts_gives_the_numbers_of_one_process(cut: str, folder: Path) -> None:
    one, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", cut))
    assert found.keys() == one.keys()
    for key in found:
        if "text" in key:
            assert found[key] == one[key], key
        elif key in ("rewards", "logprobs") and CUTS[cut][1].tensor == 1 and not CUTS[cut][1].gpus:
            assert found[key] == one[key], "to the last bit: every rank computes them by itself"
        else:
            late = key.endswith(("after", "rollout KL", "validation", "step 1")) or key.startswith("REINFORCE")
            close(found[key], one[key], 2e-3 if late else 1e-4)


@pytest.mark.parametrize(("written", "read"), RESUMED)
def test_a_checkpoint_of_one_cut_goes_on_in_another(written: str, read: str, folder: Path) -> None:
    resumed, one = (json.loads((folder / f"{name}.json").read_text()) for name in (f"{written} in {read}", "one"))
    for key in resumed:
        close(resumed[key], one[key], 2e-3)


@pytest.mark.parametrize("cut", WRITTEN)
def test_an_archive_written_by_any_cut_is_that_of_one_process(cut: str, folder: Path) -> None:
    found, one = (json.loads((folder / f"{name} read.json").read_text()) for name in (cut, "one"))
    close(found, one, 2e-3)
