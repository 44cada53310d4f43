"""A YAML file that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_aligner.errors import ConfigError


def read_mapping(path: str | Path, key: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; `key` is what named it. Raises ConfigError."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as fault:
        said = fault.strerror if isinstance(fault, OSError) else " ".join(str(fault).split())
        raise ConfigError(f"{path} cannot be read: {said}", key) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a YAML mapping", key)
    return content
