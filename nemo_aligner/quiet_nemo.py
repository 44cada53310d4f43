"""NeMo, imported and called without what it does to a process's logging.

Its import takes 5 s, starts telemetry, and turns every later Python warning into a log line of its own; its parts print
and log what concerns their own training scripts. Whoever uses a part of NeMo does so inside `quiet_nemo`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_nemo() -> Iterator[None]:
    """Nothing printed, logged or warned; afterwards log lines and warnings look as they did before."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
