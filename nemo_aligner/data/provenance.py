"""With what results were made: `<output>.meta.json` of an output file, `run.json` of a training run."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_aligner.checksums import known_sum
from nemo_aligner.config.secrets import without_secrets
from nemo_aligner.files import write_atomically

META = ".meta.json"
"""What the provenance of an output file has behind its name."""

RUN_RECORD = "run.json"

_PACKAGES = ("nemo-aligner", "torch", "megatron-core", "tokenizers", "datasets")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_provenance(
    output_file: str | Path,
    *,
    config: Any,
    archive: str | Mapping[str, str] | None,
    inputs: Iterable[tuple[str, str]],
    counts: Mapping[str, Any],
) -> None:
    """Write `<output_file>.meta.json`: config, seed, versions, `inputs` (path, hash), counts, hash of the archive.

    `archive` is null where there was no model, hashes by path where there were several.
    """
    settings = dataclasses.asdict(config)
    meta = {
        "created": _now(),
        "archive_sha256": archive,
        "seed": settings.get("seed"),
        "config": without_secrets(settings),
        "inputs_sha256": dict(inputs),
        "output_sha256": known_sum(output_file),
        "counts": dict(counts),
        "versions": _versions(),
    }
    _write(Path(f"{output_file}{META}"), meta)


def write_run_record(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `<folder>/run.json`: full config and versions of the training run that logs there."""
    _write(folder / RUN_RECORD, {"started": _now(), "config": without_secrets(config), "versions": _versions()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _write(path: Path, meta: Mapping[str, Any]) -> None:
    write_atomically(path, [json.dumps(meta, indent=1, ensure_ascii=False, default=str), "\n"])
