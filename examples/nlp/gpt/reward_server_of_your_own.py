"""A reward server out of a function and the standard library: what the actor needs of one, and nothing else.

python examples/nlp/gpt/reward_server_of_your_own.py 5567
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "reward_model"  # remote_critic_rm.reward_model.name of the actor
MODEL = {
    "name": NAME, "versions": ["1"], "platform": "python",
    "inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [-1, 1]}],
    "outputs": [{"name": "rewards", "datatype": "FP32", "shape": [-1, 1]}],
}  # fmt: skip
CONFIG = {
    "name": NAME, "max_batch_size": 1024, "model_transaction_policy": {"decoupled": False},
    "input": [{"name": "sentences", "data_type": "TYPE_STRING", "dims": [1]}],
    "output": [{"name": "rewards", "data_type": "TYPE_FP32", "dims": [1]}],
}  # fmt: skip


def reward(text: str) -> float:
    """Of one text, prompt and response together; put yours here."""
    return -abs(len(text.split()) - 20) / 20


class Handler(BaseHTTPRequestHandler):
    """Readiness, metadata, config and inference of the KServe v2 protocol, inference over HTTP with Triton's bytes."""

    def do_GET(self) -> None:
        self.answer({f"/v2/models/{NAME}": MODEL, f"/v2/models/{NAME}/config": CONFIG}.get(self.path, {}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        header = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        texts = list(self.texts(json.loads(body[:header])["inputs"][0], body[header:]))
        rewards = {"name": "rewards", "datatype": "FP32", "shape": [len(texts), 1], "data": [*map(reward, texts)]}
        self.answer({"model_name": NAME, "model_version": "1", "outputs": [rewards]})

    def texts(self, sentences: dict[str, Any], packed: bytes) -> Any:
        """As JSON, or behind it: each its number of bytes in four, then its bytes."""
        yield from sentences.get("data", [])
        while packed:
            end = 4 + int.from_bytes(packed[:4], "little")
            yield packed[4:end].decode()
            packed = packed[end:]

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    Handler.protocol_version = "HTTP/1.1"
    ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
