"""Starting the processes of a run: plain `python`, torchrun or srun, with the same command line.

torchrun, or RANK/WORLD_SIZE set      taken as they are
srun with several tasks               read from SLURM_*
plain python, trainer.devices = N     this process becomes rank 0 and starts N - 1 copies of its own command line
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from nemo_aligner.children import dying_with_parent
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.processes import standing
from nemo_aligner.errors import EXIT_FAILURE, EXIT_STOPPED_EARLY, LaunchError
from nemo_aligner.ports import free_port

log = logging.getLogger(__name__)

_FIRST_WORD_S = 10.0  # for rank 0 to say itself what ended another rank
_UNTIL_REAPED_S = 2.0
_OF_A_RUN = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_siblings: list[subprocess.Popen[bytes]] = []
_met = threading.Event()  # the ranks have met, and not parted


def signal_siblings(number: int) -> None:
    """Pass a signal that rank 0 got on to the ranks it started."""
    for sibling in _siblings:
        if sibling.poll() is None:
            sibling.send_signal(number)


def launch_local_ranks(trainer: TrainerConfig) -> None:
    """Make sure that this process is one of `devices × num_nodes` ranks, starting the others if that is our part.

    Afterwards RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set. Raises LaunchError when the number of
    processes that exist is not the number asked for.
    """
    wanted = trainer.devices * trainer.num_nodes
    if _has_rank():
        numbers = {name: _number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
        _check_world(numbers["WORLD_SIZE"], trainer, "torchrun")
        _check_meeting_place()
        return
    if _is_slurm_task(trainer):
        _from_slurm(trainer)
        return
    if trainer.num_nodes > 1:
        raise LaunchError(
            f"trainer.num_nodes={trainer.num_nodes} needs one process per device started by srun or torchrun; "
            "plain python starts the processes of one node only"
        )
    _be_rank(0, wanted, 0, "127.0.0.1", free_port())
    if wanted > 1:
        _start_siblings(wanted)


def is_rank_zero(trainer: TrainerConfig) -> bool:
    """Whether this process is, or is going to be, the first of its run; to be asked before the others are started."""
    if _has_rank():
        return os.environ["RANK"] == "0"
    return not _is_slurm_task(trainer) or os.environ["SLURM_PROCID"] == "0"


def _number(name: str) -> int:
    """Of the environment. Raises LaunchError."""
    value = os.environ[name]
    if not value.isdecimal():
        raise LaunchError(f"${name}={value!r} is not a whole number; torchrun and srun set it, and nobody else should")
    return int(value)


def _has_rank() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _is_slurm_task(trainer: TrainerConfig) -> bool:
    """Whether srun started this process as one of several of a run."""
    # a batch script has SLURM_NTASKS and SLURM_PROCID too; only a task that srun started is one of several
    several = "SLURM_NTASKS" in os.environ and "SLURM_STEP_ID" in os.environ and _number("SLURM_NTASKS") > 1
    return several and trainer.devices * trainer.num_nodes > 1


def _check_world(world: int, trainer: TrainerConfig, launcher: str) -> None:
    wanted = trainer.devices * trainer.num_nodes
    if world != wanted:
        raise LaunchError(
            f"{launcher} started {world} processes, but trainer.devices={trainer.devices} × "
            f"trainer.num_nodes={trainer.num_nodes} asks for {wanted}"
        )


def _check_meeting_place() -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing and os.environ["WORLD_SIZE"] != "1":
        raise LaunchError(
            f"RANK and WORLD_SIZE are set, and {' and '.join(missing)} not; set them, or none of the four"
        )
    if os.environ.get("MASTER_PORT") == "0":
        raise LaunchError("MASTER_PORT=0: no rank can be met there; torchrun --standalone finds a free port by itself")


def _from_slurm(trainer: TrainerConfig) -> None:
    env = os.environ
    world = _number("SLURM_NTASKS")
    _check_world(world, trainer, "srun")
    one_node = env.get("SLURM_STEP_NUM_NODES", "") == "1"
    address = "127.0.0.1" if one_node else _first_address(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    port = 15000 + int(env.get("SLURM_JOB_ID", "0")) % 20000  # the same on every task without talking
    _be_rank(_number("SLURM_PROCID"), world, _number("SLURM_LOCALID"), address, port)


def _first_address(nodelist: str) -> str:
    """Where the first node of a Slurm node list is reached: its name, or what Slurm itself calls it by."""
    host = _first_host(nodelist)
    try:
        socket.getaddrinfo(host, None)
    except OSError:  # a name that only Slurm knows, as where several nodes share a machine
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
        match = re.search(r"NodeAddr=(\S+)", shown.stdout)
        if match is None:
            raise LaunchError(f"the first node of this Slurm step, {host}, has no address here") from None
        return match.group(1)
    return host


def _first_host(nodelist: str) -> str:
    """First host of a Slurm node list such as `gpu[003-005,9],cpu1`."""
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):  # no scontrol inside a container
        match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
        if match is None:
            raise LaunchError(f"cannot read a host name out of the Slurm node list {nodelist!r}") from None
        return match.group(1) + (match.group(2) or "")


def _be_rank(rank: int, world: int, local_rank: int, address: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank), MASTER_ADDR=address, MASTER_PORT=str(port)
    )


def _start_siblings(world: int) -> None:
    """Start ranks 1..world-1 of this node, tied to this process in life and death; those that stand by are there."""
    tied, own, first = dying_with_parent(), sys.orig_argv[1:], not _siblings
    program, stdin = (own, None) if standing.program is None else (standing.program, subprocess.PIPE)
    for rank in range(1 + len(_siblings), world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        _siblings.append(
            subprocess.Popen(
                [sys.executable, *program], env=env, stdin=stdin, stdout=subprocess.DEVNULL, preexec_fn=tied
            )
        )
    for sibling in _siblings[: world - 1]:
        if sibling.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone, which _watch sees
                standing.send(sibling.stdin, [f"{name}={os.environ[name]}" for name in _OF_A_RUN] + own)
    if first:
        threading.Thread(target=_watch, daemon=True).start()


def how_sibling_ended(rank: int) -> str | None:
    """How a rank ended that this process started, waiting for it a moment; None where it has not, or is not ours."""
    if not 0 < rank <= len(_siblings):
        return None
    try:
        status = _siblings[rank - 1].wait(timeout=_UNTIL_REAPED_S)
    except subprocess.TimeoutExpired:
        return None
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Inside the block the ranks agree when to stop; outside it one that does so leaves the others waiting for it."""
    _met.set()
    try:
        yield
    finally:
        _met.clear()


def end_process(said: str | None, status: int = EXIT_FAILURE) -> None:
    """Leave at once, with all that this process started, whatever its other threads wait for."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    if said is not None:
        print(said, file=sys.stderr, flush=True)
    os._exit(status)


def _watch() -> None:
    """End the run once a sibling has failed: until ranks have met rank 0 would wait for it, and nobody else says so."""
    while True:
        statuses = [sibling.poll() for sibling in _siblings]
        for rank, status in enumerate(statuses, 1):
            if status in (None, 0) or (status == EXIT_STOPPED_EARLY and _met.is_set()):
                continue  # who stopped early on purpose did so together with rank 0, which ends by itself
            time.sleep(_FIRST_WORD_S)
            if status == EXIT_STOPPED_EARLY:
                end_process(f"stopped early with rank {rank}; run the same command again to go on", status)
            end_process(f"error: rank {rank} {how_sibling_ended(rank)}; what it said is above")
        if None not in statuses:
            return
        time.sleep(0.2)
