"""The least and the greatest value of a key are taken, and what lies beyond is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_aligner.config.load import load_config
from nemo_aligner.errors import ConfigError
from tests.unit.config.test_fixed import REQUIRED
from tests.unit.config.test_load import SHIPPED, composed

SAMPLER, SERVER, EVAL = "offline/conf/megatron_random_sampler", "conf/inference_rm", "conf/megatron_gpt_inference"


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
        (SERVER, "inference.inference_micro_batch_size", [1], [0]),
        (SERVER, "inference.max_batch_size", [1], [0]),
        (SERVER, "inference.max_text_bytes", [1], [0]),
        (SERVER, "inference.max_queue_delay_microseconds", [0], [-1]),
        (SERVER, "inference.port", [1, 65535], [0, 65536]),
        (EVAL, "port", [1, 65535], [0, 65536]),
        (EVAL, "web_port", [1, 65535], [0, 65536]),
        (EVAL, "expert_model_parallel_size", [1, 0, -1], [2]),
        (EVAL, "context_parallel_size", [1], [2]),
        (EVAL, "pipeline_model_parallel_split_rank", [None, 0], [2]),
        (EVAL, "share", [False], [True]),
        (EVAL, "checkpoint_dir", [None], ["x"]),
        (EVAL, "inference.all_probs", [False], [True]),
        (EVAL, "web_server", [False], [True]),
    ],
)
def test_the_limits_of_a_key_belong_to_it(name: str, key: str, fine: list[Any], wrong: list[Any]) -> None:
    def load(value: Any) -> None:
        cfg = composed(name, REQUIRED[name])
        OmegaConf.update(cfg, key, value)
        load_config(cfg, SHIPPED[name])

    for value in fine:
        load(value)
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{key}: "):
            load(value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prompts=null"], "^prompts: nothing to do"),
        (["prompts=[]"], "^prompts: nothing to do"),
        (["server=True", "web_server=True", "web_port=5555"], "^web_port: 5555 is port's too"),
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
