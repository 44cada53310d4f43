"""Every recipe composes, is a config of its script, and fits where it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.commands.plan import shape_of
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.load import load_config
from nemo_aligner.config.offline import LabelerConfig, SamplerConfig
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.serving import ServerConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig
from nemo_aligner.errors import ConfigError
from nemo_aligner.planning.config import PlanConfig, of_run
from nemo_aligner.planning.plan import make_plan
from nemo_aligner.planning.tasks import TASKS, overrides, task_of

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path.stem for path in (ROOT / "conf/recipes").glob("*.yaml"))
NEEDED: dict[str, tuple[type, tuple[str, ...]]] = {
    "sft": (SFTConfig, ("model.restore_from_path=a", "model.data.train_ds.file_path=b")),
    "rm": (RMConfig, ("pretrained_checkpoint.restore_from_path=a", "model.data.data_prefix=[b]")),
    "actor": (ReinforceConfig, ("pretrained_checkpoint.restore_from_path=a", "model.data.data_prefix=[b]")),
    "sampler": (SamplerConfig, ("gpt_model_file=a", "data.file_names=[b]", "output_file=c")),
    "labeler": (LabelerConfig, ("gpt_model_file=a", "data.file_names=[b]", "output_file=c")),
    "server": (ServerConfig, ("rm_model_file=a",)),
}


def composed(task: str, *arguments: str) -> DictConfig:
    """What the task's script would run with."""
    script = ROOT / "examples/nlp/gpt" / TASKS[task].script
    command = [sys.executable, str(script), *arguments, *NEEDED[task][1], "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    config = OmegaConf.create(done.stdout)
    assert isinstance(config, DictConfig)
    assert task_of(config) == task
    load_config(config, NEEDED[task][0])
    return config


def shape(model: str) -> Architecture:
    return shape_of(str(ROOT / f"conf/model/{model}.yaml"))


@pytest.mark.processes
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_fits_where_it_says(recipe: str) -> None:
    model, _, task = recipe.rpartition("_")
    config = composed(task, f"+recipes={recipe}")
    arch = shape(model)
    nodes = 8 if "70b" in recipe and task != "server" else 1
    says = (ROOT / f"conf/recipes/{recipe}.yaml").read_text().splitlines()[1]
    assert {1: "one node", 8: "eight nodes"}[nodes] + " of eight 80 GB GPUs" in says
    sizes = of_run(PlanConfig(model=model, gpu_memory_gb=80, run="r"), config, arch)
    _, plan = make_plan(sizes, arch)
    assert plan.memory.peak < 74 * 2**30
    assert plan.layout.tp * plan.layout.pp * plan.layout.dp == 8 * nodes


def test_both_sizes_have_a_recipe_for_every_stage() -> None:
    assert sorted(f"llama3_{size}_{task}" for size in ("8b", "70b") for task in TASKS) == RECIPES


@pytest.mark.processes
@pytest.mark.parametrize("task", TASKS)
def test_the_overrides_of_a_plan_are_those_of_its_script(task: str) -> None:
    length = {} if task == "server" else {"seq_length": 2048}  # a server takes what the model takes
    asked = PlanConfig(model="m", gpu_memory_gb=80, gpus=8, task=task, **length)
    config, plan = make_plan(asked, shape("llama3_8b"))
    sizes = {**vars(config), "num_nodes": 1, "devices": 8}
    sizes["activations_checkpoint_granularity"] = plan.layout.granularity
    found = of_run(
        PlanConfig(model="m", gpu_memory_gb=80, run="r"), composed(task, *overrides(sizes, TASKS[task])), plan.arch
    )
    _, same = make_plan(found, plan.arch)
    assert same == plan


def test_a_run_whose_memory_is_not_counted_is_refused() -> None:
    for key, value in (("context_parallel_size", 2), ("peft.peft_scheme", "lora")):
        run = OmegaConf.create({"trainer": {"sft": {}}, "model": {}})
        OmegaConf.update(run, f"model.{key}", value)
        with pytest.raises(ConfigError, match=f"run: {value} in model.{key}, whose memory is not counted here"):
            of_run(PlanConfig(model="m", gpu_memory_gb=80, run="r"), run, shape("llama3_8b"))


@pytest.mark.processes
def test_a_run_is_checked_as_the_guide_says() -> None:
    [block] = [part for part in (ROOT / "docs/scaling.md").read_text().split("```") if "run=/dev/stdin" in part]
    command = block.removeprefix("bash\n").replace("python ", f"{sys.executable} ")
    for memory, said in (("80", "at most at once"), ("40", "error: nothing fits: the layout that takes least")):
        own = ["bash", "-c", command.replace("gpu_memory_gb=80", f"gpu_memory_gb={memory}")]
        done = subprocess.run(own, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert said in done.stdout + done.stderr
        assert done.returncode == (0 if memory == "80" else 1)
