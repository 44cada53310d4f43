"""No key is passed over in silence: code reads it, or another value than its own is refused by its full name."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_aligner.config.aliases import REINFORCE, let_through
from nemo_aligner.config.load import load_config
from nemo_aligner.errors import ConfigError
from tests.unit.config.test_load import ACTOR, SAMPLER, SHIPPED, composed

PACKAGE = Path(__file__).resolve().parents[3] / "nemo_aligner"
REQUIRED = {
    "offline/conf/megatron_random_sampler": SAMPLER,
    "offline/conf/megatron_reward_labeler": SAMPLER,
    "offline/conf/evaluate_policy": [
        "policy_files=[m.nemo]", "reward_model_file=r.nemo", "output_file=o", "data.file_names=[p]"
    ],
    "conf/gpt_sft": ["model.restore_from_path=m"],
    "conf/training_rm": ["pretrained_checkpoint.restore_from_path=m", "model.data.data_prefix={train: [p.jsonl]}"],
    "conf/gpt_rs_actor": ACTOR,
    "conf/inference_rm": ["rm_model_file=m"],
    "conf/megatron_gpt_inference": ["gpt_model_file=m", "prompts=[a]"],
}  # fmt: skip
HANDED_ON = ("*.optim.sched", "exp_manager.*_logger_kwargs*", "exp_manager.create_*_logger", "*megatron_amp_O2")
"""Read by other names: whole blocks by the schedule and the loggers; the last by its check against the precision."""


def is_config(path: Path) -> bool:
    return path.parent.name == "config"


@functools.cache
def names_read() -> set[str]:
    """Attributes that code reads: anywhere outside config/, and in config/ but for its checks."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if is_config(path) else []
        checks = {
            inner for node in functions if "check" in node.name or node.name == "validate" for inner in ast.walk(node)
        }
        found |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in checks
        }
    return found


def keys(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(block):
        value, key = getattr(block, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{key}.")
        else:
            yield key, value


def another(value: Any) -> Any:
    """A value of the same type that the key does not have."""
    if isinstance(value, bool):
        return not value
    return 7 if value is None or isinstance(value, int) else f"{value}x"


@pytest.mark.timeout(300)  # the copy that mutants are made in has thirty times the code
@pytest.mark.parametrize("name", REQUIRED)
def test_a_key_that_no_code_reads_is_refused_unless_it_has_its_default(name: str) -> None:
    read, plain = names_read(), composed(name, REQUIRED[name])
    silent = []
    for key, value in keys(load_config(plain, SHIPPED[name])):
        if key.rpartition(".")[2] in read or any(fnmatch(key, pattern) for pattern in HANDED_ON):
            continue
        cfg = copy.deepcopy(plain)
        OmegaConf.update(cfg, key, another(value), force_add=True)
        try:
            load_config(cfg, SHIPPED[name])
            silent.append(key)
        except ConfigError as fault:
            if not str(fault).startswith(f"{key}: ") or "of type" in str(fault):
                silent.append(f"{key} ({fault})")
    assert silent == []


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("conf/gpt_sft", "model.gradient_as_bucket_view=False", "False is not offered"),
        ("conf/training_rm", "model.optim.contiguous_grad_buffer=False", "False is not offered"),
        ("conf/training_rm", "model.optim.contiguous_param_buffer=False", "False is not offered"),
        ("conf/gpt_sft", "trainer.use_distributed_sampler=True", "True is not offered"),
        ("conf/inference_rm", "trainer.enable_checkpointing=True", "True is not offered; set by exp_manager here"),
        ("conf/gpt_sft", "trainer.max_time=1", "'1' is not offered; not used here; give exp_manager.max_time_per_run"),
        ("conf/gpt_rs_actor", "remote_critic_rm.pad_to_length=8", "texts are sent, and nothing is padded"),
        ("conf/gpt_rs_actor", "model.ppo.sampling_params.all_probs=True", "True is not offered"),
        ("conf/gpt_rs_actor", "model.ppo.sampling_params.compute_logprob=True", "True is not offered"),
        ("conf/gpt_rs_actor", "model.data.num_workers=4", "4 is not offered; rows are read"),
        ("conf/training_rm", "model.data.num_workers=4", "4 is not offered; rows are read"),
        ("conf/gpt_sft", "model.data.num_workers=4", "4 is not offered; rows are read"),
        ("conf/gpt_sft", "model.data.validation_ds.memmap_workers=4", "4 is not offered; rows are read"),
        ("conf/gpt_sft", "model.data.train_ds.add_sep=True", "True is not offered; no tokenizer here has a separator"),
        ("offline/conf/megatron_random_sampler", "data.add_eos=True", "True is not offered; a prompt is continued"),
        ("conf/megatron_gpt_inference", "inference.all_probs=True", "True is not offered; the server's `logprobs`"),
        ("conf/megatron_gpt_inference", "share=True", "True is not offered; the page is not put on other people's"),
        ("conf/megatron_gpt_inference", "hparams_file=x", "'x' is not offered; give the .nemo archive"),
        ("conf/megatron_gpt_inference", "context_parallel_size=2", "2 is not offered; a model is cut by tensor"),
        ("conf/gpt_sft", "exp_manager.checkpoint_callback_params.model_parallel_size=2", "not the run's own"),
    ],
)
def test_another_value_of_a_fixed_key_is_one_line_that_says_what_to_do(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(composed(name, [*REQUIRED[name], override]), SHIPPED[name])
    assert str(caught.value).startswith(f"{override.partition('=')[0]}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["train_ds", "validation_ds"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("prompt_template={output}", "'{output}' is not offered; with model.data.chat the chat template is used"),
        ("truncation_field=x", "'x' is not offered; a conversation is cut at its end"),
        ("truncation_method=left", "'left' is not offered; a conversation is cut at its end"),
    ],
)
def test_what_is_for_plain_rows_is_refused_of_conversations(part: str, given: str, message: str) -> None:
    name, value = "conf/gpt_sft", given.partition("=")[2]
    key = f"model.data.{part}.{given.partition('=')[0]}"
    load_config(composed(name, [*REQUIRED[name], f"{key}='{value}'"]), SHIPPED[name])
    load_config(composed(name, [*REQUIRED[name], "model.data.chat=True"]), SHIPPED[name])
    with pytest.raises(ConfigError) as caught:
        load_config(composed(name, [*REQUIRED[name], "model.data.chat=True", f"{key}='{value}'"]), SHIPPED[name])
    assert str(caught.value).startswith(f"{key}: {message}")


