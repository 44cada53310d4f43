"""The lock on what a run writes, of which its first process alone is the holder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_aligner.config.schema import ExpManagerConfig, TrainerConfig
from nemo_aligner.engine.processes.launch import is_rank_zero
from nemo_aligner.errors import OutputError
from nemo_aligner.owner import lock_of, sole_owner
from nemo_aligner.stages.checkpoint_names import log_dir


@contextmanager
def owning(output: str | Path, trainer: TrainerConfig) -> Iterator[None]:
    """No other run writes the file `output` inside the block. Raises OutputError where one does, or none could.

    For the time before torch is imported and other ranks are started.
    """
    if Path(output).is_dir():
        raise OutputError(f"cannot write {output}: a folder has this name, and a file is to be written")
    if is_rank_zero(trainer):
        with sole_owner(lock_of(output)):
            yield
    else:
        yield


@contextmanager
def owning_log_dir(exp: ExpManagerConfig, trainer: TrainerConfig) -> Iterator[None]:
    """No other run trains in the log folder of `exp`. Raises OutputError where one does."""
    with owning(log_dir(exp) / "run", trainer):
        yield
