"""What is wrong with an override on the command line, in one line that names it and says what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException

from nemo_aligner.config.keys import keys_of

_MISSING = re.compile(r"Could not override '([^']+)'|delete from config\. '([^']+)' does not exist")


def explained(fault: HydraException, yaml: Path) -> str | None:
    """The fault in words of ours; None for one that is not about an override. `yaml` is the script's own config."""
    if isinstance(fault, OverrideParseException):
        return _unreadable(str(fault.override))
    found = _MISSING.search(str(fault)) if isinstance(fault, ConfigCompositionException) else None
    return _unknown(next(filter(None, found.groups())), yaml) if found else None


def group_fault(arguments: Sequence[str], shared: Path) -> str | None:
    """Of an override that gives a group of `shared` what names none of its files, such as a number."""
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if equals and (shared / key).is_dir():
            names = ", ".join(sorted(path.stem for path in (shared / key).glob("*.yaml")))
            return f"{key}: {value} is not one of {names}"
    return None


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: not key=value"
    inner = value.strip("'\"").replace('"', '\\"')
    return f"{key}: the command line's grammar has no such value; quote a text twice, '{key}=\"{inner}\"'"


def _unknown(key: str, yaml: Path) -> str:
    known = [own.name for own in keys_of(yaml.parent, yaml.stem)] if yaml.is_file() else []
    # a slip within the key, or the right name in another place
    close = difflib.get_close_matches(key, known, n=1) or [
        other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f"{key}: no such key" + (f", did you mean {close[0]}" if close else "")
