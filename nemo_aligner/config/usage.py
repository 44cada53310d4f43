"""What `--help` prints: what a script does, and its YAML with the comments that say what each key means."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

_HOW = """\
Override a key with key=value (key=[1,2], key=null), drop one with ~key, take a group of conf/ with +trainer=cpu:
{groups}
--cfg job prints the configuration as it would be used; --hydra-help, what else the command line takes."""


def usage(arguments: Sequence[str], about: str | None, config_dir: Path, config_name: str, shared: Path) -> str | None:
    """The text that answers `--help` among `arguments`; None where it is not, or is about a config of another folder.

    `about` is the script's docstring, `shared` the folder of groups; `--config-name` chooses another YAML of
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
    blocks = [f"# {path.name}\n\n{path.read_text(encoding='utf-8').strip()}" for path in _files(config_dir, name)]
    groups = {
        group.name: ", ".join(sorted(option.stem for option in group.glob("*.yaml"))) for group in shared.iterdir()
    }
    how = _HOW.format(groups="\n".join(f"  {name}: {options}" for name, options in sorted(groups.items())))
    return "\n\n".join([(about or "").strip(), how, *blocks])


def _files(config_dir: Path, name: str) -> Iterator[Path]:
    """The YAML, then those of its folder that it begins from."""
    path = config_dir / f"{name}.yaml"
    yield path
    for base in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            yield from _files(config_dir, base)
