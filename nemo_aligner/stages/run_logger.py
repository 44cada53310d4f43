"""Where a training run logs: opened when it is known from where the run goes on, closed with how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.data.provenance import write_run_record
from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.errors import OutputError, StoppedEarly
from nemo_aligner.loggers import open_sinks, without_secrets
from nemo_aligner.metrics import MetricsLogger
from nemo_aligner.stages.checkpoint_names import log_dir


@contextlib.contextmanager
def run_logger(
    exp: ExpManagerConfig, cluster: Cluster, config: Mapping[str, Any], resumed_at: int | None
) -> Iterator[MetricsLogger | None]:
    """The logger of a run of `config` on the main rank, None on others; see MetricsLogger for `resumed_at`."""
    if not cluster.is_main:
        yield None
        return
    folder = log_dir(exp)
    sinks = open_sinks(exp, folder, config, resumed=bool(resumed_at))
    logger = MetricsLogger(folder, tensorboard=exp.create_tensorboard_logger, sinks=sinks, resumed_at=resumed_at)
    try:
        if config:
            write_run_record(folder, without_secrets(config))
        yield logger
    except BaseException as fault:
        with contextlib.suppress(OutputError):  # what ended the run is what is reported
            logger.close("aborted" if isinstance(fault, StoppedEarly | KeyboardInterrupt) else "failed")
        raise
    logger.close()