def test_what_nemos_yamls_set_is_accepted() -> None:
    sizes = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]
    for name in ("conf/gpt_sft", "conf/training_rm", "conf/gpt_rs_actor"):
        given = ["model.data.num_workers=2", "exp_manager.checkpoint_callback_params.model_parallel_size=4", *sizes]
        load_config(composed(name, [*REQUIRED[name], *given]), SHIPPED[name])
    actor = [
        "model.encoder_seq_length=64", "remote_critic_rm.pad_to_length=64",
        "+trainer.ppo.trt_llm.enable=False", "+trainer.ppo.trt_llm.reshard=True",
        "+trainer.ppo.batch_iterator.use_flask=False", "+trainer.ppo.batch_iterator.port=5557",
    ]  # fmt: skip
    load_config(composed("conf/gpt_rs_actor", [*ACTOR, *actor]), SHIPPED["conf/gpt_rs_actor"])


@pytest.mark.parametrize(
    "override", ["trainer.ppo.trt_llm.enable=False", "trainer.reinforce.batch_iterator.use_flask=False"]
)
def test_keys_of_nemos_blocks_are_given_as_there(override: str) -> None:
    given = let_through([override], REINFORCE)
    load_config(composed("conf/gpt_rs_actor", [*ACTOR, *given]), SHIPPED["conf/gpt_rs_actor"], REINFORCE)


@pytest.mark.parametrize("block", ["trt_llm={}", "trt_llm={enabled: False}", "batch_iterator={use_flask: True}"])
def test_a_block_that_does_not_say_it_is_off_is_refused(block: str) -> None:
    with pytest.raises(ConfigError, match=r"^trainer.ppo.\w+.(enable|use_flask): there is no such thing here"):
        load_config(composed("conf/gpt_rs_actor", [*ACTOR, f"trainer.ppo.{block}"]), SHIPPED["conf/gpt_rs_actor"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("offline/conf/megatron_random_sampler", "megatron_amp_O2"),
        ("offline/conf/megatron_reward_labeler", "megatron_amp_O2"),
        ("conf/megatron_gpt_inference", "megatron_amp_O2"),
        ("conf/gpt_sft", "model.megatron_amp_O2"),
        ("conf/training_rm", "model.megatron_amp_O2"),
        ("conf/gpt_rs_actor", "model.megatron_amp_O2"),
    ],
)
def test_amp_o2_needs_bf16_which_always_has_it(name: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    def load(*overrides: str) -> Any:
        caplog.clear()
        return load_config(composed(name, [*REQUIRED[name], *overrides]), SHIPPED[name])

    caplog.set_level(logging.INFO)
    with pytest.raises(ConfigError, match=f"^{key}: True needs bf16, and the precision is 32"):
        load(f"{key}=True", "trainer.precision=32")
    load(f"{key}=True", "trainer.precision=bf16-mixed")
    assert key not in caplog.text
    load("trainer.precision=bf16-mixed")
    assert key not in caplog.text
    load(f"{key}=False", "trainer.precision=bf16-mixed")
    assert f"{key}=False: bf16 weights have fp32 master weights" in caplog.text
