"""What a config holds and nobody but its user may see: tokens, keys and passwords."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(token|secret|password|api_?key|credential)s?$", re.IGNORECASE)


def is_secret(key: str, value: Any) -> bool:
    """Whether the text `value` is not to be shown, by what `key` says it is."""
    return isinstance(value, str) and bool(value) and _SECRET.search(key) is not None


def without_secrets(config: Any) -> Any:
    """`config` with *** in place of secrets."""
    if isinstance(config, Mapping):
        return {key: "***" if is_secret(str(key), value) else without_secrets(value) for key, value in config.items()}
    return [without_secrets(value) for value in config] if isinstance(config, list | tuple) else config
