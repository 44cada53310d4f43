"""How a script starts: Hydra composes its YAML, and every fault a user can cause ends in one line.

exit status 0     done
exit status 1     `error: ...` on stderr: wrong config, data, archive or disk
exit status 75    stopped early on purpose (time limit, SIGTERM, SIGUSR1), state saved; the same command goes on
"""

from __future__ import annotations

# ahead of what may be missing
import nemo_aligner.config.requirements  # noqa: F401

# isort: split
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.config.aliases import Aliases, let_through
from nemo_aligner.config.folders import SHARED_CONF
from nemo_aligner.config.multirun import is_job, is_override, run_job, sweep_overrides
from nemo_aligner.config.overrides import explained, group_fault
from nemo_aligner.config.pipes import as_long_as_somebody_reads
from nemo_aligner.config.resolvers import register_resolvers
from nemo_aligner.config.usage import usage
from nemo_aligner.errors import EXIT_FAILURE, EXIT_STOPPED_EARLY, AlignerError, ConfigError, StoppedEarly

# as NeMo's hydra_runner: stay in the working directory, make no folder for outputs, log to the console alone
_RUN_IN_PLACE = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)
"""What a disk says of itself, whoever asked it: no fault of the program's."""


class SharedConf(SearchPathPlugin):
    """Makes the groups of conf/shared (model, optim, trainer) reachable from any script, folder and --config-path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("nemo_aligner", f"file://{SHARED_CONF}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the faults a user can cause into one line and an exit status; anything else keeps its traceback."""
    try:
        with as_long_as_somebody_reads():
            yield
    except StoppedEarly as stop:
        _say(f"stopped early: {stop}; run the same command again to go on")
        sys.exit(EXIT_STOPPED_EARLY)
    except (AlignerError, HydraException, OmegaConfBaseException) as fault:
        _say(f"error: {_one_line(fault)}")
        sys.exit(EXIT_FAILURE)
    except MemoryError as fault:
        what = f" ({_one_line(fault)})" if str(fault) else ""
        _say(f"error: out of memory{what}; use smaller batches or shorter rows, or a machine with more")
        sys.exit(EXIT_FAILURE)
    except OSError as fault:
        if fault.errno not in _OF_THE_DISK:
            raise
        _say(f"error: {fault.filename or 'a file'}: {fault.strerror}")
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


@contextmanager
def told_to_stop() -> Iterator[None]:
    """SIGTERM and SIGUSR1 (Slurm's warning) are exit status 75 too where there is nothing to save, as in a load.

    What has something to save takes their handlers' place meanwhile. Of two signals the second one kills.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _say(f"stopped early: {signal.Signals(number).name}; run the same command again to go on")
        sys.exit(EXIT_STOPPED_EARLY)  # no Exception, which a library might catch

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """One line on stderr; other ranks than 0 say who they are."""
    rank = os.environ.get("RANK", "0")
    print(line if rank == "0" else f"[rank {rank}] {line}", file=sys.stderr, flush=True)


def _one_line(fault: Exception) -> str:
    """Hydra and OmegaConf spread a message over lines, hints and causes; keep what names the key."""
    text = str(fault).partition("\nConfig search path:")[0]
    if not isinstance(fault, HydraException | OmegaConfBaseException):
        return " ".join(text.split())
    cause = fault.__cause__
    if isinstance(cause, Exception) and isinstance(cause, OmegaConfBaseException | HydraException):
        text = f"{text} {str(cause).splitlines()[0]}"
    noise = ("object_type=", "reference_type=", "Set the environment variable", "To append to your config use")
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(noise))


def _with_overrides(arguments: list[str], more: list[str]) -> list[str]:
    """`arguments` with `more` overrides put before the first override there, or at the end.

    Hydra's parser takes overrides in one run only: between flags, or after them, but not in two places.
    """

    first = next((i for i, argument in enumerate(arguments) if is_override(argument)), len(arguments))
    return [*arguments[:first], *more, *arguments[first:]]


@dataclass(frozen=True)
class Entry:
    """A command's main: composes `config_dir/config_name.yaml` with the command line's overrides, and calls `task`."""

    task: Callable[[DictConfig], None]
    config_name: str
    config_dir: Path
    aliases: Aliases
    output: str | None

    def __call__(self) -> None:
        arguments, name, folder = sys.argv[1:], self.config_name, self.config_dir
        answer = usage(arguments, self.task.__globals__.get("__doc__"), folder, name, SHARED_CONF)
        if answer is not None:
            with as_long_as_somebody_reads():
                sys.stdout.write(f"{answer}\n")
            return

        began = False

        def checked(cfg: DictConfig) -> None:
            nonlocal began
            began = True
            with one_line_errors(), told_to_stop():
                if is_job():
                    run_job(cfg, self.output, arguments)
                else:
                    self.task(cfg)

        Plugins.instance().register(SharedConf)
        register_resolvers()
        # Hydra prints faults its own way unless told to let them through; ours are printed by one_line_errors
        os.environ["HYDRA_FULL_ERROR"] = "1"
        if not {"-sc", "--shell-completion"} & set(arguments):
            ours = [*_RUN_IN_PLACE, *sweep_overrides(name, arguments)]
            sys.argv[1:] = _with_overrides(let_through(arguments, self.aliases), ours)
        with one_line_errors():
            try:
                hydra.main(config_path=str(folder), config_name=name, version_base=None)(checked)()
            except HydraException as fault:
                said = explained(fault, folder / f"{name}.yaml")
                raise fault if said is None else ConfigError(said) from None
            except ValueError as fault:
                if began:
                    raise
                raise ConfigError(group_fault(sys.argv[1:], SHARED_CONF) or str(fault)) from None


def script(
    config_name: str, config_dir: Path, aliases: Aliases | None = None, output: str | None = None
) -> Callable[[Callable[[DictConfig], None]], Entry]:
    """Decorator that makes an `Entry` of a function.

    `aliases` are older names of keys, which load_config puts in their new places; `output` is the key of what the
    command writes, which a multirun gives each job a place of its own for.
    """
    return lambda task: Entry(task, config_name, config_dir, aliases or {}, output)
