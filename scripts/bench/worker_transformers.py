"""transformers as a worker of scripts/bench/generation.py: `generate` over batches of repeated prompts, or its own
continuous batching (`--continuous`); lengths are forced."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import workload
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)


class EndsAt(LogitsProcessor):
    """Gives each row EOS at its own length, and nowhere before."""

    def __init__(self, lengths: torch.Tensor, prompt: int, eos: int) -> None:
        self.lengths, self.prompt, self.eos = lengths, prompt, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.eos] = -torch.inf
        done = input_ids.size(1) - self.prompt >= self.lengths
        scores[done] = -torch.inf
        scores[done, self.eos] = 0.0
        return scores


def in_batches(model: PreTrainedModel, rows: list[tuple[list[int], int]], batch: int, eos: int) -> None:
    """`generate` on `batch` rows (prompt, length) at a time."""
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(len(prompt) for prompt, _ in part)
        ids = torch.full((len(part), width), eos)
        mask = torch.zeros_like(ids)
        for i, (prompt, _) in enumerate(part):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        lengths = torch.tensor([length for _, length in part])
        model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=int(lengths.max()) + 1,
            eos_token_id=eos,
            pad_token_id=eos,
            logits_processor=LogitsProcessorList([EndsAt(lengths.to(model.device), width, eos)]),
        )


def continuously(model: PreTrainedModel, rows: list[tuple[list[int], int]], batch: int) -> None:
    """Continuous batching with `batch` rows in flight at most."""
    generation = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1)
    widest = max(len(prompt) + length for prompt, length in rows)
    config = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=batch * (widest // 32 + 2),
        max_batch_tokens=max(batch, 512),
        max_requests_per_batch=batch,
        use_async_batching=False,
    )
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:
        for prompt, length in rows:
            manager.add_request(prompt, max_new_tokens=length)
        done = 0
        while done < len(rows):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done += 1
            elif result is None and not manager.is_running():
                raise SystemExit("error: continuous batching stopped by itself")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--dtype", choices=["32", "bf16"], required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    begin, work = time.perf_counter(), workload.load(args.workload)
    dtype = torch.float32 if args.dtype == "32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(args.device)
    eos = model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 2
    rows = [(item["prompt"], length) for item in work for length in item["lengths"]]
    generate: Callable[[], None] = lambda: in_batches(model, rows, args.batch, eos)  # noqa: E731
    if args.continuous:
        generate = lambda: continuously(model, rows, args.batch)  # noqa: E731

    def run() -> dict[str, Any]:
        with torch.no_grad():
            generate()
        return {"tokens": workload.useful_tokens(work), "samples": len(rows)}

    workload.serve(f"transformers {args.dtype} batch {args.batch}", time.perf_counter() - begin, run)


if __name__ == "__main__":
    main()
