"""An archive's model in plain torch, and training it with torch's own AdamW: what whole runs are checked against."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.config.schema import ExpManagerConfig, OptimConfig, TrainerConfig
from nemo_aligner.engine.checkpoints.tokenizer import ArchiveTokenizer
from nemo_aligner.engine.loading import load_for_inference
from nemo_aligner.engine.processes.cluster import start_cluster


@dataclass(frozen=True)
class Plain:
    module: torch.nn.Module
    tokenizer: ArchiveTokenizer
    vocab_size: int

    def _output(self, row: Sequence[int]) -> Tensor:
        return self.module(torch.tensor([row]), torch.arange(len(row))[None], None)[0].float()

    def logprobs(self, row: Sequence[int]) -> Tensor:
        """`[S - 1]`: of every token but the first."""
        logprobs = self._output(row)[:-1, : self.vocab_size].log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(row[1:])[:, None]).squeeze(-1)

    def reward(self, row: Sequence[int]) -> Tensor:
        return self._output(row)[-1, 0]

    @torch.no_grad()
    def likeliest(self, row: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that greedy decoding goes on with, up to EOS."""
        drawn: list[int] = []
        while len(drawn) < count and drawn[-1:] != [self.tokenizer.eos_id]:
            drawn.append(int(self._output([*row, *drawn])[-1, : self.vocab_size].argmax()))
        return drawn

    def trained(
        self, losses: Sequence[Callable[[], Tensor]], rates: Sequence[float], optim: OptimConfig, clip: float
    ) -> list[float]:
        """One step of AdamW for each of `losses`, the gradient's norm cut to `clip`; the loss before each step."""
        optimizer = torch.optim.AdamW(
            self.module.parameters(), betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, weight_decay=0.0
        )
        found = []
        for loss_of, rate in zip(losses, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
            optimizer.step()
            found.append(loss.item())
        return found

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.module.named_parameters()}


@contextmanager
def opened(path: Path) -> Iterator[Plain]:
    """The model of the archive at `path`; to be used where no run is under way."""
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1) as cluster:
        loaded = load_for_inference(path, cluster, precision="32", key="path")
        yield Plain(loaded.module, loaded.tokenizer, loaded.arch.vocab_size)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(folder: Path, name: str) -> list[float]:
    """The values of `name` in a run's metrics.jsonl, in their order."""
    return [row[name] for row in read_rows(folder / "metrics.jsonl") if name in row]


def logs_to(exp: ExpManagerConfig, folder: Path) -> None:
    exp.explicit_log_dir, exp.name, exp.create_tensorboard_logger = str(folder), "m", False
