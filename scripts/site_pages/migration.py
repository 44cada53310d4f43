"""The page of NeMo-Aligner's keys: what becomes of each here, found by giving it to the schema of its command.

nemo_aligner.yaml has the keys, their defaults there, and why those are refused that are.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.commands.cli import COMMANDS, summary
from nemo_aligner.config.aliases import Aliases
from nemo_aligner.config.entry import Entry
from nemo_aligner.config.generation import GenerationConfig
from nemo_aligner.config.keys import Key, files_of, keys_of
from nemo_aligner.config.load import load_config
from nemo_aligner.config.offline import LabelerConfig, SamplerConfig
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.resolvers import register_resolvers
from nemo_aligner.config.serving import ServerConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig
from nemo_aligner.errors import ConfigError

KEYS = Path(__file__).with_name("nemo_aligner.yaml")
SCHEMAS: dict[str, type] = {
    "sample": SamplerConfig,
    "label": LabelerConfig,
    "sft": SFTConfig,
    "rm": RMConfig,
    "reinforce": ReinforceConfig,
    "serve": ServerConfig,
    "generate": GenerationConfig,
}
GIVEN: dict[str, dict[str, Any]] = {
    "sample": {"gpt_model_file": "m", "output_file": "o", "data.file_names": ["p"]},
    "label": {"gpt_model_file": "m", "output_file": "o", "data.file_names": ["p"]},
    "sft": {"model.restore_from_path": "m", "exp_manager.explicit_log_dir": "r"},
    "rm": {"pretrained_checkpoint.restore_from_path": "m", "model.data.data_prefix": {"train": ["p"]}},
    "reinforce": {"pretrained_checkpoint.restore_from_path": "m", "model.data.data_prefix": {"train": ["p"]}},
    "serve": {"rm_model_file": "m"},
    "generate": {"gpt_model_file": "m", "prompts": ["p"]},
}
"""Keys that a command has no default for."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a key of NeMo-Aligner's: what it is called here, and the line that refuses it, if any."""

    key: str
    there: Any
    here: Key | None
    name: str
    refused: str | None


@cache
def asked() -> dict[str, dict[str, Any]]:
    """nemo_aligner.yaml: of each command, its config there and the keys of that, and why keys are refused."""
    return yaml.safe_load(KEYS.read_text(encoding="utf-8"))


@cache
def verdicts(command: str) -> list[Verdict]:
    """Of each key of the command's config there, all of them given together, as that config does."""
    entry: Entry = importlib.import_module(COMMANDS[command]).main
    known = {key.name: key for key in keys_of(entry.config_dir, entry.config_name)}
    there: dict[str, Any] = asked()[command]["keys"]
    names = {key: renamed(key, entry.aliases) for key in there}
    refused: dict[str, str] = {}
    while faults := faults_of(command, entry, {key: value for key, value in there.items() if key not in refused}):
        for place, line in faults.items():
            of = [key for key, name in names.items() if key not in refused and f"{name}.".startswith(f"{place}.")]
            if not of:
                raise ValueError(f"{command}: {line!r} is about none of the keys that were given")
            refused |= dict.fromkeys(of, line)
    return [Verdict(key, value, known.get(names[key]), names[key], refused.get(key)) for key, value in there.items()]


def renamed(key: str, aliases: Aliases) -> str:
    """The name here of a key there."""
    for old, new in aliases.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    return key


def faults_of(command: str, entry: Entry, given: Mapping[str, Any]) -> dict[str, str]:
    """The lines that refuse keys, by the key that each begins with; what has no default there is left as `GIVEN`."""
    register_resolvers()
    files = [OmegaConf.load(path) for path in reversed([*files_of(entry.config_dir, entry.config_name)])]
    cfg = OmegaConf.merge(*files)
    assert isinstance(cfg, DictConfig)
    for block in ("defaults", "hydra"):
        cfg.pop(block, None)
    needed = GIVEN[command]
    for key, value in (*((key, value) for key, value in given.items() if key not in needed), *needed.items()):
        if value != "???":
            OmegaConf.update(cfg, key, value, force_add=True)
    try:
        load_config(cfg, SCHEMAS[command], entry.aliases)
    except ConfigError as fault:
        lines = re.split(r"; (?=[\w.]+: no such key)", str(fault))
        return {line.partition(": ")[0]: line for line in lines}
    return {}


_INTRODUCTION = """\
# Every key of NeMo-Aligner

What becomes of each key of NeMo-Aligner's configs here, with the default that it has there: found by giving it to the
command. A key with a meaning is taken, under the name that it has here; a key that is given in vain is refused, in the
line that stands here, unless its default says that there is nothing to do. [Coming from elsewhere](migration.md) says
where a key that is taken means something else than there."""


def page() -> Iterator[str]:
    """The page, in Markdown."""
    yield _INTRODUCTION
    for command in SCHEMAS:
        config = asked()[command]
        yield f"\n## {config['config']}.yaml: aligner {command}\n\n{summary(COMMANDS[command])}.\n"
        yield "| key there | default there | default here | |"
        yield "|---|---|---|---|"
        for verdict in verdicts(command):
            yield f"| `{verdict.key}` | {_value(verdict.there)} | {_default(verdict)} | {_told(verdict)} |"


def _told(verdict: Verdict) -> str:
    if verdict.refused is not None:
        return f"refused, {_cell(asked()['refused'][verdict.key])}: {_code(verdict.refused)}"
    name = f"`{verdict.name}`: " if verdict.name != verdict.key else ""
    return name + _cell(verdict.here.comment if verdict.here else "taken with `++`")


def _default(verdict: Verdict) -> str:
    return _code(verdict.here.default) if verdict.here and verdict.here.default is not None else ""


def _value(value: Any) -> str:
    if value is None:
        return "`null`"
    return _code(value.replace("\n", r"\n") if isinstance(value, str) else str(value)) if value != "" else ""


def _code(text: str) -> str:
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    return printable.replace("|", r"\|")
