"""Bearer tokens: read from a file, so that none stands in a command line, a config that is logged, or a message."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_aligner.errors import ConfigError

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,}=*")  # RFC 6750, section 2.1


def read_token(path: str | None, key: str) -> str | None:
    """The token in the file that `key` names, None without one. Raises ConfigError, which does not show it."""
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else "not a text of ASCII characters"
        raise ConfigError(f"{path} cannot be read: {why}", key) from None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{path} holds no token: one line of 16 or more letters, digits or -._~+/, as of `openssl rand -hex 32`",
            key,
        )
    return token
