"""transformers as a worker of scripts/bench/generation.py: rows of a batch are repeated prompts, lengths are forced."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import workload
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--dtype", choices=["32", "bf16"], required=True)
    parser.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()

    begin, work = time.perf_counter(), workload.load(args.workload)
    dtype = torch.float32 if args.dtype == "32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    eos = model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 2
    rows = [(item["prompt"], length) for item in work for length in item["lengths"]]

    @torch.no_grad()
    def run() -> dict[str, Any]:
        for start in range(0, len(rows), args.batch):
            part = rows[start : start + args.batch]
            width = max(len(prompt) for prompt, _ in part)
            ids = torch.full((len(part), width), eos)
            mask = torch.zeros_like(ids)
            for i, (prompt, _) in enumerate(part):
                ids[i, width - len(prompt) :] = torch.tensor(prompt)
                mask[i, width - len(prompt) :] = 1
            lengths = torch.tensor([length for _, length in part])
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(lengths.max()) + 1,
                eos_token_id=eos,
                pad_token_id=eos,
                logits_processor=LogitsProcessorList([EndsAt(lengths, width, eos)]),
            )
        return {"tokens": workload.useful_tokens(work), "samples": len(rows)}

    workload.serve(f"transformers {args.dtype} batch {args.batch}", time.perf_counter() - begin, run)


if __name__ == "__main__":
    main()
