"""How conversations become text: the keys that every command with conversations has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class ChatKeys:
    chat_template: str | None = None  # Jinja, or the path of a .jinja file; null = the archive's own
    chat_template_kwargs: dict[str, Any] | None = None  # values for it, such as {enable_thinking: False}
