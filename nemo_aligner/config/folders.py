"""Where the YAML of this package lies: the configs of its commands, and the groups that they share."""

from __future__ import annotations

from pathlib import Path

from nemo_aligner.errors import ConfigError

CONF = Path(__file__).resolve().parents[1] / "conf"
SHARED_CONF = CONF / "shared"


def model_shapes() -> list[str]:
    """Names of the shapes that come with the package: `tiny`, `llama3_8b`, ..."""
    return sorted(path.stem for path in (SHARED_CONF / "model").glob("*.yaml"))


def shape_file(given: str | Path, key: str) -> Path:
    """The YAML of a model's shape, by its path or by its name among `model_shapes()`; `key` says who gave it.

    Raises ConfigError where there is neither.
    """
    if Path(given).is_file():
        return Path(given)
    if str(given) in model_shapes():
        return SHARED_CONF / "model" / f"{given}.yaml"
    raise ConfigError(f"{given}: no such file, and none of the shapes {', '.join(model_shapes())}", key)
