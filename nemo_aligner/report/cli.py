"""Results as one HTML page that needs no network: rewards, KL, curves, seconds, configuration, provenance, samples.

    aligner report results/quickstart
    aligner report results/rloo results/remax -o compared.html
    aligner report results/quickstart --watch

Takes what offline stages, loops, evaluations and training runs wrote, of runs that still go on too. Nothing in the
folders is changed but for the page.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.files import write_atomically
from nemo_aligner.report.page import page
from nemo_aligner.report.runs import Run, read_run
from nemo_aligner.report.samples import ROWS

NAME = "report.html"
_INTERVAL_S = 10.0
_TRIES = 5


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="aligner report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument("folders", type=Path, nargs="+", metavar="RESULTS_DIR", help="one run each")
    own.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help=f"the page (default: {NAME} in RESULTS_DIR, or here where there are several)",
    )  # fmt: skip
    own.add_argument(
        "--watch", type=float, nargs="?", const=_INTERVAL_S, metavar="SECONDS",
        help="look for news every so many seconds (default 10) until the run that it has seen at work ends, or until "
        "Ctrl-C; an open page loads itself again",
    )  # fmt: skip
    own.add_argument(
        "--samples", type=int, default=ROWS, metavar="N",
        help="samples of each set in the page, about (default %(default)s); of more, whole prompts, evenly spread",
    )  # fmt: skip
    return own


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the page that `argv`, or the command line, asks for."""
    run(argv)


def run(argv: Sequence[str] | None = None) -> None:
    """As `main`. Raises AlignerError."""
    given = parser().parse_args(argv)
    if given.samples < 1:
        raise ConfigError(f"{given.samples} is less than 1", "--samples")
    if given.watch is not None and not given.watch >= 1:
        raise ConfigError(f"{given.watch:g} is less than 1 second", "--watch")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folders = list(dict.fromkeys(folder.resolve() for folder in given.folders))
    output = given.output or (folders[0] / NAME if len(folders) == 1 else Path(NAME))
    if given.watch is None:
        write(folders, output, given.samples)
        return
    try:
        watch(folders, output, given.samples, given.watch)
    except KeyboardInterrupt:
        write(folders, output, given.samples)


def write(folders: Sequence[Path], output: Path, samples: int, every_s: float | None = None) -> list[Run]:
    """Write the page of `folders` to `output`, and say where it is."""
    runs = [_read(folder, name, samples) for folder, name in zip(folders, names(folders), strict=True)]
    write_atomically(output, page(runs, every_s=every_s))
    print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)", flush=True)
    return runs


def _read(folder: Path, name: str, samples: int) -> Run:
    """As `read_run`; a stage that ends meanwhile may remove what was about to be read."""
    for _ in range(_TRIES):
        try:
            return read_run(folder, name, samples)
        except FileNotFoundError as fault:
            gone = fault.filename
    raise DataError(f"files go while they are read, such as {gone}; try again", folder)


def watch(folders: Sequence[Path], output: Path, samples: int, every_s: float) -> None:
    """Write the page whenever something in `folders` has changed, until all that wrote there have ended."""
    before, was_written = None, False
    while True:
        now = state(folders, output)
        if now != before:
            before = now
            try:
                runs = write(folders, output, samples, every_s)
            except DataError as fault:
                if not all(folder.is_dir() for folder in folders):
                    raise
                print(f"waiting: {fault}", flush=True)
            else:
                is_written = any(run.writers for run in runs)
                if was_written and not is_written:
                    write(folders, output, samples)
                    return
                was_written |= is_written
        time.sleep(every_s)


def state(folders: Sequence[Path], output: Path) -> set[tuple[Path, int, int]]:
    """What is to be seen of the files there; another state, another page."""
    found = set()
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                if path.is_file() and path != output.resolve() and not path.name.endswith(".nemo"):
                    found.add((path, path.stat().st_size, path.stat().st_mtime_ns))
            except OSError:  # it has gone meanwhile
                continue
    return found


def names(folders: Sequence[Path]) -> list[str]:
    """Of each folder the last parts of its path that tell it from the others."""
    parts = 1
    while True:
        found = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(found)) == len(found):
            return found
        parts += 1
