"""Packages that not every installation has: which extra of `pip install nemo-aligner[...]` brings them."""

from __future__ import annotations

import importlib.util

from nemo_aligner.errors import MissingExtraError

EXTRAS = {
    "server": ("pytriton", "aiohttp", "fastapi", "uvicorn"),
    "trackers": ("mlflow", "wandb"),
    "hf": ("gguf", "huggingface_hub"),
    "json": ("jsonschema",),
    "math": ("math_verify",),
}
"""Modules of each extra that has modules of its own here."""


def install(extra: str) -> str:
    """The command that brings an extra."""
    return f'pip install "nemo-aligner[{extra}]"'


def require_extra(extra: str, purpose: str) -> None:
    """Raises MissingExtraError where a module of `extra` is not installed; `purpose` is what needs it. Imports none."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{purpose} needs {', '.join(missing)}, not installed here; {install(extra)}")
