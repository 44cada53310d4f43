"""One owner for each output: who writes it holds a lock that ends with its process, and a second start is refused.

    <output>.lock    locked (flock) by the process that is named in it; removed at the end, taken over after a kill

flock belongs to the open file, so that the kernel gives it back however the process dies. Over NFS the server keeps it
(Linux makes a byte-range lock of it), where the export and the mount allow locks; where they do not, one line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from nemo_aligner.errors import AlignerError, OutputError
from nemo_aligner.files import writing

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_LAST_WRITES_S = 30.0
"""How long the children of a killed owner may go on with a write that it began; they have its lock until they end."""


def lock_of(output: str | Path) -> Path:
    """The lock of an output file or folder, beside it."""
    return Path(f"{str(output).rstrip('/')}.lock")


@contextlib.contextmanager
def sole_owner(lock: Path) -> Iterator[None]:
    """Hold `lock` inside the block. Raises OutputError, naming the owner, where another process holds it."""
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock)
    try:
        with writing(lock):
            _sign(descriptor, os.getpid())
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # before the lock is given back: whoever gets it then looks whether this is still its file
        os.close(descriptor)


def _locked(lock: Path) -> int:
    """An open descriptor that holds the lock."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(descriptor, lock)
            if _is_still_there(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, lock: Path) -> None:
    begin = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = _owner(descriptor)
            waited = time.monotonic() - begin
            if waited > (_LAST_WRITES_S if _is_gone(owner) else 1.0 if not owner else 0.0):
                raise OutputError(_refusal(lock, owner)) from None
            time.sleep(0.05)
        except OSError as fault:
            if fault.errno not in _NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks, so that a second start would not be noticed", lock)
            return


def _is_still_there(descriptor: int, lock: Path) -> bool:
    """Whether the file that is locked is the one that has the name: its owner may have removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    return False


def _sign(descriptor: int, pid: int) -> None:
    owner = {"host": socket.gethostname(), "pid": pid, "started": datetime.now(UTC).isoformat(timespec="seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{json.dumps(owner)}\n".encode(), 0)


def _owner(descriptor: int) -> dict[str, object]:
    """What the owner wrote of itself; empty in the moment before it does."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"host", "pid", "started"} <= set(found) else {}


def _is_gone(owner: dict[str, object]) -> bool:
    """Whether the process that took the lock is known to be dead."""
    return owner.get("host") == socket.gethostname() and not Path(f"/proc/{owner.get('pid')}").exists()


def _refusal(lock: Path, owner: dict[str, object]) -> str:
    who = f"process {owner['pid']} on {owner['host']}, started {owner['started']}" if owner else "another process"
    return f"another run writes here: {who}, holds {lock}; wait for it to end, stop it, or choose another output"


def main() -> None:
    """For shell scripts: lock the file that is open as --descriptor, for as long as the script has it open.

    Exit status 0: locked; 1: refused, in one line; 3: the file was removed meanwhile, open it again.
    """
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the script")
    given = parser.parse_args()
    try:
        _take(given.descriptor, given.lock)
    except AlignerError as fault:
        sys.exit(f"error: {fault}")
    if not _is_still_there(given.descriptor, given.lock):
        sys.exit(3)
    _sign(given.descriptor, given.pid)


if __name__ == "__main__":
    main()
