"""What the sampler and the labeler do alike: the rows of a run, their model input, and the run's fingerprint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from nemo_aligner.checksums import file_sum
from nemo_aligner.config.offline import OfflineConfig, OfflineDataConfig
from nemo_aligner.data.blending import Blend, blend, check_weights
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.engine.checks import parallel_sizes
from nemo_aligner.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from nemo_aligner.engine.processes.cluster import MegatronCluster

log = logging.getLogger(__name__)


def check_archive(cfg: OfflineConfig, path: str) -> None:
    """The archive `gpt_model_file` must be there and fit the processes. Raises CheckpointError, ConfigError."""
    parallel_sizes(
        cfg.trainer,
        path,
        key="gpt_model_file",
        tensor=cfg.tensor_model_parallel_size,
        pipeline=cfg.pipeline_model_parallel_size,
    )


def start_cluster(cfg: OfflineConfig, path: str | None) -> AbstractContextManager[MegatronCluster]:
    """The processes of an offline run, cut as its config or the archive `gpt_model_file` says, where there is one."""
    from nemo_aligner.engine.loading import start_for_archive, start_without_model

    if path is None:
        return start_without_model(cfg.trainer, seed=cfg.seed)
    return start_for_archive(
        cfg.trainer,
        path,
        key="gpt_model_file",
        tensor=cfg.tensor_model_parallel_size,
        pipeline=cfg.pipeline_model_parallel_size,
        seed=cfg.seed,
    )


def open_rows(data: OfflineDataConfig, required: Mapping[str, str]) -> Blend:
    """The blend of `data.file_names`; `required` maps text fields to the config keys that name them."""
    check_weights(data.concat_sampling_probabilities, len(data.file_names), "data.concat_sampling_probabilities")
    files = [
        load_rows(name, required=required, hf_dataset=data.hf_dataset, cache_dir=data.index_mapping_dir)
        for name in data.file_names
    ]
    return blend(files, data.concat_sampling_probabilities, data.num_samples, key="data.concat_sampling_probabilities")


def check_template(template: str | None, input_key: str) -> None:
    """`data.prompt_template` must say where the prompt goes. Raises ConfigError."""
    if template is not None and f"{{{input_key}}}" not in template:
        raise ConfigError(f"{template!r} lacks {{{input_key}}}", "data.prompt_template")


def check_output(cfg: OfflineConfig) -> None:
    """The output must not overwrite an input. Raises OutputError."""
    if cfg.output_file in cfg.data.file_names:  # type: ignore[attr-defined]
        raise OutputError(f"output_file={cfg.output_file} is also one of data.file_names")


def data_fingerprint(data: OfflineDataConfig) -> dict[str, Any]:
    """What decides which rows a run reads and what the model sees of them."""
    return {
        "data": [[name, file_sum(name)] for name in data.file_names],
        "data.concat_sampling_probabilities": list(data.concat_sampling_probabilities),
        "data.num_samples": data.num_samples,
        "data.max_seq_length": data.max_seq_length,
        "data.prompt_template": data.prompt_template,
        "data.input_key": data.input_key,
        "data.add_bos": data.add_bos,
        "data.sample_split": [data.sample_split_size, data.sample_split_iter],
    }


def tell_empty(empty: int, responses: int) -> None:
    """Say what may be behind it where a tenth of all responses, or more, are empty."""
    if empty and empty * 10 >= responses:
        log.warning(
            "%d of %d responses are empty (%.0f %%): was a chat model sampled without its chat template, did prompts "
            "leave no room for a response, or does an end string come at once?",
            empty, responses, 100 * empty / responses,
        )  # fmt: skip
