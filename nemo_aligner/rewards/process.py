"""One worker process seen from its parent: no call takes longer than its limit, and nothing outlives a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from nemo_aligner.config.rewards import RewardFunction, split_target
from nemo_aligner.errors import ConfigError, RewardError
from nemo_aligner.rewards.worker import receive, send

START_LIMIT_S = 120.0
"""What importing all functions may take."""

_GLANCE_S = 0.2


class FailedCall(Exception):
    """A call that gave no rewards, with the reason in one line."""


class Process:
    """Runs `functions`. Raises ConfigError where one cannot be loaded, RewardError where the process cannot start.

    `stopped` is asked while waiting; once it says so, a call fails at once.
    """

    def __init__(self, functions: Sequence[RewardFunction], stopped: Callable[[], bool] = lambda: False) -> None:
        self._stopped = stopped
        self._channel, theirs = socket.socketpair()
        environment = {
            "OMP_NUM_THREADS": "1",  # the cores belong to the model, unless told otherwise
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nemo_aligner.rewards.worker", str(theirs.fileno())],
                env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        try:
            self.descriptions = self._load(functions)
        except BaseException:
            self.kill()
            raise

    def _load(self, functions: Sequence[RewardFunction]) -> dict[str, Any]:
        places = {function.name: split_target(function.target) for function in functions}
        wanted = [
            {"name": f.name, "place": places[f.name][0], "function": places[f.name][1], "arguments": dict(f.arguments)}
            for f in functions
        ]
        try:
            answer = self._ask(wanted, START_LIMIT_S)
        except FailedCall as failure:
            raise RewardError(f"the process for reward functions did not start: {failure}") from None
        if "fault" in answer:
            target = next(f.target for f in functions if f.name == answer["name"])
            raise ConfigError(f"{target} cannot be used: {answer['fault']}", "reward_function")
        return dict(answer["ready"])

    def call(
        self, name: str, prompts: Sequence[str], responses: Sequence[str], columns: dict[str, list[Any]], limit_s: float
    ) -> tuple[list[float | None], bool]:
        """Rewards of `responses`, and whether the function left processes behind. Raises FailedCall."""
        asked = {"name": name, "prompts": list(prompts), "responses": list(responses), "columns": columns}
        answer = self._ask(asked, limit_s)
        if "error" in answer:
            if answer["left"]:
                self.kill()
            raise FailedCall(answer["error"])
        return answer["rewards"], answer["left"]

    def _ask(self, message: Any, limit_s: float) -> Any:
        """Raises FailedCall where no answer comes; the process is killed then."""
        deadline = time.monotonic() + limit_s
        waiting = _Waiting(self._channel, deadline, self._state)
        try:
            send(waiting, message)  # type: ignore[arg-type]
            return receive(waiting)  # type: ignore[arg-type]
        except TimeoutError:
            self.kill()
            raise FailedCall(f"took longer than {limit_s:g} s, and was killed") from None
        except (OSError, EOFError, ValueError):
            patience = time.monotonic() + 1
            while (said := self._state()) is None and time.monotonic() < patience:
                time.sleep(0.01)
            self.kill()
            raise FailedCall(said or "broke off the connection to its parent") from None
        except FailedCall:
            self.kill()
            raise

    def _state(self) -> str | None:
        """Why no answer will come, or None."""
        if self._stopped():
            return "was told to stop"
        # looked at and not taken: as long as it is not, nobody else gets its number
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        by_itself = ended.si_code == os.CLD_EXITED
        how = f"status {ended.si_status}" if by_itself else signal.Signals(ended.si_status).name
        return f"ended its process ({how})"

    @property
    def is_killed(self) -> bool:
        return self._process.returncode is not None

    def kill(self) -> None:
        """End the process and everything that functions started in it, whatever group or session it went to."""
        if self.is_killed:
            return
        with contextlib.suppress(psutil.Error):
            self._kill_descendants()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _kill_descendants(self) -> None:
        worker = psutil.Process(self._process.pid)
        worker.suspend()  # those whose own parent dies become its children, and are not lost meanwhile
        for _ in range(100):
            alive = [child for child in worker.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
            if not alive:
                return
            for child in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            time.sleep(0.01)


class _Waiting:
    """The socket with a deadline; in between, `state` is asked whether there is anything left to wait for."""

    def __init__(self, channel: socket.socket, deadline: float, state: Callable[[], str | None]) -> None:
        self._channel, self._deadline, self._state = channel, deadline, state

    def _patiently(self, work: Callable[[], Any]) -> Any:
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._channel.settimeout(min(left, _GLANCE_S))
            try:
                return work()
            except TimeoutError:
                said = self._state()
                if said is not None:
                    raise FailedCall(said) from None

    def sendall(self, body: bytes) -> None:
        view = memoryview(body)
        while view:
            view = view[self._patiently(lambda: self._channel.send(view)) :]  # noqa: B023 (called at once)

    def recv(self, size: int) -> bytes:
        return self._patiently(lambda: self._channel.recv(min(size, 1 << 20)))
