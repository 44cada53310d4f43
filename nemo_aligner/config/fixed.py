"""Keys of NeMo's YAMLs that have one value here: accepted with it, refused with any other, never passed over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fixed:
    """Values that are accepted, and what to do instead of giving another."""

    values: tuple[Any, ...]
    instead: str


_BY_EXP_MANAGER = "set by exp_manager here; leave it as it is"
_NO_WORKERS = "rows are read and cut into tokens before the first step, by no worker process; leave it out"
_NO_RESUMING = "an evaluation is made in one go; leave it out"
_WHOLE_FILE = "all rows are evaluated; leave it out, or give data.num_samples"
_OWN_FIELDS = "samples are written with fields of the evaluation's own; leave it out"
_CONTIGUOUS = "Megatron's buffers are always contiguous; leave it at True"

TRAINER = {
    "logger": Fixed((False,), _BY_EXP_MANAGER),
    "enable_checkpointing": Fixed((False,), _BY_EXP_MANAGER),
    "use_distributed_sampler": Fixed((False,), "each rank is given its share of a batch here; leave it at False"),
    "max_time": Fixed((None,), "not used here; give exp_manager.max_time_per_run"),
}
MODEL = {
    "gradient_as_bucket_view": Fixed((True,), "gradients always lie in Megatron's buffers; leave it at True"),
}
OPTIM = {
    "contiguous_grad_buffer": Fixed((True,), _CONTIGUOUS),
    "contiguous_param_buffer": Fixed((True,), _CONTIGUOUS),
}
LORA = {
    "column_init_method": Fixed(("xavier",), "A begins so (its columns are those of the input); leave it out"),
    "row_init_method": Fixed(("zero",), "B begins at 0, so that training begins with the model as it is; leave it out"),
    "layer_selection": Fixed((None,), "all layers have an adapter; leave it out"),
    "weight_tying": Fixed((False,), "layers share no adapter; leave it out"),
    "position_embedding_strategy": Fixed((None,), "layers share no adapter; leave it out"),
}
WORKERS = {"num_workers": Fixed((0, 2), _NO_WORKERS)}
BLENDED = {**WORKERS, "data_impl": Fixed(("jsonl", "json"), "files are JSONL; leave it at jsonl")}
SFT_ROWS = {
    **WORKERS,
    "memmap_workers": Fixed((None, 0, 2), _NO_WORKERS),
    "add_sep": Fixed((False,), "no tokenizer here has a separator; write it into prompt_template"),
}
_CHAT_IS_CUT = "a conversation is cut at its end; leave it out"
CHAT_ROWS = {
    "prompt_template": Fixed(("{input} {output}",), "with model.data.chat the chat template is used; leave it out"),
    "truncation_field": Fixed(("input",), _CHAT_IS_CUT),
    "truncation_method": Fixed(("right",), _CHAT_IS_CUT),
}
EVALUATION = {
    "checkpoint_interval": Fixed((None,), _NO_RESUMING),
    "max_time_per_run": Fixed((None,), _NO_RESUMING),
    "export_reward": Fixed((False,), _OWN_FIELDS),
}
EVALUATION_ROWS = {
    "sample_split_size": Fixed((None,), _WHOLE_FILE),
    "sample_split_iter": Fixed((0,), _WHOLE_FILE),
    "export_metadata": Fixed((False,), _OWN_FIELDS),
    "export_tokens": Fixed((False,), _OWN_FIELDS),
}
_AN_ARCHIVE = "give the .nemo archive in gpt_model_file"
_NOT_CUT_SO = "a model is cut by tensor and pipeline parallelism here; leave it out"
GENERATION = {
    **{name: Fixed((None,), _AN_ARCHIVE) for name in ("checkpoint_dir", "checkpoint_name", "hparams_file")},
    "share": Fixed((False,), "the page is not put on other people's servers; use a tunnel of your own"),
    "pipeline_model_parallel_split_rank": Fixed((None, -1, 0, 1), _NOT_CUT_SO),
    "expert_model_parallel_size": Fixed((-1, 0, 1), _NOT_CUT_SO),
    "context_parallel_size": Fixed((-1, 0, 1), _NOT_CUT_SO),
}
GENERATION_INFERENCE = {"all_probs": Fixed((False,), "the server's `logprobs` names up to 20 tokens")}
NO_MODEL = {
    f"{kind}_model_parallel_size": Fixed((-1, 1), "reward functions alone have no model to cut; leave it out")
    for kind in ("tensor", "pipeline")
}
_NO_RENDERING = "reward functions alone are given the turns themselves; leave it out"
NO_TEMPLATE = {"chat_template": Fixed((None,), _NO_RENDERING), "chat_template_kwargs": Fixed((None,), _NO_RENDERING)}
SAMPLING = {
    "all_probs": Fixed((False,), "rollouts keep the drawn tokens' log-probabilities alone; leave it at False"),
    "compute_logprob": Fixed((False,), "log-probabilities of rollouts are always computed; leave it at False"),
}


def check_fixed(block: object, table: Mapping[str, Fixed], prefix: str = "") -> None:
    """Raises ConfigError for a key of `table` that `block`, found under `prefix` if any, gives another value."""
    for name, fixed in table.items():
        value = getattr(block, name)
        if value not in fixed.values:
            raise ConfigError(f"{value!r} is not offered; {fixed.instead}", f"{prefix}.{name}" if prefix else name)


def check_switched_off(value: Mapping[str, Any] | None, switch: str, key: str) -> None:
    """A block of NeMo-Aligner's that is absent, or says {switch: False}. Raises ConfigError."""
    if value is not None and value.get(switch) is not False:
        raise ConfigError("there is no such thing here; set it to False", f"{key}.{switch}")


def check_amp_o2(value: bool | None, precision: str, key: str) -> None:
    """`megatron_amp_O2`: bf16 weights with fp32 master weights, which is what bf16 always means here.

    Raises ConfigError for True without bf16.
    """
    bf16 = precision.startswith("bf16")
    if value and not bf16:
        raise ConfigError(f"True needs bf16, and the precision is {precision}; set it to False or leave it out", key)
    if value is False and bf16:
        log.info("%s=False: bf16 weights have fp32 master weights in training all the same", key)
