"""What the planner chooses, and what it says when there is nothing to choose."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nemo_aligner.commands.plan import main, shape_of
from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.errors import ConfigError, LaunchError
from nemo_aligner.planning.config import PlanConfig
from nemo_aligner.planning.plan import make_plan
from nemo_aligner.planning.report import report

ROOT = Path(__file__).resolve().parents[3]
MODEL = str(ROOT / "conf/model/llama3_8b.yaml")
MIXTRAL = str(ROOT / "conf/model/mixtral_8x7b.yaml")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of scripts/plan_layout.py."""
        monkeypatch.setattr(sys, "argv", ["plan_layout.py", *arguments])
        status = 0
        try:
            with one_line_errors():
                main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return call


def test_the_answer_ends_in_overrides_ready_to_paste(run: Run) -> None:
    status, out, _ = run(f"model={MODEL}", "gpus=8", "gpu_memory_gb=80")
    assert status == 0
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "without recomputation",
        "with full recomputation",
    ):
        assert part in out
    *_, last = out.strip().split("Overrides of ")
    script, *words = last.replace("\\\n", " ").split()
    assert script == "examples/nlp/gpt/train_gpt_sft.py:"
    assert {"trainer.devices=8", "trainer.num_nodes=1"} <= set(words)


def test_stages_of_a_rank_are_counted_and_handed_on(run: Run) -> None:
    asked = ["pipeline_model_parallel_size=4", "virtual_pipeline_model_parallel_size=2"]
    status, out, _ = run(f"model={MODEL}", "gpus=8", "gpu_memory_gb=80", *asked)
    assert status == 0
    assert "PP 4 × 2" in out
    assert "model.virtual_pipeline_model_parallel_size=2" in out


def test_rollouts_show_their_cache_and_the_initial_policy(run: Run) -> None:
    _, out, _ = run(f"model={MODEL}", "gpus=8", "gpu_memory_gb=80", "task=actor", "seq_length=2048")
    assert "KV cache" in out
    assert "for the initial policy" in out


def test_the_shape_may_be_an_archives(run: Run, tmp_path: Path) -> None:
    config = {**yaml.safe_load(Path(MODEL).read_text()), "tensor_model_parallel_size": 4}
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config))
    (status, of_archive, _), (_, of_yaml, _) = (
        run(f"model={model}", "gpus=8", "gpu_memory_gb=80") for model in (tmp_path, MODEL)
    )
    assert (status, of_archive) == (0, of_yaml.replace(MODEL, str(tmp_path)))
    del config["vocab_size"]
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config))
    assert "does not say its vocab_size" in run(f"model={tmp_path}", "gpus=8", "gpu_memory_gb=80")[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpus=1", "gpu_memory_gb=80"], "nothing fits: the layout that takes least (TP 1, PP 1, DP 1, full"),
        (["gpus=8", "gpu_memory_gb=80", "task=dpo"], "task: 'dpo' is not one of sft, rm, actor"),
        (["gpus=8", "gpu_memory_gb=80", "tp=2"], "tp: no such key"),
        (["gpus=8"], "gpu_memory_gb: required"),
        (["gpu_memory_gb=80"], "gpus: give either gpus, or the run"),
        (["gpus=12", "gpu_memory_gb=80"], "gpus: 12 GPUs are no whole number of nodes of 8"),
        (["gpus=8", "gpu_memory_gb=80", "tensor_model_parallel_size=3"], "cannot be cut over 8 GPUs"),
        (["gpus=8", "gpu_memory_gb=80", "seq_length=200000"], "seq_length: 200000 is above"),
        (["gpus=8", "gpu_memory_gb=80", "run=x"], "gpus: give either gpus, or the run"),
        (["gpu_memory_gb=80", "run=absent"], "run: absent cannot be read"),
        (["gpus=8", "gpu_memory_gb=80", "task=sampler", "virtual_pipeline_model_parallel_size=2"], "virtual_pipeline"),
        (["gpus=8", "gpu_memory_gb=80", "virtual_pipeline_model_parallel_size=5"], "cannot be cut over 8 GPUs"),
        (["--fast"], "'--fast' is not of the form key=value"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, run: Run) -> None:
    status, out, err = run(f"model={MODEL}", *arguments)
    assert (status, out) == (1, "")
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_shape_with_dropout_is_refused_for_training_alone() -> None:
    arch = replace(shape_of(MODEL), hidden_dropout=0.1)
    config = PlanConfig(model=MODEL, gpus=8, gpu_memory_gb=80, seq_length=2048)
    with pytest.raises(ConfigError, match="dropout"):
        make_plan(config, arch)
    make_plan(replace(config, task="labeler"), arch)


def test_experts_are_cut_as_far_as_they_have_to_be() -> None:
    arch = shape_of(MIXTRAL)
    config = PlanConfig(model=MIXTRAL, gpus=64, gpu_memory_gb=80, seq_length=4096, global_batch_size=256)
    found, plan = make_plan(config, arch)
    assert plan.layout.ep * plan.layout.pp > 1
    assert found.expert_model_parallel_size == plan.layout.ep
    assert f"  model.expert_model_parallel_size={plan.layout.ep}" in report(found, plan)
    _, alone = make_plan(replace(config, gpu_memory_gb=2000), arch)
    assert (alone.layout.ep, alone.layout.pp) == (1, 1)
    asked = replace(config, expert_model_parallel_size=8, expert_tensor_parallel_size=1, tensor_model_parallel_size=4)
    _, plan = make_plan(asked, arch)
    assert (plan.layout.ep, plan.layout.expert_tp, plan.layout.sequence_parallel) == (8, 1, True)
    assert plan.layout.expert_dp * 8 * plan.layout.pp == 64
    with pytest.raises(LaunchError, match="32 layers of 8 experts cannot be cut"):
        make_plan(replace(config, expert_model_parallel_size=3), arch)
    _, drawn = make_plan(replace(asked, task="actor", seq_length=2048), arch)
    assert drawn.memory.phases["rollouts"]["experts gathered"] > drawn.memory.weights / 2


@pytest.mark.parametrize(("task", "model"), [("sft", MODEL), ("sampler", MIXTRAL)])
def test_sizes_of_experts_are_refused_where_there_is_nothing_to_cut(task: str, model: str) -> None:
    config = PlanConfig(model=model, gpus=8, gpu_memory_gb=800, task=task, seq_length=2048)
    make_plan(config, shape_of(model))
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        with pytest.raises(ConfigError, match=name):
            make_plan(replace(config, **{name: 2}), shape_of(model))


def test_work_is_done_twice_only_where_it_has_to_be() -> None:
    arch, config = shape_of(MODEL), PlanConfig(MODEL, 8, 80, seq_length=4096, micro_batch_size=4)
    roomy, _ = make_plan(config, arch)
    tight, plan = make_plan(replace(config, gpu_memory_gb=36), arch)
    assert roomy.activations_checkpoint_granularity == "none"
    assert plan.memory.peak <= 30 * 2**30
    assert tight.activations_checkpoint_granularity == "full"


def test_as_many_responses_are_decoded_at_once_as_there_is_room_for() -> None:
    arch = shape_of(MODEL)
    config = PlanConfig(model=MODEL, gpus=1, gpu_memory_gb=80, task="sampler", seq_length=4096, samples_per_prompt=2)
    found, plan = make_plan(config, arch)
    assert found.prompts_in_flight is not None
    assert plan.work.slots < 256
    with pytest.raises(LaunchError, match="nothing fits"):
        make_plan(replace(config, prompts_in_flight=2 * found.prompts_in_flight), arch)
