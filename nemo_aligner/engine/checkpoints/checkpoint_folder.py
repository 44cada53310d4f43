"""What can be said of a training checkpoint without loading it; see training_state."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_aligner.checksums import check_sums
from nemo_aligner.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
PARTIAL = ".partial"


def read_state(folder: Path) -> dict[str, Any]:
    """The state file of a checkpoint. Raises CheckpointError when there is none or it is not ours."""
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint, it has no {STATE}")
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: cannot be read as JSON ({fault})") from None
    if not isinstance(state, dict) or "format" not in state or not isinstance(state.get("files", {}), dict):
        raise CheckpointError(f"{path}: not the state of a checkpoint")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {state['format']} is not {FORMAT}")
    return state


def check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Raise CheckpointError where a file of the checkpoint is missing or has another size than was written."""
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            told = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{path}: not as it was saved: it {told}, {size} bytes were written")


def check_whole(folder: Path) -> bool:
    """Raise CheckpointError, naming the file, where a checkpoint is not what was saved.

    Reads every byte of it: sizes first, then the sums. False where none were stored, as by earlier versions.
    """
    check_sizes(folder, read_state(folder).get("files", {}))
    try:
        return check_sums(folder)
    except CheckpointError as fault:
        raise CheckpointError(f"{folder}/{fault}") from None


def remove_unfinished(root: Path) -> None:
    """Remove below `root` what no reader looks at: saves and removals that a kill cut short. Raises OSError."""
    for leftover in root.glob(f"*{PARTIAL}/"):
        shutil.rmtree(leftover)


def remove(folder: Path) -> None:
    """Remove a checkpoint, which is no longer one from the first moment on. Raises OSError."""
    going = folder.with_name(f"{folder.name}.dropped{PARTIAL}")
    folder.rename(going)
    shutil.rmtree(going)


def latest(root: Path, *, tell: bool = True) -> Path | None:
    """The complete checkpoint below `root` with the most steps by its state file; others are logged if `tell`."""
    found = _complete(root, tell=tell)
    return found[0] if found else None


def latest_whole(root: Path) -> Path | None:
    """As `latest`, of the checkpoints that are what was saved, to the last byte; says which it passes over."""
    return first_whole(_complete(root, tell=True))


def first_whole(folders: Iterable[Path]) -> Path | None:
    """The first checkpoint that is what was saved; says which it passes over."""
    for folder in folders:
        try:
            check_whole(folder)
            return folder
        except CheckpointError as fault:
            log.warning("damaged, the next one is taken: %s", fault)
    return None


def _complete(root: Path, *, tell: bool) -> list[Path]:
    """Most steps first."""
    found: list[tuple[int, Path]] = []
    for path in sorted(root.glob("*/")) if root.is_dir() else []:
        if path.name.endswith(PARTIAL):
            if tell:
                log.info("%s: passed over, its save was interrupted", path)
            continue
        try:
            state = read_state(path)
            check_sizes(path, state.get("files", {}))
            found.append((int(state["step"]), path))
        except (CheckpointError, KeyError, TypeError, ValueError) as fault:
            if tell:
                log.info("passed over: %s", fault if isinstance(fault, CheckpointError) else f"{path} has no step")
    return [path for _, path in sorted(found, reverse=True)]
