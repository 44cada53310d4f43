"""Whether what lies on a disk is what was written: archives, checkpoints, journals, and JSONL with its provenance.

Nothing is loaded, unpacked or changed; every byte is read once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_aligner.checksums import SUMS, check_sums, compare, file_sum, parse_sums, stream_sum
from nemo_aligner.data.journal import FINGERPRINT, check_journal
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.engine.checkpoints.archive_tar import checked_members, open_tar, read_member
from nemo_aligner.engine.checkpoints.checkpoint_folder import PARTIAL, STATE, check_whole, read_state
from nemo_aligner.engine.checkpoints.nemo_archive import CONFIG
from nemo_aligner.errors import AlignerError, DataError

_NO_SUMS = "no sums are stored in it, so that only its form could be checked"
_ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Verdict:
    """Of one archive, checkpoint, journal or JSONL file: what was found, or what is wrong."""

    path: Path
    said: str
    is_sound: bool

    def __str__(self) -> str:
        return f"{'sound  ' if self.is_sound else 'DAMAGED'} {self.path}: {self.said}"


def verify(path: Path) -> Iterator[Verdict]:
    """The verdict of `path`, or of all below it where it is a plain folder. Raises DataError where there is none."""
    if not path.exists():
        raise DataError("no such file or folder", path)
    found = False
    for verdict in _below(path):
        found = True
        yield verdict
    if not found:
        raise DataError("neither an archive, a checkpoint, a journal or JSONL, nor a folder that holds one", path)


def _below(path: Path) -> Iterator[Verdict]:
    for applies, check in _KINDS:
        if applies(path):
            try:
                yield Verdict(path, check(path), True)
            except (AlignerError, OSError) as fault:
                yield Verdict(path, str(fault).removeprefix(f"{path}: ").removeprefix(f"{path}/"), False)
            return
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            yield from _below(entry)


def _archive(path: Path) -> str:
    with open_tar(path, "archive") as tar:
        read_member(tar, CONFIG, path, "archive")
        files = [member for member in checked_members(tar, path, "archive") if member.isfile()]
        names = {member.name.removeprefix("./"): member for member in files}
        if SUMS not in names:
            return f"archive of {len(files)} files; {_NO_SUMS}"
        wanted = parse_sums(read_member(tar, SUMS, path, "archive"))
        compare(
            wanted,
            (
                (name, stream_sum(tar.extractfile(names[name])) if name in names else None)  # type: ignore[arg-type]
                for name in wanted
            ),
        )
    return f"archive of {len(files)} files"


def _extracted(path: Path) -> str:
    return "extracted archive" if check_sums(path) else f"extracted archive; {_NO_SUMS}"


def _checkpoint(path: Path) -> str:
    has_sums = check_whole(path)
    return f"checkpoint of step {read_state(path).get('step')}{'' if has_sums else f'; {_NO_SUMS}'}"


def _unfinished(path: Path) -> str:
    return "what an interrupted save left; the next one removes it"


def _journal(path: Path) -> str:
    rows, torn = check_journal(path)
    return f"journal of {rows} rows{', and one that a kill cut off: it is made again' if torn else ''}"


def _rows(path: Path) -> str:
    said = f"{len(load_rows(path, required={}))} rows"
    provenance = path.with_name(f"{path.name}.meta.json")
    if not provenance.is_file():
        return said
    try:
        meta = json.loads(provenance.read_text())
        wanted, inputs = meta["output_sha256"], dict(meta["inputs_sha256"])
    except (ValueError, KeyError, TypeError):
        raise DataError("not a provenance file of this program", provenance) from None
    if file_sum(path) != wanted:
        raise DataError(f"not what {provenance.name} says was written", path)
    changed = [name for name, own in inputs.items() if Path(name).is_file() and file_sum(name) != own]
    return f"{said}, as {provenance.name} says" + (f"; changed since: {', '.join(changed)}" if changed else "")


def _is_archive(path: Path) -> bool:
    return path.is_file() and path.suffix == ".nemo"


_KINDS = (
    (_is_archive, _archive),
    (lambda path: path.name.endswith(PARTIAL), _unfinished),
    (lambda path: (path / CONFIG).is_file(), _extracted),
    (lambda path: (path / STATE).is_file(), _checkpoint),
    (lambda path: (path / FINGERPRINT).is_file(), _journal),
    (lambda path: path.is_file() and path.name.endswith(_ROWS), _rows),
)
