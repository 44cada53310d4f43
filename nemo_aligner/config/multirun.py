"""Hydra's multirun (`-m data.n=4,8,16`): one process for each job, one folder for each job's output.

    multirun/<config>/data.n=4/<output>     the relative path that the command line gives, or the config

The folder's name is that of what is swept (`hydra.sweep.dir` and `hydra.sweep.subdir` change it), so that the same
command, run again after a kill, finds each job where it was.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.children import dying_with_parent
from nemo_aligner.errors import ConfigError

_FLAGS = ("-m", "--multirun")


def is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def sweep_overrides(config_name: str, arguments: Sequence[str]) -> list[str]:
    """Where the jobs' folders are, unless `arguments`, which follow, say otherwise: named by what is swept."""
    fixed: list[str] = []
    for argument in filter(is_override, arguments):
        try:
            [override] = OverridesParser.create().parse_overrides([argument])
        except HydraException:
            continue  # Hydra says what is wrong with it
        if not override.is_sweep_override():
            fixed.append(override.key_or_group)
    excluded = ",".join(f"'{key}'" for key in fixed)
    return [
        f"hydra.sweep.dir=multirun/{config_name}",
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]",
    ]


def is_job() -> bool:
    """Whether Hydra has begun one of the jobs of a multirun in this process."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_job(cfg: DictConfig, output: str | None, arguments: Sequence[str]) -> None:
    """Run this job as a process of its own, and leave with its exit status where that is not 0.

    `output` is the key of what the command writes, `arguments` the command line, which began the multirun. Raises
    ConfigError for a command that writes nothing, and where other ranks would do the same.
    """
    if output is None:
        raise ConfigError("-m: this command serves until it is stopped, there is nothing to run one after another")
    if "RANK" in os.environ or ("SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1):
        raise ConfigError("-m: each job starts its own processes; start it as one process, with plain python")
    job = HydraConfig.get()
    folder = Path(job.sweep.dir) / job.sweep.subdir
    flags = [argument for argument in arguments if not is_override(argument) and argument not in _FLAGS]
    place = output_in(folder, output, OmegaConf.select(cfg, output))
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    status = _attended([sys.executable, *program, *flags, *job.overrides.task, *place])
    if status:
        print(f"multirun: {folder} ended with {status}; the same command goes on with it", file=sys.stderr, flush=True)
        sys.exit(status)


def output_in(folder: Path, key: str, value: str | None) -> list[str]:
    """The override that puts a job's output into `folder`; none where it writes to the terminal.

    A log folder that nothing names is the job's folder. Raises ConfigError for an absolute path, which every job
    would write.
    """
    if value is None and key.endswith("_file"):
        return []
    if value is not None and Path(value).is_absolute():
        raise ConfigError(f"every job of a multirun would write {value}; give a relative path, or sweep over it", key)
    return ["++" + key + "='" + str(folder / (value or "")).replace("'", "\\'") + "'"]


def _attended(command: Sequence[str]) -> int:
    """Exit status, as a shell has it, of a command that gets this process's signals, and dies with it."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # what came while it was being started

    def tell(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:  # which a terminal sends to both
            return
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    old = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        child = subprocess.Popen(command, preexec_fn=dying_with_parent())
        for number in early:
            child.send_signal(number)
        status = child.wait()
        return status if status >= 0 else 128 - status
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
