"""Load a running reward server with concurrent clients, and check that every answer is the one to its own request.

.venv/bin/python examples/nlp/gpt/serve_reward_model.py rm_model_file=reward_model.nemo inference.port=5567 &
.venv/bin/python scripts/bench/reward_server.py --port 5567 --clients 64 --requests 10000
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

_DISTINCT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of a reward; bf16 scoring needs about 0.05")
    args = parser.parse_args()
    url = f"http://127.0.0.1:{args.port}/v2/models/reward_model/infer"

    def ask(i: int) -> list[float] | str:
        """The rewards, or what the server said instead."""
        texts = [f"film {i}", f"a review, number {i}, that is somewhat longer"][: 1 + i % 2]
        sentences = {"name": "sentences", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}
        request = urllib.request.Request(url, json.dumps({"inputs": [sentences]}).encode())
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                outputs = {output["name"]: output["data"] for output in json.load(reply)["outputs"]}
        except urllib.error.HTTPError as fault:
            return f"HTTP status {fault.code}: {fault.read().decode()}"
        return outputs["rewards"]

    alone = [ask(i) for i in range(_DISTINCT)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        found = list(pool.map(lambda i: ask(i % _DISTINCT), range(args.requests)))
    seconds = time.perf_counter() - begin
    wrong = 0
    for i, rewards in enumerate(found):
        wanted = alone[i % _DISTINCT]
        if isinstance(rewards, str) or isinstance(wanted, str):
            print(f"request {i}: {rewards}")
            same = False
        else:
            pairs = zip(rewards, wanted, strict=False)
            same = len(rewards) == len(wanted) and all(abs(a - b) <= args.tolerance for a, b in pairs)
        wrong += not same
    rate = args.requests / seconds
    print(f"{args.requests} requests of {args.clients} clients in {seconds:.1f} s, {rate:.0f}/s; {wrong} wrong answers")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
