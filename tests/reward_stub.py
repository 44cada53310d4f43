"""A reward server without Triton: the example's, with rewards that tell texts apart, and the hash of an archive."""

from __future__ import annotations

import importlib.util
import threading
import zlib
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

_EXAMPLE = Path(__file__).resolve().parents[1] / "examples/nlp/gpt/reward_server_of_your_own.py"


def reward(text: str) -> float:
    """Of a text alone, and exact in float32."""
    return (zlib.crc32(text.encode()) % 4096) / 64


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("reward_server_of_your_own", _EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.reward = reward  # type: ignore[attr-defined]
    return module


class RewardStub:
    """Serves on a free port until it is closed; every answer says `archive`."""

    def __init__(self, archive: str) -> None:
        class Handler(_example().Handler):  # type: ignore[misc]
            protocol_version = "HTTP/1.1"

            def answer(self, content: dict[str, Any]) -> None:
                super().answer(_with_archive(content, archive))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _with_archive(content: dict[str, Any], archive: str) -> dict[str, Any]:
    """The model's metadata, its config, or an answer, with one output more."""
    if "output" in content:
        return {**content, "output": [*content["output"], {"name": "archive", "data_type": "TYPE_STRING", "dims": [1]}]}
    if "outputs" not in content:
        return content
    first = content["outputs"][0]
    more = {**first, "name": "archive", "datatype": "BYTES"}
    if "data" in first:
        more["data"] = [archive] * len(first["data"])
    return {**content, "outputs": [*content["outputs"], more]}
