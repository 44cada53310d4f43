"""Every fault of a config is one line with the full key; every shipped YAML equals its dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import MISSING, DictConfig, OmegaConf

from nemo_aligner.config.aliases import REINFORCE, SERVING, let_through
from nemo_aligner.config.aliases import TRAINING as OPTIMIZER
from nemo_aligner.config.entry import SharedConf
from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.config.load import _unescape_texts, load_config
from nemo_aligner.config.offline import LabelerConfig, SamplerConfig
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.resolvers import register_resolvers
from nemo_aligner.config.serving import ServerConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig
from nemo_aligner.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3] / "examples" / "nlp" / "gpt"
SHIPPED = {
    "offline/conf/megatron_random_sampler": SamplerConfig,
    "offline/conf/megatron_reward_labeler": LabelerConfig,
    "offline/conf/evaluate_policy": EvaluationConfig,
    "conf/gpt_sft": SFTConfig,
    "conf/training_rm": RMConfig,
    "conf/gpt_rs_actor": ReinforceConfig,
    "conf/gpt_reinforce_actor": ReinforceConfig,
    "conf/inference_rm": ServerConfig,
    "conf/megatron_gpt_inference": GenerationConfig,
}
SAMPLER = ["gpt_model_file=m.nemo", "output_file=o.jsonl", "data.file_names=[p.jsonl]"]


def composed(name: str, overrides: list[str]) -> DictConfig:
    register_resolvers()
    GlobalHydra.instance().clear()
    path = ROOT / name
    with initialize_config_dir(str(path.parent), version_base=None):
        return compose(path.name, overrides)


def load_sampler(*overrides: str) -> SamplerConfig:
    return load_config(composed("offline/conf/megatron_random_sampler", [*SAMPLER, *overrides]), SamplerConfig)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in leaves(inner, f"{path}{name}.").items()}
    return {path[:-1]: value}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_yaml_is_known_and_every_known_key_is_in_it(name: str) -> None:
    cfg = OmegaConf.to_container(composed(name, []), resolve=False)
    schema = OmegaConf.to_container(OmegaConf.structured(SHIPPED[name]), resolve=False)
    assert isinstance(cfg, dict)
    assert isinstance(schema, dict)
    found = {key for key in leaves(cfg) if not key.startswith("model.optim.sched.")}
    optional = {"model.optim.sched", "model.data.validation_ds"}
    known = {key for key in leaves(schema) if key not in optional}
    inert = {"trainer.logger", "trainer.enable_checkpointing", "trainer.use_distributed_sampler", "trainer.max_time"}
    assert {key for key in found if not key.startswith("model.data.validation_ds.")} == known - (
        inert if name.startswith("offline") else set()
    )


@pytest.mark.parametrize("name", list(SHIPPED)[:2])
def test_yaml_defaults_and_dataclass_defaults_agree(name: str) -> None:
    yaml = leaves(OmegaConf.to_container(composed(name, []), resolve=False))  # type: ignore[arg-type]
    schema = leaves(OmegaConf.to_container(OmegaConf.structured(SHIPPED[name]), resolve=False))  # type: ignore[arg-type]
    allowed = {"data.max_seq_length", "data.add_eos"}  # the two scripts share the dataclass, not these defaults
    differ = {key for key, value in yaml.items() if schema[key] != value and value != MISSING} - allowed
    assert differ == set()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++inference.temprature=0.5", "inference.temprature: no such key, did you mean inference.temperature"),
        ("data.n=many", "data.n: Value 'many' of type 'str' could not be converted to Integer"),
        ("++data.n=[1]", "data.n: "),
        ("data.file_names=???", "data.file_names: required, but not given"),
        ("data.n=0", "data.n: 0 is below 1"),
        ("inference.temperature=0", "inference.temperature: 0.0 is not a number from 1e-05 on; for the likeliest"),
        ("inference.temperature=1e-40", "inference.temperature: 1e-40 is not a number from 1e-05 on"),
        ("inference.temperature=nan", "inference.temperature: nan is not a number"),
        ("inference.temperature=inf", "inference.temperature: inf is not a number"),
        ("inference.top_p=1.5", "inference.top_p: 1.5 is not between 0 and 1"),
        ("data.micro_batch_size=0", "data.micro_batch_size: 0 is below 1"),
        ("data.file_names=a.jsonl", "data.file_names: a list is needed, data.file_names=[a.jsonl]"),
        ("trainer.precision=16", "trainer.precision: '16' is not one of"),
    ],
)
def test_a_fault_is_one_line_with_the_full_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sampler(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["data.prompt_template", "trainer.precision", "seed"])
def test_a_reference_that_leads_nowhere_is_named_by_the_key_that_has_it(override: str) -> None:
    cfg = composed("offline/conf/megatron_random_sampler", SAMPLER)
    OmegaConf.update(cfg, override, "${nowhere}")
    with pytest.raises(ConfigError) as caught:
        load_config(cfg, SamplerConfig)
    assert str(caught.value) == f"{override}: Interpolation key 'nowhere' not found"


def test_several_wrong_values_are_named_at_once_and_the_callers_config_stays_as_it_is() -> None:
    cfg = composed("offline/conf/megatron_random_sampler", [*SAMPLER, "data.n=many", "data.micro_batch_size=few"])
    before = OmegaConf.to_yaml(cfg)
    with pytest.raises(ConfigError) as caught:
        load_config(cfg, SamplerConfig)
    first, second = str(caught.value).split("; ")
    assert sorted([first.partition(":")[0], second.partition(":")[0]]) == ["data.micro_batch_size", "data.n"]
    assert OmegaConf.to_yaml(cfg) == before


def test_missing_values_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(composed("offline/conf/megatron_random_sampler", []), SamplerConfig)
    missing = ("data.file_names", "gpt_model_file", "output_file")
    assert str(caught.value) == "; ".join(f"{key}: required, but not given" for key in missing)


def test_all_unknown_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_sampler("++data.nn=1", "++inference.topp=1")
    assert "data.nn: no such key" in str(caught.value)
    assert "inference.topp: no such key" in str(caught.value)


def test_deleting_the_schedule_means_a_constant_rate() -> None:
    cfg = composed("conf/gpt_sft", ["model.restore_from_path=m", "~model.optim.sched"])
    assert load_config(cfg, SFTConfig).model.optim.sched is None


@pytest.mark.parametrize("written", ["${multiply:1e-6,1.001}", r"\${multiply:1e-6,1.001}"])
def test_a_learning_rate_may_be_a_product_in_both_quotings(written: str) -> None:
    cfg = composed("conf/gpt_sft", ["model.restore_from_path=m", f'model.optim.lr="{written}"'])
    assert load_config(cfg, SFTConfig).model.optim.lr == pytest.approx(1.001e-6)


def test_what_is_quoted_once_too_often_is_taken_as_meant_at_any_depth() -> None:
    cfg = composed("offline/conf/megatron_random_sampler", SAMPLER)
    cfg.inference.end_strings, cfg.data.file_names = ["a", r"\${data.input_key}"], [r"\${output_file}", "b"]
    cfg.data.prompt_template = r"\{input}"
    found = load_config(cfg, SamplerConfig)
    assert found.inference.end_strings == ["a", "input"]
    assert found.data.file_names == ["o.jsonl", "b"]
    assert found.data.prompt_template == r"\{input}"


def test_a_whole_number_may_stand_where_a_decimal_is_meant() -> None:
    assert load_sampler("inference.temperature=1").inference.temperature == 1.0


@pytest.mark.parametrize("block", ["trainer", "optim"])
def test_every_shared_group_fits_the_scripts(block: str) -> None:
    Plugins.instance().register(SharedConf)
    at = {"trainer": "trainer", "optim": "optim@model.optim"}[block]
    options = sorted(path.stem for path in (ROOT.parents[2] / "conf" / block).glob("*.yaml"))
    assert len(options) >= 2
    for option in options:
        cfg = load_config(composed("conf/gpt_sft", ["model.restore_from_path=m", f"+{at}={option}"]), SFTConfig)
        chosen = OmegaConf.load(ROOT.parents[2] / "conf" / block / f"{option}.yaml")
        holder = cfg.trainer if block == "trainer" else cfg.model.optim
        assert all(getattr(holder, key) == value for key, value in chosen.items() if key != "sched")


ACTOR = ["pretrained_checkpoint.restore_from_path=m", "model.data.data_prefix={train: [p.jsonl]}"]


def load_actor(*overrides: str) -> ReinforceConfig:
    given = let_through([*ACTOR, *overrides], REINFORCE)
    return load_config(composed("conf/gpt_rs_actor", given), ReinforceConfig, REINFORCE)


def test_older_names_mean_the_keys_of_today_and_win_over_their_defaults() -> None:
    cfg = load_actor(
        "trainer.reinforce.max_steps=7",
        "trainer.reinforce.num_rollouts_per_prompt=3",
        "model.reinforce.num_rollout_samples=5",
        "remote_rm.reward_model.port=99",
        "trainer.reinforce.use_absolute_kl=True",
    )
    assert (cfg.trainer.ppo.max_steps, cfg.model.ppo.num_rollout_per_prompt) == (7, 3)
    assert (cfg.model.ppo.num_rollout_samples, cfg.remote_critic_rm.reward_model.port) == (5, 99)
    assert cfg.model.ppo.num_val_samples == 5, "what follows another key follows it under either name"
    assert cfg.trainer.ppo.estimator == "abs"
    assert load_actor().trainer.ppo.estimator == "k1"


def test_megatrons_names_of_what_ranks_do_beside_the_passes_are_taken_by_every_training_script() -> None:
    asked = ["model.optim.overlap_grad_reduce=True", "model.optim.overlap_param_gather=True"]
    sft = composed("conf/gpt_sft", let_through(["model.restore_from_path=m", *asked], OPTIMIZER))
    for optim in (load_config(sft, SFTConfig, OPTIMIZER).model.optim, load_actor(*asked).model.optim):
        assert (optim.overlap_grad_sync, optim.overlap_param_sync) == (True, True)


def test_adams_state_is_offloaded_by_either_key() -> None:
    for overrides, offloaded in (
        ([], False),
        (["model.optim.cpu_offload=True"], True),
        (["model.ppo.offload_adam_states=True"], True),
    ):
        assert load_actor(*overrides).optim.cpu_offload == offloaded


def test_the_guides_name_of_the_servers_batch_size_is_taken() -> None:
    for name in ("trainer.rs.inference_micro_batch_size", "inference.micro_batch_size"):
        overrides = let_through(["rm_model_file=m", f"{name}=17"], SERVING)
        cfg = load_config(composed("conf/inference_rm", overrides), ServerConfig, SERVING)
        assert cfg.inference.inference_micro_batch_size == 17


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.ppo.baseline=RLO", "trainer.ppo.baseline: 'RLO' is not one of RLOO, ReMax, none"),
        ("trainer.ppo.kl_estimator=k9", "trainer.ppo.kl_estimator: 'k9' is not one of"),
        ("trainer.ppo.initial_policy_kl_penalty=-1", "trainer.ppo.initial_policy_kl_penalty: -1.0 is below 0"),
        ("model.ppo.num_rollout_per_prompt=1", "model.ppo.num_rollout_per_prompt: RLOO compares"),
        ("model.ppo.sampling_params.top_p=2", "model.ppo.sampling_params.top_p: 2.0 is not between 0 and 1"),
        (
            "model.ppo.sampling_params.temperature=0",
            "model.ppo.sampling_params.temperature: 0.0 is not a number from 1e-05 on",
        ),
        ("++trainer.ppo.trt_llm={enable: True}", "trainer.ppo.trt_llm.enable: there is no such thing here"),
        ("++trainer.reinforce.max_stepz=1", "trainer.ppo.max_stepz: no such key, did you mean trainer.ppo.max_steps"),
    ],
)
def test_a_fault_of_the_actors_config_is_one_line_with_the_full_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_actor(override)
    assert str(caught.value).startswith(message)


def templates_in(block: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Full key, block and name of every template of a config; Jinja's have escapes of their own."""
    for own in dataclasses.fields(block):
        value = getattr(block, own.name)
        if dataclasses.is_dataclass(value):
            yield from templates_in(value, f"{prefix}{own.name}.")
        elif own.name.endswith("_template") and own.name != "chat_template":
            yield f"{prefix}{own.name}", block, own.name


