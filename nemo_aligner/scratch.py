"""Private temporary folders: what a killed process left of its own is removed by the next that makes one.

The process that makes a folder holds a lock (flock) on it for as long as it lives, so that one which can be locked has
no owner any more, whatever its number of a process is in whichever container.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nemo_aligner.errors import OutputError

log = logging.getLogger(__name__)


def scratch_root() -> Path:
    """Where temporary folders go: TMPDIR, or the system's place. Raises OutputError where there is none."""
    try:
        return Path(tempfile.gettempdir())
    except OSError as fault:
        raise OutputError(f"{fault.strerror}; set TMPDIR to one") from fault


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[None]:
    """Inside the block `path` is a folder that only this user enters. Raises OutputError where it cannot be made."""
    try:
        descriptor = _made(path)
    except OSError as fault:
        raise OutputError(f"cannot write {path}: {fault.strerror or fault}; set TMPDIR to another place") from fault
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _made(path: Path) -> int:
    """An open descriptor of the new folder, which holds its lock where the file system has any."""
    while True:
        path.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # until it was locked, another may have taken it for one left
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)


def remove_leftovers(root: Path, prefix: str) -> list[str]:
    """Remove this user's folders in `root` of that prefix whose process is gone; their names."""
    return [folder.name for folder in root.glob(f"{prefix}*/") if _removed(folder)]


def _removed(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # another user's, or gone
        return False
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.info("removing %s, left by a process that was killed", folder)
        shutil.rmtree(folder, ignore_errors=True)
        return True
    except OSError:  # its process lives, or the file system has no locks
        return False
    finally:
        os.close(descriptor)
