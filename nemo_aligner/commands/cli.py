"""`aligner <command> ...`: finds the module of a command, and imports no other."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nemo_aligner.config.pipes import as_long_as_somebody_reads

COMMANDS = {
    "import": "nemo_aligner.commands.import_hf",
    "export": "nemo_aligner.commands.export_hf",
    "rm": "nemo_aligner.commands.rm",
    "sample": "nemo_aligner.commands.sample",
    "label": "nemo_aligner.commands.label",
    "sft": "nemo_aligner.commands.sft",
    "loop": "nemo_aligner.commands.loop",
    "serve": "nemo_aligner.commands.serve",
    "reinforce": "nemo_aligner.commands.reinforce",
    "eval": "nemo_aligner.commands.evaluate",
    "generate": "nemo_aligner.commands.generate",
    "report": "nemo_aligner.report.cli",
    "verify": "nemo_aligner.commands.verify",
    "plan": "nemo_aligner.commands.plan",
}
"""Each has a `main()` that reads sys.argv[1:]."""

CONFIGURED = ("sample", "label", "sft", "rm", "reinforce", "serve", "eval", "generate")
"""Those whose arguments are Hydra's."""

_COMPLETION = ("-sc", "--shell-completion")
_USAGE = """\
usage: aligner <command> [arguments]

{commands}

aligner <command> --help explains every key or option of a command.
eval "$(aligner -sc install=bash)" completes commands and keys on TAB (zsh, fish alike; uninstall=bash ends it)."""


@as_long_as_somebody_reads()
def main() -> None:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {command:{width}}  {summary(module)}" for command, module in COMMANDS.items())
        print(_USAGE.format(commands="\n".join(lines)))
    elif name == "--version":
        print(f"nemo-aligner {_version()}")
    elif name in _COMPLETION:
        _complete(rest)
    elif name in COMMANDS:
        _start(name, f"aligner {name}", rest)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        sys.exit(
            f"error: aligner {name}: no such command" + (f", did you mean {close[0]}" if close else "; see --help")
        )


def summary(module: str) -> str:
    """First line of the docstring of a module, which is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".")


def _version() -> str:
    try:
        return version("nemo-aligner")
    except PackageNotFoundError:
        return "of a checkout, not installed"


def _start(command: str, program: str, arguments: Sequence[str]) -> None:
    sys.argv = [program, *arguments]
    importlib.import_module(COMMANDS[command]).main()


def _complete(arguments: list[str]) -> None:
    """Hydra's completion, which knows no commands: it is asked about the line without the command's name."""
    command = CONFIGURED[0]
    if arguments and arguments[0].startswith("query="):
        program, *words = os.environ.get("COMP_LINE", "aligner").split(" ")
        if len(words) < 2:  # the command itself is being typed
            _offer(COMMANDS)
            return
        command = words[0]
        if command == "loop":
            from nemo_aligner.commands.loop import completions

            _offer(completions(words[1:]))
            return
        if command not in CONFIGURED:
            return  # the shell offers files
        os.environ["COMP_LINE"] = " ".join([program, *words[1:]])
    _start(command, "aligner", [_COMPLETION[0], *arguments])
    if "install=fish" in arguments:  # Hydra tells fish that no argument is a file
        with_files = " ".join(name for name in COMMANDS if name not in CONFIGURED)
        print(f"complete -c aligner -n '__fish_seen_subcommand_from {with_files}' -F")


def _offer(words: Iterable[str]) -> None:
    """A line each: bash and zsh split at any blank, fish at the end of a line."""
    print("\n".join(words))
