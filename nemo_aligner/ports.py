"""Ports for what listens on this machine alone."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One that no connection is given meanwhile: below the range that systems hand out by themselves."""
    for port in random.SystemRandom().sample(range(10_000, 20_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")
