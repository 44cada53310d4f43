"""What a run shows: progress with rate and ETA; scalars, samples and more to TensorBoard, JSON lines, other loggers."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nemo_aligner.errors import OutputError
from nemo_aligner.event_file import PATTERN, EventFile, shown_before

log = logging.getLogger(__name__)

_LINE_EVERY_S = 60.0


class Progress:
    """Counts samples or steps, with their rate, tokens/s and ETA; silent but on the rank that shows it.

    A bar on a terminal; elsewhere, as in a log file, a line a minute at most, and one at the end. A context manager:
    what is said of the end, good or bad, stands below it.
    """

    def __init__(self, name: str, total: int, *, show: bool, done: int = 0, unit: str = "sample") -> None:
        from tqdm import tqdm

        self._name, self._total, self._first, self._unit = name, total, done, unit
        self._count, self._tokens, self._shown = done, 0, dict[str, str]()
        self._start = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._prints_lines = show and not on_terminal
        self._next_line = self._start + _LINE_EVERY_S
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, disable=not (show and on_terminal))

    def advance(self, count: int, tokens: int = 0, **values: float) -> None:
        """`count` more are done, made of `tokens` tokens; `values` stand behind them."""
        count = min(count, self._total - self._count)  # other ranks are taken to be as far as this one
        now = time.monotonic()
        self._count += count
        self._tokens += tokens
        self._shown = {name: f"{value:.4g}" for name, value in values.items()}
        if self._tokens:
            self._shown["tokens/s"] = f"{self._tokens / max(1e-9, now - self._start):.0f}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(count)
        if now >= self._next_line:
            self._next_line = now + _LINE_EVERY_S
            self._print_line(now)

    def _print_line(self, now: float) -> None:
        if not self._prints_lines:
            return
        line = self._bar.format_meter(
            self._count, self._total, now - self._start, ncols=0, prefix=self._name, unit=self._unit,
            initial=self._first, postfix=", ".join(f"{name}={value}" for name, value in self._shown.items()),
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._print_line(time.monotonic())


Row = Mapping[str, Any]


class Sink(Protocol):
    """Where scalars go besides files: a logger of another package, of one run."""

    continues: bool  # a run that was stopped goes on in it

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def log_table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Samples, all with the same fields."""

    def note(self, name: str, value: str) -> None:
        """What is known of a run when it ends."""

    def archived(self, path: Path) -> None:
        """The archive is written."""

    def close(self, status: str) -> None:
        """`status` is success, aborted (to go on later) or failed."""


class MetricsLogger:
    """Scalars of a run, by step, into `<folder>/metrics.jsonl`, TensorBoard, and what else is asked for.

    TensorBoard and sinks show some samples too, and TensorBoard `config`, as the sinks do by themselves.
    `resumed_at` is the `position` that the checkpoint holds from which the run goes on: what was logged after it will
    be logged again, so it is cut off; a sink that continues has it already, and gets it once. Raises OutputError when
    the disk does not take them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        sinks: Sequence[Sink] = (),
        resumed_at: int | None = None,
        config: Mapping[str, Any] | None = None,
        samples: int = 0,
    ) -> None:
        """`samples`: how many are shown of those that come with scalars."""
        self._folder, self._sinks, self._samples, self._step = folder, sinks, samples, 0
        self._events: EventFile | None = None
        self._logged_before: set[tuple[int, str]] = set()  # (step, first name) of what was cut off
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            self._file = path.open("a", encoding="utf-8")
            if resumed_at is not None and resumed_at < self._file.tell():
                self._logged_before = set(_rows_after(path, resumed_at))
                self._file.truncate(resumed_at)
            if tensorboard:
                self._events = self._opened_events(resumed_at is not None)
                if config:
                    self._events.add_text(0, "config", _verbatim(json.dumps(config, indent=1, default=str)))

    def _opened_events(self, resumes: bool) -> EventFile:
        """TensorBoard's file; of a run that resumes, one with what metrics.jsonl holds, in place of all others."""
        if not resumes:
            return EventFile(self._folder)
        before, others = shown_before(self._folder), list(self._folder.glob(PATTERN))
        events = EventFile(self._folder)
        path = self._folder / "metrics.jsonl"
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                step, scalars = _scalars(line, f"{path}:{number}")
                first = next(iter(scalars), "")
                self._step = step
                events.add(step, scalars, before.times.get((step, first)))
                table = step, _table(first.partition("/")[0])
                if table in before.texts:
                    events.add_text(*table, before.texts[table], before.times[table])
        for path in others:
            path.unlink()
        return events

    def log(self, step: int, prefix: str, values: Mapping[str, float], samples: Sequence[Row] = ()) -> None:
        """Write `prefix/name` for every value at `step`, and the first of `samples` as the table `table/prefix`.

        Samples of every step in one order, or nobody could watch them change.
        """
        scalars = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        rows, self._step = samples[: self._samples], step
        with _writing(self._folder):
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.add(step, scalars)
                if rows:
                    self._events.add_text(step, _table(prefix), "\n\n".join(map(_markdown, rows)))
        for sink in self._sinks:
            if not (sink.continues and (step, next(iter(scalars), "")) in self._logged_before):
                sink.log(step, scalars)
                if rows:
                    sink.log_table(step, _table(prefix), rows)

    @property
    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far."""
        return self._file.tell()

    def note(self, name: str, value: str) -> None:
        """What is known of the run when it ends, such as the hash of what it wrote."""
        with _writing(self._folder):
            if self._events is not None:
                self._events.add_text(self._step, name, value)
        for sink in self._sinks:
            sink.note(name, value)

    def archived(self, path: Path, sha256: str) -> None:
        """The run's archive is written, with this hash: loggers that keep models may take it."""
        self.note("archive_sha256", sha256)
        for sink in self._sinks:
            sink.archived(path)

    def close(self, status: str = "success") -> None:
        """`status` is success, aborted (to go on later) or failed."""
        for sink in self._sinks:
            sink.close(status)
        with _writing(self._folder):
            self._file.close()
            if self._events is not None:
                self._events.close()


def _table(prefix: str) -> str:
    return f"table/{prefix}"


def _markdown(row: Row) -> str:
    """Numbers in a line, texts below it as they are."""
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    told = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in texts
    ]
    head = [f"**{', '.join(told)}**"] if told else []
    return "\n\n".join([*head, *(f"{name}\n\n{_verbatim(text)}" for name, text in texts.items())])


def _verbatim(text: str) -> str:
    """As Markdown that shows it letter by letter."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _scalars(line: str, where: str) -> tuple[int, dict[str, float]]:
    """(step, values by name) of a line of metrics.jsonl. Raises OutputError for one that is damaged."""
    try:
        row = json.loads(line)
        return int(row.pop("step")), {name: float(value) for name, value in row.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OutputError(f"{where}: damaged; remove that line") from None


def _rows_after(path: Path, position: int) -> Iterator[tuple[int, str]]:
    """(step, first name) of every whole line of metrics.jsonl behind `position`."""
    with path.open("rb") as stream:
        stream.seek(position)
        for line in stream:
            if line.endswith(b"\n"):
                step, *names = json.loads(line).items()
                yield step[1], next((name for name, _ in names), "")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the disk refuses, as OutputError."""
    try:
        yield
    except OSError as fault:
        raise OutputError(f"cannot write metrics into {folder}: {fault.strerror or fault}") from fault


class Timers:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
