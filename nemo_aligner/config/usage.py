"""What `--help` prints: what a command does, and each of its keys with default and meaning, read from its YAML."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nemo_aligner.config.keys import Key, files_of, keys_of

_HOW = """\
Override a key with key=value (key=[1,2], key=null), drop one with ~key, take a group of conf/ with +trainer=cpu:
{groups}
-m key=4,8 runs it with each value, one after another, and puts what each writes into a folder of multirun/; --cfg job
prints the configuration as it would be used; --hydra-help, what else the command line takes. Keys (???: required):"""
_COLUMN = 44


def usage(arguments: Sequence[str], about: str | None, config_dir: Path, config_name: str, shared: Path) -> str | None:
    """The text that answers `--help` among `arguments`; None where it is not, or is about a config of another folder.

    `about` is the command's docstring, `shared` the folder of groups; `--config-name` chooses another YAML of
    `config_dir`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--config-name", "-cn", default=config_name)
    for elsewhere in (("--config-path", "-cp"), ("--config-dir", "-cd")):
        parser.add_argument(*elsewhere, dest="elsewhere")
    found, _ = parser.parse_known_args(arguments)
    name = str(found.config_name).removesuffix(".yaml")
    if not found.help or found.elsewhere is not None or not (config_dir / f"{name}.yaml").is_file():
        return None
    keys_here = [*keys_of(config_dir, name)]
    how = _HOW.format(groups="\n".join(_groups(shared, {key.name for key in keys_here})))
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    keys = "\n".join(explained(keys_here, width))
    return "\n\n".join([(about or "").strip(), *_heads(config_dir, name), how, keys])


def explained(keys: Iterable[Key], width: int) -> Iterator[str]:
    """Lines `key=default   meaning`, the meaning folded to `width`; a block is a line without `=`."""
    for key in keys:
        term = key.name if key.default is None else f"{key.name}={key.default}"
        if key.default is None and not key.comment:
            continue
        first, *rest = textwrap.wrap(key.comment, width - _COLUMN, break_on_hyphens=False) or [""]
        if len(term) <= _COLUMN - 2:
            yield f"{term:<{_COLUMN}}{first}".rstrip()
        else:
            yield term
            rest = [first, *rest]
        yield from (f"{'':{_COLUMN}}{line}" for line in rest if line)


def _groups(shared: Path, keys: set[str]) -> Iterator[str]:
    """Lines `  trainer: cpu, gpu` of the groups whose keys are among `keys`, and where they belong."""
    for group, block in (("trainer", "trainer"), ("optim", "model.optim")):
        if block in keys:
            options = ", ".join(sorted(option.stem for option in (shared / group).glob("*.yaml")))
            yield f"  {group if group == block else f'{group}@{block}'}: {options}"


def _heads(config_dir: Path, name: str) -> Iterator[str]:
    """The comments that the YAML and those it begins from open with, each under its file's name."""
    for path in files_of(config_dir, name):
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line)
        yield "\n".join([f"# {path.name}", *lines])
