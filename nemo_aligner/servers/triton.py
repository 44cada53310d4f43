"""PyTriton with one model, for a gate of ours: it listens on this machine alone, at a port that nobody is told."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nemo_aligner.config.serving import ServingConfig
from nemo_aligner.errors import ServerError
from nemo_aligner.ports import free_port
from nemo_aligner.scratch import remove_leftovers, scratch_folder, scratch_root

if TYPE_CHECKING:
    from pytriton.triton import Triton

    from nemo_aligner.servers.gate import Gate

log = logging.getLogger(__name__)

_FOLDER = "nemo_aligner_server_"  # and the number of the process
_SHARED_MEMORY, _SEGMENT = Path("/dev/shm"), "pytrtion"  # so PyTriton spells what it begins names with, and the number

_STARTS = 3
"""Triton may fail while it starts, for reasons of its own, and come up the next time."""

Handler = Callable[[Sequence[Mapping[str, np.ndarray]]], list[dict[str, np.ndarray]]]
"""From the requests of one batch to their answers."""


class Spec(NamedTuple):
    """A tensor of a request, which it may lack, or of an answer, which has one value a row."""

    name: str
    dtype: type


@contextlib.contextmanager
def running_triton(
    config: ServingConfig,
    handle: Handler,
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    start: Callable[[Callable[[], None]], bool],
) -> Iterator[Gate | None]:
    """The way to a Triton that has started, None where `start` did not do what it was given. Raises ServerError."""
    find_shared_python()
    check_port_is_free(config.ip, config.port)
    for name in ("pytriton", "sh"):  # they say much at the level of INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    _remove_leftovers(scratch_root())

    def make(folder: Path, port: int, access: str) -> Triton:
        triton = _triton(folder, port, access)
        _bind(triton, config, handle, inputs, outputs)
        return triton

    with contextlib.ExitStack() as stack:
        for left in reversed(range(_STARTS)):
            try:
                gate = stack.enter_context(_one_triton(make, start, config))
                break
            except ServerError as fault:
                if not left:
                    raise
                log.warning("%s; it is started again", fault)
        yield gate


@contextlib.contextmanager
def _one_triton(
    make: Callable[[Path, int, str], Triton], start: Callable[[Callable[[], None]], bool], config: ServingConfig
) -> Iterator[Gate | None]:
    from nemo_aligner.servers.gate import Gate

    port, access = free_port(), secrets.token_urlsafe(32)
    folder = scratch_root() / f"{_FOLDER}{os.getpid()}_{secrets.token_hex(4)}"
    with scratch_folder(folder):
        triton = make(folder, port, access)
        started = _start(triton, start, config, folder)
        try:
            yield Gate(f"http://127.0.0.1:{port}", access) if started else None
        finally:
            log.info("the reward server stops, which takes some seconds")
            triton.stop()
            log.info("reward server stopped")


def _triton(folder: Path, port: int, access: str) -> Triton:
    from pytriton.triton import VALID_TRITON_ENDPOINTS, Triton, TritonConfig, TritonSecurityConfig

    return Triton(
        config=TritonConfig(
            http_address="127.0.0.1",
            http_port=port,
            allow_grpc=False,
            allow_metrics=False,
            exit_timeout_secs=5,
            log_file=_log_of(folder),
        ),
        workspace=folder / "workspace",
        # its own look at whether it is ready comes without the token
        security_config=TritonSecurityConfig(access, sorted(VALID_TRITON_ENDPOINTS - {"health"})),
    )


def _log_of(folder: Path) -> Path:
    return folder / "triton.log"


def _bind(
    triton: Triton, config: ServingConfig, handle: Handler, inputs: Sequence[Spec], outputs: Sequence[Spec]
) -> None:
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.proxy.types import Request

    def infer(requests: Sequence[Request]) -> list[dict[str, np.ndarray]]:
        return handle([request.data for request in requests])

    triton.bind(
        model_name=config.model_name,
        infer_func=infer,
        inputs=[Tensor(name=name, dtype=dtype, shape=(-1,), optional=True) for name, dtype in inputs],
        outputs=[Tensor(name=name, dtype=dtype, shape=(1,)) for name, dtype in outputs],
        config=ModelConfig(
            max_batch_size=config.max_batch_size,
            batcher=DynamicBatcher(max_queue_delay_microseconds=config.max_queue_delay_microseconds),
        ),
    )


def _start(triton: Triton, start: Callable[[Callable[[], None]], bool], config: ServingConfig, folder: Path) -> bool:
    """What `start` says. Raises ServerError with the last error of Triton's own log."""
    from nemo_aligner.servers.gate import roomy_stacks

    try:
        with roomy_stacks():
            return start(triton.run)
    except Exception as fault:
        triton.stop()
        own_log = _log_of(folder)
        lines = own_log.read_text().splitlines() if own_log.exists() else []
        said = [line for line in lines if line.startswith("E")] or [str(fault)]
        raise ServerError(f"Triton did not start on {config.ip}:{config.port}: {' '.join(said[-1].split())}") from None


def _remove_leftovers(root: Path) -> None:
    """Remove what killed servers left in `root`, and the shared memory of their Tritons."""
    for name in remove_leftovers(root, _FOLDER):
        pid = name.removeprefix(_FOLDER).partition("_")[0]
        for segment in _SHARED_MEMORY.glob(f"{_SEGMENT}{pid}-*"):
            with contextlib.suppress(OSError):  # another user's
                segment.unlink()


def check_port_is_free(ip: str, port: int) -> None:
    """Raises ServerError where something else listens already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as fault:
            raise ServerError(f"inference.ip={ip}, inference.port={port}: {fault.strerror}; choose another") from None


def find_shared_python() -> None:
    """Let Triton's Python backend load the libpython of this interpreter, not another one of the system.

    Raises ServerError where the interpreter has no shared libpython.
    """
    folder, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    if not folder or not name or ".so" not in name or not (Path(folder) / name).exists():
        raise ServerError(
            f"this Python has no shared library ({name or 'libpython'} in {folder}), which Triton's Python backend "
            "needs; use one built with --enable-shared, such as the distribution's or conda's"
        )
    others = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ["LD_LIBRARY_PATH"] = f"{folder}:{others}" if others else str(folder)
