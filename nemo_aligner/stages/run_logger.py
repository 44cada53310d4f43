"""Where a run logs: opened when it is known from where the run goes on, closed with how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_aligner.checksums import known_sum
from nemo_aligner.config.loggers import LoggersConfig
from nemo_aligner.config.offline import OfflineConfig
from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.config.secrets import without_secrets
from nemo_aligner.data.provenance import write_run_record
from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.errors import OutputError, StoppedEarly
from nemo_aligner.loggers import open_sinks
from nemo_aligner.metrics import MetricsLogger
from nemo_aligner.records import Keys, Sample
from nemo_aligner.stages.checkpoint_names import log_dir


@contextlib.contextmanager
def run_logger(
    exp: ExpManagerConfig, cluster: Cluster, config: Mapping[str, Any], resumed_at: int | None, samples: int = 0
) -> Iterator[MetricsLogger | None]:
    """The logger of a training run of `config` on the main rank, None on others; see MetricsLogger for the rest."""
    if not cluster.is_main:
        yield None
        return
    with _logger(exp, log_dir(exp), config, resumed_at, samples, resumed=bool(resumed_at)) as logger:
        if config:
            write_run_record(log_dir(exp), config)
        yield logger


@contextlib.contextmanager
def output_logger(cfg: OfflineConfig, cluster: Cluster, made_with: Mapping[str, Any]) -> Iterator[MetricsLogger | None]:
    """The logger of a run that writes `cfg.output_file`, on the main rank; None on others, and without any asked for.

    A run goes on where one was that is made with the same, and has the same settings but for processes and loggers;
    what it says again at the end stands there once.
    """
    exp = cfg.exp_manager
    if not cluster.is_main or not (exp.create_tensorboard_logger or exp.external_loggers()):
        yield None
        return
    config = asdict(cfg)
    settings = {name: value for name, value in config.items() if name not in ("trainer", "exp_manager")}
    digest = hashlib.sha256(json.dumps([made_with, settings], sort_keys=True, default=str).encode()).hexdigest()
    folder = Path(exp.explicit_log_dir or f"{cfg.output_file}_log")
    with _logger(exp, folder, config, 0, exp.log_samples, resumed=True, made_with=digest) as logger:
        yield logger
        logger.note("output_sha256", known_sum(cfg.output_file))


@contextlib.contextmanager
def _logger(
    exp: LoggersConfig, folder: Path, config: Mapping[str, Any], resumed_at: int | None, samples: int, **sinks: Any
) -> Iterator[MetricsLogger]:
    logger = MetricsLogger(
        folder,
        tensorboard=exp.create_tensorboard_logger,
        sinks=open_sinks(exp, folder, config, **sinks),
        resumed_at=resumed_at,
        config=without_secrets(config),
        samples=samples,
    )
    try:
        yield logger
    except BaseException as fault:
        with contextlib.suppress(OutputError):  # what ended the run is what is reported
            logger.close("aborted" if isinstance(fault, StoppedEarly | KeyboardInterrupt) else "failed")
        raise
    logger.close()


def one_of_each_prompt(
    rows: Iterable[Mapping[str, Any]], keys: Keys, limit: int, fields: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The first row of each of the first `limit` prompts: prompt, response and `fields`."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if len(found) == limit:
            break
        sample = Sample.of(row, keys)
        prompt = sample.input if sample.turns is None else sample.turns.shown
        found.setdefault(
            sample.prompt_id, {keys.input: prompt, keys.output: sample.output, **{name: row[name] for name in fields}}
        )
    return [*found.values()]
