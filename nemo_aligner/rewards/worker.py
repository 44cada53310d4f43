"""The process that runs reward functions: `python -m nemo_aligner.rewards.worker <fd>`, started by process.py.

Messages go over the socket <fd>, each JSON behind its length in four bytes; what functions print goes to stderr. The
parent kills this process, with all that it started, where a function does not come back.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from typing import Any

from nemo_aligner.rewards.loading import PROMPTS, RESPONSES, checked, describe, load

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def send(channel: socket.socket, message: Any) -> None:
    body = json.dumps(message).encode()
    channel.sendall(len(body).to_bytes(4, "big") + body)


def receive(channel: socket.socket) -> Any:
    """Raises EOFError where the other side is gone."""
    return json.loads(_exactly(channel, int.from_bytes(_exactly(channel, 4), "big")))


def _exactly(channel: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = channel.recv(size - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def told(fault: BaseException) -> str:
    """An exception in one line."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}".rstrip(": ")


def _be_a_good_child() -> None:
    """Die with the parent, answer for what functions start, and leave signals that stop a run to the run."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # a handler, as what a function starts has none
        signal.signal(number, lambda *_: None)
    os.dup2(2, 1)


def _left_behind() -> bool:
    """Whether processes that functions started are still there."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    _be_a_good_child()
    own, functions, arguments = os.getpid(), {}, {}
    descriptions = {}
    for wanted in receive(channel):
        name, arguments[wanted["name"]] = wanted["name"], wanted["arguments"]
        try:
            functions[name] = load(wanted["place"], wanted["function"])
            descriptions[name] = describe(functions[name], wanted["arguments"])
        except BaseException as fault:
            send(channel, {"name": name, "fault": told(fault)})
            return
    send(channel, {"ready": descriptions})
    while True:
        try:
            asked = receive(channel)
        except EOFError:
            return
        name, responses = asked["name"], asked[RESPONSES]
        given = {RESPONSES: responses, **asked["columns"], **arguments[name]}
        if descriptions[name]["prompts"]:
            given[PROMPTS] = asked[PROMPTS]
        try:
            answer: dict[str, Any] = {"rewards": checked(functions[name](**given), len(responses))}
        except BaseException as fault:
            answer = {"error": told(fault)}
        if os.getpid() != own:  # a copy that the function made of us, which must not answer too
            os._exit(0)
        send(channel, {**answer, "left": _left_behind()})


if __name__ == "__main__":
    main()
