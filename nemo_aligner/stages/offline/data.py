"""What the sampler and the labeler do alike: the rows of a run, their model input, and the run's fingerprint."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.cut import Sizes, check_cut
from nemo_aligner.config.offline import LabelerConfig, OfflineConfig, OfflineDataConfig, SamplerConfig
from nemo_aligner.data.blending import Blend, blend, check_weights
from nemo_aligner.data.chat import check_template, template_text
from nemo_aligner.data.conversations import check_turns
from nemo_aligner.data.jsonl import Row, check_texts, load_rows
from nemo_aligner.data.sources import files_read, source_sum
from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture
from nemo_aligner.engine.checks import parallel_sizes
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.files import Inputs, refuse_overwriting
from nemo_aligner.records import TEMPLATE_FIELDS, Turns

if TYPE_CHECKING:
    from nemo_aligner.engine.processes.cluster import MegatronCluster

log = logging.getLogger(__name__)


def check_archive(cfg: OfflineConfig, path: str, *others: str | None) -> None:
    """The archive `gpt_model_file` must be there and fit the processes, as `others` must that are loaded beside it.

    Raises CheckpointError, ConfigError.
    """
    tensor, pipeline = parallel_sizes(cfg.trainer, path, _sizes(cfg), key="gpt_model_file")
    for other in filter(None, others):
        check_cut(read_architecture(other), tensor=tensor, pipeline=pipeline, of=other)


def start_cluster(cfg: OfflineConfig, path: str | None) -> AbstractContextManager[MegatronCluster]:
    """The processes of an offline run, cut as its config or the archive `gpt_model_file` says, where there is one."""
    from nemo_aligner.engine.loading import start_for_archive, start_without_model

    if path is None:
        return start_without_model(cfg.trainer, seed=cfg.seed)
    return start_for_archive(cfg.trainer, path, _sizes(cfg), key="gpt_model_file", seed=cfg.seed)


def _sizes(cfg: OfflineConfig) -> Sizes:
    return Sizes(cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size)


def open_rows(data: OfflineDataConfig, required: Mapping[str, str]) -> Blend:
    """The blend of `data.file_names`; `required` maps text fields to the config keys that name them.

    A conversation takes the place of a text in `data.input_key`; with the assistant's answer at its end it takes that
    of `data.output_key` too, where that is required.
    """
    check_weights(data.concat_sampling_probabilities, len(data.file_names), "data.concat_sampling_probabilities")
    files = []
    for name in data.file_names:
        check = RowCheck(data, required)
        files.append(
            load_rows(name, required={}, check=check, hf_dataset=data.hf_dataset, cache_dir=data.index_mapping_dir)
        )
        check.report(name)
    return blend(files, data.concat_sampling_probabilities, data.num_samples, key="data.concat_sampling_probabilities")


class RowCheck:
    """What a row of prompts or samples must have, and how many of a file are conversations."""

    def __init__(self, data: OfflineDataConfig, required: Mapping[str, str]) -> None:
        self._input_key, self._required = data.input_key, required
        self._written = {data.output_key: "data.output_key", data.reward_key: "data.reward_key"}
        self._answer = data.output_key if data.output_key in required else None
        self._plain = self._chats = self._both = 0
        self._named = set(re.findall(r"\{(\w+)\}", data.prompt_template or "")) - {data.input_key}
        self._unfilled = set[str]()

    def __call__(self, row: Row, path: Path, line: int) -> None:
        """Raises DataError."""
        self._unfilled |= self._named & row.keys()
        turns = Turns.of(row, self._input_key)
        if turns is None or self._input_key not in self._required:
            self._plain += 1
            self._both += Turns.of(row, None) is not None
            check_texts(row, self._required, path, line)
            return
        self._chats += 1
        for name, key in self._written.items():
            if name in (turns.field, *TEMPLATE_FIELDS):
                raise DataError(f"{name!r} is of the conversation, and {key} would take its place", path, line)
        check_turns(row, turns, output_key=self._answer, path=path, line=line)
        there = {self._input_key} | ({self._answer} if turns.answered else set())
        check_texts(row, {name: key for name, key in self._required.items() if name not in there}, path, line)

    def report(self, name: str) -> None:
        for field in sorted(self._unfilled):
            log.warning(
                "%s: data.prompt_template leaves {%s} as it is, though rows have such a field: {%s} alone is filled in",
                name, field, self._input_key,
            )  # fmt: skip
        if self._chats and self._plain:
            log.info("%s: %d rows are conversations, %d are plain prompts", name, self._chats, self._plain)
        if self._both:
            log.info(
                "%s: %d rows have a conversation beside %r, which is the prompt", name, self._both, self._input_key
            )


def check_templates(data: OfflineDataConfig) -> None:
    """`data.prompt_template` must say where the prompt goes, `data.chat_template` be one. Raises ConfigError."""
    check_prompt_template(data.prompt_template, data, "data.prompt_template")
    check_template(data, "data.chat_template")


def check_prompt_template(template: str | None, data: OfflineDataConfig, key: str) -> None:
    """Raises ConfigError where a template does not say where the prompt goes."""
    if template is not None and f"{{{data.input_key}}}" not in template:
        raise ConfigError(f"{template!r} lacks {{{data.input_key}}}", key)


def check_output(
    cfg: SamplerConfig | LabelerConfig, beside: Iterable[str] = (), **archives: Sequence[str | None]
) -> None:
    """What is written must not overwrite what is read: rows, and archives by their key. Raises OutputError.

    `beside`: the files that are written beside `output_file`.
    """
    rows = [file for name in cfg.data.file_names for file in files_read(name)]
    inputs: Inputs = {"data.file_names": rows, "gpt_model_file": [cfg.gpt_model_file], **archives}
    refuse_overwriting(cfg.output_file, f"output_file={cfg.output_file}", inputs)
    for path in beside:
        refuse_overwriting(path, f"{path}, beside output_file,", inputs)


def data_fingerprint(data: OfflineDataConfig) -> dict[str, Any]:
    """What decides which rows a run reads and what the model sees of them."""
    return {
        "data": [[name, source_sum(name, data.index_mapping_dir)] for name in data.file_names],
        "data.concat_sampling_probabilities": list(data.concat_sampling_probabilities),
        "data.num_samples": data.num_samples,
        "data.max_seq_length": data.max_seq_length,
        "data.prompt_template": data.prompt_template,
        "data.chat_template": template_text(data.chat_template, "data.chat_template"),
        "data.chat_template_kwargs": data.chat_template_kwargs,
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
