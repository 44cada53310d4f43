"""`<output>.meta.json`: with what an output file was made."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_aligner.checksums import file_sum
from nemo_aligner.files import write_atomically

_PACKAGES = ("nemo-aligner", "torch", "megatron-core", "tokenizers", "datasets")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_provenance(
    output_file: str | Path, *, config: Any, archive: str, inputs: Iterable[tuple[str, str]], counts: Mapping[str, Any]
) -> None:
    """Write `<output_file>.meta.json`: archive hash, full config, seed, versions, `inputs` (path, hash), counts."""
    settings = dataclasses.asdict(config)
    meta = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "archive_sha256": archive,
        "seed": settings.get("seed"),
        "config": settings,
        "inputs_sha256": dict(inputs),
        "output_sha256": file_sum(output_file),
        "counts": dict(counts),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }
    write_atomically(f"{output_file}.meta.json", [json.dumps(meta, indent=1, ensure_ascii=False), "\n"])
