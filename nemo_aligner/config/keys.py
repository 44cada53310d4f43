"""What the keys of a YAML mean: read from its comments, for `--help` and for the page of all keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Key:
    """A key in full, `data.n`; its default as it stands in the YAML, None of a block; its comment, or an empty text."""

    name: str
    default: str | None
    comment: str


def files_of(config_dir: Path, name: str) -> Iterator[Path]:
    """The YAML `name` of `config_dir`, and those of its folder that it begins from or takes in; the strongest first."""
    path = config_dir / f"{name}.yaml"
    bases = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    for base in reversed(bases if "_self_" in bases else [*bases, "_self_"]):
        if base == "_self_":
            yield path
        elif isinstance(base, str):
            yield from files_of(config_dir, base)


def keys_of(config_dir: Path, name: str) -> list[Key]:
    """Keys of the YAML `name` and of those that it begins from, whose comments hold where it has none of its own."""
    found: dict[str, Key] = {}
    for path in reversed([*files_of(config_dir, name)]):
        for key in keys_in(path.read_text(encoding="utf-8")):
            older = found.get(key.name)
            found[key.name] = replace(key, comment=older.comment) if older and not key.comment else key
    return [*found.values()]


def keys_in(text: str) -> list[Key]:
    """Keys of one YAML, in its order."""
    root = yaml.compose(text)
    lines = text.splitlines()
    return [*_keys(root, lines, "")] if isinstance(root, yaml.MappingNode) else []


def _keys(node: yaml.MappingNode, lines: list[str], prefix: str) -> Iterator[Key]:
    for name_node, value in node.value:
        name = f"{prefix}{name_node.value}"
        if name == "defaults":  # Hydra's
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield Key(name, None, _comment(name_node.end_mark, lines))
            yield from _keys(value, lines, f"{name}.")
        else:
            default = lines[value.start_mark.line][value.start_mark.column : value.end_mark.column]
            yield Key(name, default.strip(), _comment(value.end_mark, lines))


def _comment(mark: yaml.Mark, lines: list[str]) -> str:
    """What stands behind `#` on the rest of a line."""
    found = re.search(r"(?:^|\s)#\s*(.*)", lines[mark.line][mark.column :])
    return found[1].strip() if found else ""
