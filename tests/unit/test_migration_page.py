"""What the page of NeMo-Aligner's keys says is taken composes, and what it says is refused is refused in that line."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from nemo_aligner.commands.cli import COMMANDS, CONFIGURED
from nemo_aligner.config.aliases import REINFORCE, let_through
from nemo_aligner.config.keys import keys_of
from nemo_aligner.config.load import load_config
from nemo_aligner.errors import ConfigError
from scripts.site_pages import migration

pytestmark = pytest.mark.processes  # each composes what a command line composes, many times


def written(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}: {written(one)}" for name, one in value.items()) + "}"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "null" if value is None else str(value)


def loaded(command: str, given: dict[str, Any]) -> Any:
    """The config that a command line of these keys makes. Raises ConfigError."""
    entry = importlib.import_module(COMMANDS[command]).main
    GlobalHydra.instance().clear()
    needed = [f"{key}={written(value)}" for key, value in migration.GIVEN[command].items()]
    words = [f"++{key}={written(value)}" for key, value in given.items() if key not in migration.GIVEN[command]]
    with initialize_config_dir(str(entry.config_dir), version_base=None):
        cfg = compose(entry.config_name, let_through([*needed, *words], entry.aliases))
    return load_config(cfg, migration.SCHEMAS[command], entry.aliases)


@pytest.mark.parametrize("command", migration.SCHEMAS)
def test_all_that_is_taken_composes_in_one_command_line(command: str) -> None:
    taken = {verdict.key: verdict.there for verdict in migration.verdicts(command) if verdict.refused is None}
    config = OmegaConf.structured(loaded(command, taken))
    for verdict in migration.verdicts(command):
        if verdict.refused is None and isinstance(verdict.there, bool | int | float) and verdict.here is not None:
            assert OmegaConf.select(config, verdict.name) == verdict.there, verdict.key


@pytest.mark.parametrize("command", migration.SCHEMAS)
def test_what_is_refused_is_refused_in_the_line_that_the_page_has(command: str) -> None:
    found = [verdict for verdict in migration.verdicts(command) if verdict.refused is not None]
    page = "\n".join(migration.page())
    for verdict in found[:3]:
        with pytest.raises(ConfigError) as fault:
            loaded(command, {verdict.key: verdict.there})
        assert str(fault.value) == verdict.refused
        assert str(fault.value) in page


def test_what_is_refused_and_why_is_written_down_and_nothing_else_is() -> None:
    every = [verdict for command in migration.SCHEMAS for verdict in migration.verdicts(command)]
    refused = {verdict.key for verdict in every if verdict.refused is not None}
    assert refused == set(migration.asked()["refused"]), "nemo_aligner.yaml says why a key is refused"
    assert set(migration.SCHEMAS) == set(migration.asked()) - {"refused"}


def test_every_older_name_is_there() -> None:
    keys = {key for command in migration.SCHEMAS for key in migration.asked()[command]["keys"]}
    for name in ("trainer.reinforce", "model.reinforce", "remote_rm"):
        assert any(key.startswith(f"{name}.") for key in keys)
        assert migration.renamed(f"{name}.x", REINFORCE) == f"{REINFORCE[name]}.x"


def test_every_key_that_the_guide_for_other_programs_names_is_one() -> None:
    guide = (migration.KEYS.parents[2] / "docs/migration.md").read_text(encoding="utf-8")
    entries = [importlib.import_module(COMMANDS[command]).main for command in CONFIGURED]
    known = {key.name for entry in entries for key in keys_of(entry.config_dir, entry.config_name)}
    rows = [line.split(" | ") for line in guide[guide.index("## From TRL") :].splitlines() if line.startswith("| ")]
    named = [re.match(r"`([a-z_]+\.[\w.]+)(=\w+)?`$", word) for row in rows for word in re.findall("`[^`]+`", row[1])]
    keys = {found[1] for found in named if found}
    assert len(keys) > 50
    assert sorted(keys - known) == []
