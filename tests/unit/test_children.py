"""A child does not outlive the process that started it, whenever that one is killed."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest

from nemo_aligner.children import dying_with_parent


@pytest.mark.parametrize("asks", ["before", "after"])
def test_a_child_ends_with_its_parent_whenever_it_asks_the_kernel_for_that(asks: str) -> None:
    """Asking `after` the parent was killed is what a busy machine makes of the time between fork and exec."""
    said, says = os.pipe()
    parent = os.fork()
    if not parent:
        be_killed(says, asks_first=asks == "before")
    os.close(says)
    assert os.read(said, 1) == b"1", "the child is there"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert select.select([said], [], [], 30)[0], "the child lives on"
    assert os.read(said, 1) == b"", "the child went on without its parent"
    os.close(said)


def be_killed(says: int, *, asks_first: bool) -> None:
    """The parent, which waits to be killed, and its child; neither returns."""
    ask, own = dying_with_parent(), os.getpid()
    if os.fork():
        os.close(says)
        while True:
            time.sleep(1)
    if asks_first:
        ask()
    os.write(says, b"1")
    if asks_first:
        time.sleep(60)
    while os.getppid() == own:
        time.sleep(0.01)
    ask()
    os.write(says, b"2")
    os._exit(0)