@pytest.mark.parametrize("schema", [SamplerConfig, LabelerConfig, EvaluationConfig, SFTConfig, RMConfig])
def test_every_template_of_a_config_has_its_escapes_read(schema: Any) -> None:
    cfg = schema()
    for _, block, name in templates_in(cfg):
        setattr(block, name, r"A\nB")
    _unescape_texts(cfg)
    read = {key: getattr(block, name) for key, block, name in templates_in(cfg)}
    assert set(read.values()) == {"A\nB"}, read


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"A: {input}\n\tB", "A: {input}\n\tB"), (r"a\\n{input}", r"a\n{input}"), (r"\d{input}", r"\d{input}")],
)
def test_escapes_of_templates_and_end_strings_become_what_they_mean(typed: str, meant: str) -> None:
    cfg = composed("offline/conf/megatron_random_sampler", SAMPLER)
    cfg.data.prompt_template, cfg.inference.end_strings = typed, [typed, "x"]
    found = load_config(cfg, SamplerConfig)
    assert found.data.prompt_template == meant
    assert found.inference.end_strings == [meant, "x"]
    labeler = composed("offline/conf/megatron_reward_labeler", SAMPLER)
    labeler.reward_template = typed
    assert load_config(labeler, LabelerConfig).reward_template == meant
    sft = composed("conf/gpt_sft", ["model.restore_from_path=m.nemo"])
    sft.model.data.train_ds.prompt_template = typed
    assert load_config(sft, SFTConfig).model.data.train_ds.prompt_template == meant


