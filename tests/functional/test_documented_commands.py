"""Every command that README and guides print is one that its program accepts, key by key."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from nemo_aligner.commands.cli import COMMANDS, CONFIGURED
from nemo_aligner.commands.loop import environment_of
from nemo_aligner.config.aliases import let_through
from nemo_aligner.config.entry import Entry, SharedConf
from nemo_aligner.config.multirun import is_override
from nemo_aligner.config.resolvers import register_resolvers
from tests.functional.conftest import ROOT

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    path.relative_to(ROOT).as_posix(): found[1]
    for folder in ("examples/nlp/gpt", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if (found := re.search(r"from nemo_aligner\.commands\.(\w+) import main", path.read_text()))
}
NAMES = {module.rpartition(".")[2]: name for name, module in COMMANDS.items()}


def words_of(block: str) -> Iterator[list[str]]:
    """The words of each command of ours in a block; quotes may hold several lines."""
    text = ""
    for line in block.replace("\\\n", " ").splitlines():
        text = f"{text}\n{line}" if text else line
        if not re.match(r"(aligner|python) ", text):
            text = ""
            continue
        try:
            yield shlex.split(text.rstrip("|& "), comments=True)
        except ValueError:  # a quote is open
            continue
        text = ""


def printed() -> Iterator[tuple[str, list[str]]]:
    """Where a command of ours is printed, and its words: the name that `aligner` knows it by, then its arguments."""
    for guide in GUIDES:
        for block in re.findall(r"```bash\n(.*?)```", guide.read_text(), re.DOTALL):
            for words in words_of(block):
                if words[0] == "python" and words[1] in SCRIPTS:
                    words = ["aligner", NAMES[SCRIPTS[words[1]]], *words[2:]]
                if words[0] == "aligner" and words[1] in COMMANDS and "|" not in words:
                    yield guide.name, words[1:]


PRINTED = [pytest.param(words, id=f"{guide}-{i}-{words[0]}") for i, (guide, words) in enumerate(printed())]


class Loaded(Exception):
    """The config was accepted; the run would begin."""


def accept(entry: Entry, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose the command's config, and load it; each value of a sweep stands for itself."""
    module = sys.modules[entry.task.__module__]
    load: Any = module.load_config  # type: ignore[attr-defined]

    def loading(cfg: DictConfig, *rest: Any) -> None:
        load(cfg, *rest)
        raise Loaded

    monkeypatch.setattr(module, "load_config", loading)
    Plugins.instance().register(SharedConf)
    register_resolvers()
    with initialize_config_dir(str(entry.config_dir), version_base=None):
        cfg = compose(entry.config_name, let_through(overrides, entry.aliases))
    with pytest.raises(Loaded):
        entry.task(cfg)


def test_commands_are_found_in_the_guides() -> None:
    assert len({param.values[0][0] for param in PRINTED}) == len(COMMANDS)  # type: ignore[index]


@pytest.mark.parametrize("words", PRINTED)
def test_a_printed_command_is_accepted(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *arguments = words
    main = importlib.import_module(COMMANDS[command]).main
    if "--help" in arguments or "..." in arguments:
        return
    if command in CONFIGURED:
        overrides = [word for word in arguments if is_override(word)]
        if "-m" in arguments:
            overrides = [re.sub(r"=([^,\[]+),.*", r"=\1", word) for word in overrides]
        if "--cfg" not in arguments:
            accept(main, overrides, monkeypatch)
    elif command == "loop":
        environment_of(arguments[0], arguments[1:])
    else:
        monkeypatch.setattr(sys, "argv", [command, "--help"])
        with contextlib.suppress(SystemExit):
            main()
        known = capsys.readouterr().out
        given = [word for word in arguments if word.startswith("-") or command == "plan"]
        assert [word for word in given if not re.search(rf"(^|\W){re.escape(word.partition('=')[0])}\b", known)] == []
