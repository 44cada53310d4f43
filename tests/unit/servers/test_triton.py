"""What must be so before Triton can start is looked at, and said where it is not."""

from __future__ import annotations

import os
import socket
import sysconfig
from pathlib import Path

import pytest

from nemo_aligner.errors import ServerError
from nemo_aligner.servers.triton import check_port_is_free, find_shared_python


def test_a_port_that_is_taken_is_named_with_its_keys() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^inference\.ip=127\.0\.0\.1, inference\.port={port}: Address already"):
            check_port_is_free("127.0.0.1", port)
    check_port_is_free("127.0.0.1", port)


def test_tritons_python_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"LIBDIR": str(tmp_path), "INSTSONAME": "libpython3.so.1.0"}
    monkeypatch.setattr(sysconfig, "get_config_var", known.get)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/others")
    with pytest.raises(ServerError, match=r"no shared library \(libpython3\.so\.1\.0 in "):
        find_shared_python()
    (tmp_path / "libpython3.so.1.0").touch()
    find_shared_python()
    assert os.environ["LD_LIBRARY_PATH"] == f"{tmp_path}:/others"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    find_shared_python()
    assert os.environ["LD_LIBRARY_PATH"] == str(tmp_path)
    for missing in ({"INSTSONAME": "libpython3.a"}, {"INSTSONAME": None}, {"LIBDIR": None}):
        monkeypatch.setattr(sysconfig, "get_config_var", {**known, **missing}.get)
        with pytest.raises(ServerError, match="--enable-shared"):
            find_shared_python()
