"""An adapter gives the same numbers however the model is cut, and its archive and checkpoint are read by any cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.engine.interfaces import GenerationRequest
from tests.distributed.helpers import Cut, Job, run_jobs, run_ranks
from tests.distributed.test_parallel_invariance import EXAMPLES, ROWS, close
from tests.tiny import ARCHIVED

PEFT = PeftConfig(
    peft_scheme="lora",
    lora_tuning=LoraTuning(adapter_dim=3, alpha=6.0, target_modules=["all"], variant="canonical"),
)
HARDEST: dict[str, Any] = {
    "sequence_parallel": True,
    "virtual_pipeline_model_parallel_size": 2,
    "activations_checkpoint_granularity": "full",
    "activations_checkpoint_method": "uniform",
}


def write_base(cluster: Any, folder: Path) -> None:
    """Tied embeddings: on the first and last pipeline stage there is one weight, and it is frozen."""
    import torch

    from nemo_aligner.engine.checkpoints import nemo_archive
    from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
    from nemo_aligner.engine.model.build import RunOptions, build_model

    arch = replace(ARCHIVED, num_layers=4, share_embeddings_and_output_weights=True)
    torch.manual_seed(3)
    tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    nemo_archive.save_archive(folder / "base.nemo", build_model(arch, RunOptions()), arch, tokenizer, cluster)


def begin(cluster: Any, folder: Path) -> None:
    write_base(cluster, folder)
    measure(cluster, folder, "TP 2")


def alone(cluster: Any, folder: Path) -> None:
    measure(cluster, folder, "one")
    measure(cluster, folder, "one goes on", {}, "TP 2")


def measure(
    cluster: Any, folder: Path, name: str, more: dict[str, Any] | None = None, begun: str | None = None
) -> None:
    """Training, generation and archives of an adapter, going on from what `begun` left; JSON by rank 0."""
    from nemo_aligner.engine.policy import load_policy, load_policy_for_training
    from nemo_aligner.stages.batches import microbatches
    from nemo_aligner.stages.supervised.loop import sft_objective

    overrides = ModelOverrides(restore_from_path=str(folder / "base.nemo"), peft=PEFT, **(more or {}))
    trained = load_policy_for_training(overrides, TrainerConfig(precision="32"), cluster)
    trained.keep_initial_weights()
    trained.add_optimizer(OptimConfig(name="adamw", lr=1e-2), clip_grad=1.0, max_steps=6)
    if begun:
        trained.load_training_state(folder / f"checkpoint {begun}")
    found: dict[str, Any] = {}
    for step in range(3):
        batch = microbatches(
            EXAMPLES, range(4 - step), size=1, dp_rank=cluster.dp_rank, dp_size=cluster.dp_size, pad_id=258
        )
        metrics = trained.train_step(batch, sft_objective)
        found[f"step {step}"] = [metrics.loss, metrics.grad_norm]
    found["initial"] = [row.tolist() for row in trained.initial_logprobs(ROWS, 2)]
    trained.save_training_state(folder / f"checkpoint {name}", {"step": 3})
    trained.save_nemo(folder / f"{name}.nemo")
    trained._merges_adapter = True
    trained.save_nemo(folder / f"{name} merged.nemo")
    requests = [GenerationRequest(p, s, tuple(row)) for p, row in enumerate(ROWS) for s in range(2)]
    drawn = trained.generate(requests, SamplingParams(max_tokens=8), 4)
    found["drawn"] = sorted((r.prompt_index, r.sample_index, r.tokens) for r in drawn)
    found["logprobs"] = [row.tolist() for row in trained.logprobs(ROWS, 4)]
    for kind in ("", " merged"):
        policy = load_policy(folder / f"{name}{kind}.nemo", cluster, precision="32")
        found[f"archive{kind}"] = [row.tolist() for row in policy.logprobs(ROWS, 4)]
    if cluster.is_main:
        (folder / f"{name}.json").write_text(json.dumps(found))


def test_every_cut_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    run_jobs(2, [Job(Cut(tensor=2), begin, (tmp_path,))])
    run_ranks(1, alone, tmp_path)
    run_jobs(4, [Job(Cut(tensor=2, pipeline=2), measure, (tmp_path, "TP 2, PP 2 goes on", HARDEST, "TP 2"))])
    for cut, whole in (("TP 2", "one"), ("TP 2, PP 2 goes on", "one goes on")):
        found, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in (cut, whole))
        assert found["drawn"] == one["drawn"]
        for key in ("step 0", "step 1", "step 2", "initial"):
            close(found[key], one[key], 1e-4)
        close(found["logprobs"], one["logprobs"], 2e-3)
        for numbers in (one, found):
            assert numbers["archive"] == numbers["archive merged"] == numbers["logprobs"]