@pytest.mark.parametrize("name", ["conf/gpt_sft", "conf/training_rm", "conf/gpt_rs_actor"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=nan", "nan is not a number from 0 on"),
        ("lr=-1", "-1.0 is not a number from 0 on"),
        ("lr=inf", "inf is not a number from 0 on"),
        ("eps=-1e-8", "-1e-08 is not a number from 0 on"),
        ("weight_decay=nan", "nan is not a number from 0 on"),
        ("betas=[0.9,0.9,0.9]", r"[0.9, 0.9, 0.9] are not two numbers from 0 to below 1"),
        ("betas=[0.9]", "[0.9] are not two numbers"),
        ("betas=[0.9,1.0]", "[0.9, 1.0] are not two numbers from 0 to below 1"),
        ("bucket_cap_mb=0", "0.0 is not above 0"),
    ],
)
def test_a_number_that_no_optimizer_takes_is_refused(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(composed(name, [*TRAINING[name], f"model.optim.{override}"]), SHIPPED[name])
    assert str(caught.value).startswith(f"model.optim.{override.partition('=')[0]}: {message}")


TRAINING = {
    "conf/gpt_sft": ["model.restore_from_path=m"],
    "conf/training_rm": ["pretrained_checkpoint.restore_from_path=m", "model.data.data_prefix={train: [p]}"],
    "conf/gpt_rs_actor": ACTOR,
}


COUNTS = {
    "conf/gpt_rs_actor": (
        "model.micro_batch_size", "model.global_batch_size", "model.ppo.num_rollout_samples",
        "model.ppo.num_rollout_per_prompt", "model.ppo.rollout_micro_batch_size", "model.ppo.forward_micro_batch_size",
        "model.ppo.val_rollout_micro_batch_size", "model.ppo.num_val_samples", "model.ppo.length_params.max_length",
        "trainer.ppo.max_epochs", "trainer.ppo.val_check_interval",
    ),
    "conf/gpt_sft": (
        "model.data.train_ds.micro_batch_size", "model.data.train_ds.global_batch_size",
        "model.data.train_ds.max_seq_length", "trainer.sft.max_epochs", "trainer.devices", "trainer.num_nodes",
    ),
    "conf/training_rm": (
        "model.micro_batch_size", "model.global_batch_size", "model.data.seq_length", "trainer.rm.max_epochs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in COUNTS.items() for key in keys])
def test_what_is_counted_is_1_at_least(name: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(composed(name, [*TRAINING[name], f"{key}=0"]), SHIPPED[name])
    assert str(caught.value) == f"{key}: 0 is below 1"
    load_config(composed(name, [*TRAINING[name], f"{key}=2"]), SHIPPED[name])


@pytest.mark.parametrize("script", ["megatron_random_sampler", "megatron_reward_labeler"])
def test_progress_is_written_every_micro_batch_at_the_most(script: str) -> None:
    name = f"offline/conf/{script}"
    for interval in ("1", "null"):
        load_config(composed(name, [*SAMPLER, f"checkpoint_interval={interval}"]), SHIPPED[name])
    with pytest.raises(ConfigError, match=r"^checkpoint_interval: 0 is below 1$"):
        load_config(composed(name, [*SAMPLER, "checkpoint_interval=0"]), SHIPPED[name])
