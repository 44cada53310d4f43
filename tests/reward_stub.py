"""A reward server without Triton that speaks as much KServe v2 as the actor's client asks for."""

from __future__ import annotations

import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "/v2/models/reward_model"
_TENSORS = (("rewards", "FP32"), ("exceeded", "INT32"), ("error", "BYTES"), ("archive", "BYTES"))


def reward(text: bytes) -> float:
    """Of a text alone, and exact in float32."""
    return (zlib.crc32(text) % 4096) / 64


class RewardStub:
    """Serves on `port`, 0: a free one, until it is closed; every answer says `archive`."""

    def __init__(self, port: int, archive: str) -> None:
        self.asked = 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.say(_about(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stub.asked += 1
                head = int(self.headers.get("Inference-Header-Content-Length", len(body)))
                self.say(_answer(_texts(body[head:]), archive))

            def say(self, content: Any) -> None:
                text = b"" if content is None else json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _about(path: str) -> Any:
    outputs = [{"name": name, "datatype": kind, "shape": [-1, 1]} for name, kind in _TENSORS]
    return {
        MODEL: {
            "name": "reward_model",
            "versions": ["1"],
            "platform": "python",
            "inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [-1, 1]}],
            "outputs": outputs,
        },
        f"{MODEL}/config": {
            "name": "reward_model",
            "backend": "python",
            "max_batch_size": 64,
            "input": [{"name": "sentences", "data_type": "TYPE_STRING", "dims": [-1]}],
            "output": [
                {"name": name, "data_type": f"TYPE_{'STRING' if kind == 'BYTES' else kind}", "dims": [1]}
                for name, kind in _TENSORS
            ],
            "instance_group": [],
            "parameters": {},
        },
    }.get(path)


def _texts(binary: bytes) -> list[bytes]:
    """Of the binary form: four bytes that say how long, and a text, one after another."""
    found = []
    while binary:
        (size,) = struct.unpack_from("<I", binary)
        found.append(binary[4 : 4 + size])
        binary = binary[4 + size :]
    return found


def _answer(texts: list[bytes], archive: str) -> Any:
    columns = {
        "rewards": [reward(text) for text in texts],
        "exceeded": [0] * len(texts),
        "error": [""] * len(texts),
        "archive": [archive] * len(texts),
    }
    outputs = [
        {"name": name, "datatype": kind, "shape": [len(texts), 1], "data": columns[name]} for name, kind in _TENSORS
    ]
    return {"model_name": "reward_model", "model_version": "1", "outputs": outputs}
