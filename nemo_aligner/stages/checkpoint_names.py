"""Where the checkpoints of a run are, and what they are called: `exp_manager.checkpoint_callback_params.filename`.

As in Lightning's ModelCheckpoint:

{step} ─▶ step=12        {val_loss:.3f} ─▶ val_loss=1.234
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.errors import ConfigError

KEY = "exp_manager.checkpoint_callback_params.filename"
_FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


def check_pattern(pattern: str, logged: Collection[str]) -> None:
    """Raises ConfigError for a field that is not `logged`, a format that is none, and names that would repeat."""
    fields = _FIELD.findall(pattern)
    for name, spec in fields:
        if name not in logged:
            raise ConfigError(f"{{{name}}} is not logged; one of {', '.join(sorted(logged))} is", KEY)
        try:
            format(1.0, spec)
        except ValueError:
            raise ConfigError(f"{spec!r} is not how a number is written; {{{name}:.3f}} would be", KEY) from None
    if not {"step", "global_step"} & {name for name, _ in fields}:
        raise ConfigError("{step} has to be in it, or each checkpoint would take the place of the one before", KEY)
    if set("{}/") & set(_FIELD.sub("", pattern)):
        raise ConfigError("braces are for fields like {step} or {val_loss:.3f}, and a slash is not for names", KEY)


def checkpoint_name(pattern: str, values: Mapping[str, float]) -> str:
    """`pattern` with every field as name=value; nan for what has no value yet."""

    def written(field: re.Match[str]) -> str:
        name, spec = field.groups(default="")
        value = values.get(name, float("nan"))
        return f"{name}={format(float(value), spec) if spec else value}"

    return _FIELD.sub(written, pattern)


def log_dir(config: ExpManagerConfig) -> Path:
    """`explicit_log_dir`, or `<exp_dir or nemo_experiments>/<name>`."""
    return Path(config.explicit_log_dir or Path(config.exp_dir or "nemo_experiments") / config.name)
