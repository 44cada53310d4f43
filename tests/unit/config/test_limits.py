"""The least and the greatest value of a key are taken, and what lies beyond is refused by its name."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

from nemo_aligner.config.load import load_config
from nemo_aligner.config.reinforce import ReinforceLoopConfig
from nemo_aligner.config.schema import RewardStandardization
from nemo_aligner.errors import ConfigError
from tests.unit.config.test_fixed import REQUIRED
from tests.unit.config.test_load import SHIPPED, composed

SAMPLER, LABELER, EVALUATION = (
    f"offline/conf/{name}" for name in ("megatron_random_sampler", "megatron_reward_labeler", "evaluate_policy")
)
SERVER, EVAL = "conf/inference_rm", "conf/megatron_gpt_inference"
SFT, RM, ACTOR = "conf/gpt_sft", "conf/training_rm", "conf/gpt_rs_actor"


@functools.cache
def loaded(name: str) -> Any:
    return load_config(composed(name, REQUIRED[name]), SHIPPED[name])


@pytest.mark.parametrize(
    ("name", "key", "fine", "wrong"),
    [
        (SAMPLER, "data.n", [1], [0]),
        (SAMPLER, "data.micro_batch_size", [1], [0]),
        (SAMPLER, "data.max_seq_length", [1], [0]),
        (SAMPLER, "data.num_samples", [None, 1], [0]),
        (SAMPLER, "data.sample_split_size", [None, 1], [0]),
        (SAMPLER, "data.sample_split_iter", [0], [-1]),
        (SAMPLER, "checkpoint_interval", [None, 1], [0]),
        (SAMPLER, "inference.temperature", [1e-5], [0.9e-5, 0.0, -1.0]),
        (SAMPLER, "inference.top_p", [0.0, 1.0], [-0.1, 1.1]),
        (SAMPLER, "inference.top_k", [0], [-1]),
        (SAMPLER, "inference.repetition_penalty", [0.01, 1.2, 100.0], [0.0, -1.0, 1e-39, 101.0]),
        (SAMPLER, "inference.tokens_to_generate", [1], [0]),
        (SAMPLER, "inference.min_tokens_to_generate", [0, 30], [-1, 31]),
        (SAMPLER, "inference.max_batch_slots", [None, 1], [0]),
        (SAMPLER, "trainer.devices", [1], [0]),
        (SAMPLER, "trainer.num_nodes", [1], [0]),
        (SAMPLER, "trainer.precision", ["32", "32-true", "bf16", "bf16-mixed", "bf16-true"], ["16", "64"]),
        (LABELER, "checkpoint_interval", [None, 1], [0]),
        (LABELER, "data.micro_batch_size", [1], [0]),
        (LABELER, "trainer.devices", [1], [0]),
        (EVALUATION, "policy_files", [["a/m.nemo"], ["a/m.nemo", "a/n.nemo"]], [[], ["a/m.nemo", "b/m.nemo"]]),
        (EVALUATION, "policy_files", [["m/a/", "m/b/"], ["m/L-3.1", "m/L-3.2"]], [["a/m.nemo", "b/m"], ["m/", "m"]]),
        (EVALUATION, "data.n", [1], [0]),
        (EVALUATION, "data.sample_split_size", [None], [8]),
        (EVALUATION, "data.sample_split_iter", [0], [1]),
        (EVALUATION, "data.export_metadata", [False], [True]),
        (EVALUATION, "data.export_tokens", [False], [True]),
        (EVALUATION, "checkpoint_interval", [None], [4]),
        (EVALUATION, "max_time_per_run", [None], ["00:01:00"]),
        (EVALUATION, "export_reward", [False], [True]),
        (EVALUATION, "data.max_seq_length", [1], [0]),
        (SFT, "model.micro_batch_tokens", [None, 1], [0]),
        (RM, "model.micro_batch_tokens", [None, 1], [0]),
        (ACTOR, "model.micro_batch_tokens", [None, 1], [0]),
        (SFT, "model.data.validation_ds.micro_batch_size", [1], [0]),
        (SFT, "model.data.validation_ds.global_batch_size", [1], [0]),
        (SFT, "model.data.validation_ds.max_seq_length", [1], [0]),
        (SFT, "model.data.train_ds.truncation_method", ["right", "left"], ["middle", "", "Right"]),
        (SFT, "model.data.validation_ds.truncation_method", ["right", "left"], ["middle"]),
        (SFT, "model.optim.lr", [0.0], [-1e-9]),
        (ACTOR, "trainer.ppo.val_check_interval", [1], [0]),
        (ACTOR, "trainer.ppo.keep_rollouts", [0], [-1]),
        (ACTOR, "trainer.ppo.initial_policy_kl_penalty", [0.0], [-0.1]),
        (ACTOR, "trainer.ppo.max_kl", [None, 1e-6], [0.0, -1.0, float("nan"), float("inf")]),
        (ACTOR, "trainer.ppo.kl_target", [None, 1e-6], [0.0, -1.0, float("nan"), float("inf")]),
        (ACTOR, "trainer.ppo.kl_horizon", [10_000], [0, -1, 9_999]),
        (ACTOR, "trainer.ppo.reward_clip_range", [None, [-1.0, 1.0]], [[], [1.0], [1.0, 1.0], [2.0, 1.0, 3.0]]),
        (ACTOR, "trainer.ppo.reward_clip_range", [[float("-inf"), 5.0]], [[float("nan"), 1.0], [1.0, float("nan")]]),
        (ACTOR, "trainer.ppo.overlong_buffer_length", [None], [0, -1, 8]),
        (ACTOR, "trainer.ppo.overlong_buffer_penalty", [1.0], [-1.0, float("nan"), float("inf"), 2.0]),
        (ACTOR, "trainer.ppo.kl_reduction", ["sum", "mean"], ["max"]),
        (ACTOR, "trainer.ppo.unfinished", ["keep", "mask"], ["drop"]),
        (ACTOR, "model.ppo.length_params.min_length", [0], [-1]),
        (ACTOR, "model.ppo.length_params.max_length", [None, 1], [0]),
        (ACTOR, "model.ppo.num_rollout_per_prompt", [2], [1, 0]),
        (ACTOR, "model.ppo.sampling_params.use_greedy", [False], [True]),
        (SERVER, "inference.inference_micro_batch_size", [1], [0]),
        (SERVER, "inference.max_batch_size", [1], [0]),
        (SERVER, "inference.max_text_bytes", [1], [0]),
        (SERVER, "inference.max_request_bytes", [1], [0]),
        (SERVER, "inference.max_concurrent_requests", [1], [0]),
        (ACTOR, "remote_critic_rm.reward_model.port", [1, 65535], [0, 65536]),
        (ACTOR, "remote_critic_rm.init_timeout_s", [0.0], [-1.0, float("nan"), float("inf")]),
        (ACTOR, "remote_critic_rm.inference_timeout_s", [0.0], [-1.0, float("nan"), float("inf")]),
        (SFT, "model.optim.name", ["adamw", "distributed_fused_adam"], ["sgd"]),
        (SFT, "model.activations_checkpoint_granularity", [None, "selective"], ["some"]),
        (SFT, "model.activations_checkpoint_method", [None], ["uniform", "block", "nonsense"]),
        (SFT, "model.activations_checkpoint_num_layers", [None], [1, -3]),
        (SFT, "model.precision", [None, "bf16", "bf16-mixed", "bf16-true"], ["32", "32-true", "16", "banana"]),
        (SERVER, "model.precision", [None, "bf16", "bf16-mixed", "bf16-true"], ["32", "32-true", "16", "banana"]),
        (ACTOR, "model.hidden_dropout", [None, 0.0, 0.99], [-0.5, 1.0, 1.5, float("nan")]),
        (RM, "model.attention_dropout", [None, 0.0, 0.99], [-0.5, 1.0, 1.5, float("nan")]),
        (SFT, "model.encoder_seq_length", [None, 1], [0, -4]),
        (SFT, "trainer.accelerator", ["auto", "gpu", "cpu"], ["tpu"]),
        (SERVER, "inference.max_queue_delay_microseconds", [0], [-1]),
        (SERVER, "inference.port", [1, 65535], [0, 65536]),
        (EVAL, "port", [1, 65535], [0, 65536]),
        (EVAL, "web_port", [1, 65535], [0, 65536]),
        (EVAL, "expert_model_parallel_size", [1, 0, -1], [2]),
        (EVAL, "context_parallel_size", [1], [2]),
        (EVAL, "inference.tokens_to_generate", [1], [0]),
        (EVAL, "inference.max_concurrent_requests", [1], [0]),
        (EVAL, "trainer.devices", [1], [0]),
        (EVAL, "hparams_file", [None], ["x"]),
        (EVAL, "checkpoint_name", [None], ["x"]),
        (EVAL, "pipeline_model_parallel_split_rank", [None, 0], [2]),
        (EVAL, "share", [False], [True]),
        (EVAL, "checkpoint_dir", [None], ["x"]),
        (EVAL, "inference.all_probs", [False], [True]),
        (EVAL, "web_server", [False], [True]),
    ],
)
def test_the_limits_of_a_key_belong_to_it(name: str, key: str, fine: list[Any], wrong: list[Any]) -> None:
    def check(value: Any) -> None:
        cfg = copy.deepcopy(loaded(name))
        *path, last = key.split(".")
        setattr(functools.reduce(getattr, path, cfg), last, value)
        cfg.validate()

    for value in fine:
        check(value)
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            check(value)
        named, _, said = str(caught.value).partition(": ")
        assert named == key
        assert len(said.split()) > 2, "and it says why"


@pytest.mark.parametrize("name", [RM, ACTOR])
def test_files_are_those_of_a_split_that_is_read_in_a_form_that_is_read(name: str) -> None:
    key, files = "model.data.data_prefix", ["p", ["p"], [1, "p", 0.5, "q"], [], None]
    test_the_limits_of_a_key_belong_to_it(name, "model.data.data_impl", ["jsonl", "json"], ["mmap"])
    test_the_limits_of_a_key_belong_to_it(name, key, [*files, *({"train": f, "test": f} for f in files)], [])
    for given, named, said in (
        ({"train": ["p"], "val": ["p"]}, f"{key}.val", "no such key; one of train, validation, test"),
        ({"train": ["p"], "valid": None}, f"{key}.valid", "no such key"),
        (5, f"{key}.train", "5 is neither [file] nor [weight, file"),
        ({"train": 5}, f"{key}.train", "5 is neither"),
        ({"train": ["p"], "validation": {"p": 1}}, f"{key}.validation", "{'p': 1} is neither"),
    ):
        cfg = copy.deepcopy(loaded(name))
        cfg.model.data.data_prefix = given
        with pytest.raises(ConfigError) as caught:
            cfg.validate()
        assert str(caught.value).startswith(f"{named}: {said}")


LOOPS = [
    (SFT, "trainer.sft", ["all", "supervised"]),
    (RM, "trainer.rm", ["all", "supervised"]),
    (ACTOR, "trainer.ppo", ["all"]),
]


def test_a_response_may_be_as_long_as_it_has_to_be() -> None:
    def load(*lengths: int) -> None:
        both = zip(("min", "max"), lengths, strict=True)
        given = [f"model.ppo.length_params.{which}_length={length}" for which, length in both]
        load_config(composed(ACTOR, [*REQUIRED[ACTOR], *given]), SHIPPED[ACTOR])

    load(5, 5)
    said = r"^model\.ppo\.length_params\.min_length: 6 is above model\.ppo\.length_params\.max_length=5$"
    with pytest.raises(ConfigError, match=said):
        load(6, 5)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize(("absolute", "meant"), [(True, "abs"), (False, "k1"), (None, None)])
def test_the_older_switch_of_the_kl_does_not_contradict_its_estimator(
    absolute: bool | None, meant: str | None, estimator: str
) -> None:
    loop = ReinforceLoopConfig(kl_estimator=estimator, use_absolute_kl=absolute)
    if estimator in ("k1", meant) or meant is None:
        loop.validate()
        assert loop.estimator == (meant or estimator)
        return
    said = rf"^trainer\.ppo\.kl_estimator: {estimator} is not what trainer\.ppo\.use_absolute_kl={absolute} asks for"
    with pytest.raises(ConfigError, match=said):
        loop.validate()


@pytest.mark.parametrize(("name", "block", "of"), LOOPS)
@pytest.mark.parametrize(
    ("loops", "key", "fine", "wrong"),
    [
        ("all", "max_epochs", [1], [0, -1]),
        ("all", "max_steps", [-1, 1], [0, -2]),
        ("all", "save_interval", [0, 1], [-1]),
        ("all", "gradient_clip_val", [0.0, 1.0], [-1.0, float("nan")]),
        ("supervised", "val_check_interval", [0, 1, 100, 0.1, 1.0], [None, -5, 1.5, -0.1, True, "abc", float("nan")]),
        ("supervised", "limit_train_batches", [None, 1, 9, 0.1, 1.0], [0, 0.0, -1, 1.5, True, "abc", float("nan")]),
        ("supervised", "limit_val_batches", [None, 0, 0.0, 1, 0.1, 1.0], [-1, -0.5, 1.5, False, "abc", [1]]),
    ],
)
def test_the_limits_of_a_loop_are_those_of_every_training(
    name: str, block: str, of: list[str], loops: str, key: str, fine: list[Any], wrong: list[Any]
) -> None:
    if loops in of:
        test_the_limits_of_a_key_belong_to_it(name, f"{block}.{key}", fine, wrong)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prompts=null"], "^prompts: nothing to do"),
        (["prompts=[]"], "^prompts: nothing to do"),
        (["server=True", "web_server=True", "web_port=5555"], "^web_port: 5555 is port's too"),
        (
            ["server=True", "web_server=True", "inference.auth_token_file=token"],
            "^password: the page is a door too; give one where clients need a token$",
        ),
        (["username=me"], "^password: a username needs one"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], says: str) -> None:
    def load(*given: str) -> None:
        load_config(composed(EVAL, ["gpt_model_file=m", "prompts=[a]", *given]), SHIPPED[EVAL])

    with pytest.raises(ConfigError, match=says):
        load(*overrides)
    load("prompts=null", "prompts_jsonl=p")
    load("prompts=null", "server=True", "web_server=True")
    load("username=me", "password=secret")
    load("password=secret")


@pytest.mark.parametrize("block", ["model.reward_standardization", "reward_standardization"])
@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"mean": 1.0, "std": 2.0}, None),
        ({}, None),
        ({"mean": 1.0}, "std: give it too, or leave out both"),
        ({"std": 2.0}, "mean: give it too, or leave out both"),
        ({"mean": 1.0, "std": 0.0}, "std: 0.0 is not above 0"),
        ({"mean": 1.0, "std": -1.0}, "std: -1.0 is not above 0"),
    ],
)
def test_mean_and_std_of_rewards_come_together_with_the_switch_and_std_is_above_0(
    block: str, given: dict[str, float], fault: str | None
) -> None:
    standardization = RewardStandardization(enable=True, **given)
    if fault is None:
        standardization.validate(block)
    else:
        with pytest.raises(ConfigError) as caught:
            standardization.validate(block)
        assert str(caught.value) == f"{block}.{fault}"
    off = RewardStandardization(**given)
    if given:
        with pytest.raises(
            ConfigError, match=rf"^{block}\.{min(given)}: nothing is done with it without {block}\.enable"
        ):
            off.validate(block)
    else:
        off.validate(block)
    assert standardization.known((5.0, 6.0)) == ((1.0, given["std"]) if len(given) == 2 else (5.0, 6.0))


@pytest.mark.parametrize(("name", "block"), [(SERVER, "model."), (LABELER, "")])
def test_labeler_and_reward_server_check_their_standardisation(name: str, block: str) -> None:
    key = f"{block}reward_standardization"
    given = [*REQUIRED[name], "rm_model_file=m" if name == SERVER else "gpt_model_file=m"]
    load_config(composed(name, [*given, f"{key}={{enable: True, mean: 1.0, std: 2.0}}"]), SHIPPED[name])
    with pytest.raises(ConfigError, match=rf"^{key}\.std: give it too"):
        load_config(composed(name, [*given, f"{key}={{enable: True, mean: 1.0, std: null}}"]), SHIPPED[name])


@pytest.mark.parametrize("processor", ["null", "rs", "dt", "rest"])
def test_a_threshold_is_for_the_processor_that_has_one(processor: str) -> None:
    given = [*REQUIRED[LABELER], f"processor={processor}"]
    load_config(composed(LABELER, [*given, "threshold=0"]), SHIPPED[LABELER])
    if processor == "rest":
        load_config(composed(LABELER, [*given, "threshold=5"]), SHIPPED[LABELER])
        return
    with pytest.raises(ConfigError, match=f"^threshold: it is for processor=rest, not {processor}$"):
        load_config(composed(LABELER, [*given, "threshold=5"]), SHIPPED[LABELER])


@pytest.mark.parametrize("name", [SAMPLER, LABELER, EVALUATION])
@pytest.mark.parametrize(
    ("given", "key", "first"),
    [
        ("output_key=input", "output_key", "input_key"),
        ("input_key=output", "output_key", "input_key"),
        ("reward_key=output", "reward_key", "output_key"),
        ("reward_key=input", "reward_key", "input_key"),
    ],
)
def test_no_field_of_a_row_takes_the_place_of_another(name: str, given: str, key: str, first: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^data\.{key}: '\w+' is data\.{first} too; fields need names of their own$"
    ):
        load_config(composed(name, [*REQUIRED[name], f"data.{given}"]), SHIPPED[name])
    load_config(composed(name, [*REQUIRED[name], "data.input_key=output", "data.output_key=input"]), SHIPPED[name])


@pytest.mark.parametrize("name", [SAMPLER, LABELER])
def test_a_split_has_a_size(name: str) -> None:
    given = [*REQUIRED[name], "data.sample_split_iter=3"]
    load_config(composed(name, [*given, "data.sample_split_size=2"]), SHIPPED[name])
    with pytest.raises(
        ConfigError, match=r"^data\.sample_split_iter: nothing is done with it without data\.sample_spl"
    ):
        load_config(composed(name, given), SHIPPED[name])


def test_validation_has_batches_as_training_has_unless_it_says_otherwise() -> None:
    train = ["model.data.train_ds.micro_batch_size=5", "model.data.train_ds.global_batch_size=20"]
    own = "model.data.validation_ds.micro_batch_size=3"
    for more, sizes in (([], (5, 20)), ([own], (3, 20))):
        cfg: Any = load_config(composed(SFT, [*REQUIRED[SFT], *train, *more]), SHIPPED[SFT])
        held_out = cfg.model.data.validation_ds
        assert (held_out.micro_batch_size, held_out.global_batch_size) == sizes
