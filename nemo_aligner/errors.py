"""Every fault a user can cause or meet, as one tree.

    AlignerError                    caught by the entry scripts: printed as one line, exit status 1
    ├── ConfigError                 an override or a YAML value is wrong; names the full key
    ├── DataError                   an input file is wrong; names file and, where there is one, line
    ├── CheckpointError             a .nemo archive or a training checkpoint cannot be read or written
    ├── OutputError                 an output place is not writable, or holds the work of another run
    ├── LaunchError                 processes, devices or ports do not fit what was asked for
    ├── ServerError                 a server cannot start or go on, is not there, or does not answer
    ├── MissingExtraError           a package of an extra, such as [server], is not installed
    ├── RewardError                 a reward function cannot be loaded, or fails on everything
    └── TrainingError               training cannot go on (loss not finite, nothing to train on)

    StoppedEarly                    not a fault: time limit or SIGTERM; state is saved, exit status 75

To add one: subclass the nearest kind, write the message so that it says what is wrong, where, and what would be right.
"""

from __future__ import annotations

from pathlib import Path

EXIT_FAILURE = 1
EXIT_STOPPED_EARLY = 75  # EX_TEMPFAIL of sysexits.h: "run the same command again"


class AlignerError(Exception):
    """Base of all faults reported in one line."""


class ConfigError(AlignerError):
    """A config value is wrong."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class DataError(AlignerError):
    """An input file is wrong."""

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)
        self.path, self.line = path, line


class CheckpointError(AlignerError):
    """An archive or a training checkpoint cannot be used."""


class OutputError(AlignerError):
    """An output place cannot be used."""


class LaunchError(AlignerError):
    """The processes, devices or ports asked for cannot be had."""


class ServerError(AlignerError):
    """A server cannot be started or reached, or cannot go on."""


class MissingExtraError(AlignerError):
    """A package that only some installations have is asked for."""


class RewardError(AlignerError):
    """A reward function is of no use: it cannot be loaded, or it fails again and again."""


class TrainingError(AlignerError):
    """Training cannot go on."""


class StoppedEarly(Exception):
    """The run stopped before its end on purpose, with its state saved; the same command goes on from there."""
