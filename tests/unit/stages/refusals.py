"""What a run says no to: a key with a value that is wrong, or that another run was begun with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nemo_aligner.errors import AlignerError, CheckpointError


def put(cfg: Any, key: str, value: Any) -> Any:
    """Give `key` of a config another value; the one it had."""
    *path, name = key.split(".")
    for part in path:
        cfg = getattr(cfg, part)
    if isinstance(cfg, dict):
        before, cfg[name] = cfg[name], value
        return before
    before = getattr(cfg, name)
    setattr(cfg, name, value)
    return before


def check_refused(run: Callable[[Any], None], cfg: Any, key: str, value: Any, says: str, **stands_for: str) -> None:
    """With `value` at `key` a run says so; names of `stands_for` in value and message are replaced by what they are."""
    put(cfg, key, stands_for.get(value, value) if isinstance(value, str) else value)
    for name, path in stands_for.items():
        says = says.replace(name, path)
    with pytest.raises(AlignerError) as caught:
        run(cfg)
    assert str(caught.value).startswith(says)


def check_other_runs_refused(run: Callable[[Any], None], cfg: Any, changes: Iterable[tuple[str, Any, str]]) -> None:
    """Each change of a key alone, with what is told of it, keeps the run from going on from the checkpoint there is."""
    for key, value, told in changes:
        before = put(cfg, key, value)
        with pytest.raises(CheckpointError, match=f"was made with {told}"):
            run(cfg)
        put(cfg, key, before)
