"""A Megatron model with what training needs: optimizer steps, checkpoints, and the archive at the end."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.engine.checkpoints import nemo_archive, resident, training_state
from nemo_aligner.engine.interfaces import Microbatch, Objective, StepMetrics
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.forward import has_dropout, run_objective
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.engine.processes.cuda_on_cpu import cuda_type_names
from nemo_aligner.engine.training.optimizer import build_optimizer
from nemo_aligner.engine.training.schedules import make_schedule
from nemo_aligner.errors import TrainingError

log = logging.getLogger(__name__)


class MegatronTrainable:
    """Implements interfaces.TrainableModel; an optimizer is there after `add_optimizer`."""

    def __init__(self, loaded: LoadedModel, cluster: MegatronCluster) -> None:
        self.cluster = cluster
        self._module, self.arch, self.tokenizer = loaded.module, loaded.arch, loaded.tokenizer
        self.max_sequence_length, self.vocab_size = loaded.arch.encoder_seq_length, loaded.arch.vocab_size
        self._dtype, self._source = loaded.run.dtype, loaded.source
        self._lora, self._merges_adapter = loaded.run.lora, loaded.merges_adapter
        self._digest = loaded.digest  # of an archive with the weights as they are now, where one is known
        self._wrapped: DistributedDataParallel | None = None
        self._optimizer: MegatronOptimizer | None = None
        self._schedule: Callable[[int], float]
        self._steps_done = 0

    @property
    def on_cpu(self) -> bool:
        return next(self._module.parameters()).device.type == "cpu"

    @property
    def module(self) -> MegatronModule:
        """The model, with all of its weights in place."""
        self._await_weights()
        return self._module

    def _await_weights(self) -> None:
        """Wait for weights under way from the ranks that updated them (`model.optim.overlap_param_sync`)."""
        wrapped = self._wrapped
        groups = [] if wrapped is None else [*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups]
        for group in groups:
            if group.param_gather_handle is not None:
                group.param_gather_handle.wait()
                group.param_gather_handle = None

    def add_optimizer(self, optim: OptimConfig, *, clip_grad: float, max_steps: int) -> None:
        """Make it trainable for `max_steps` optimizer steps."""
        self._schedule = make_schedule(optim.lr, optim.sched, max_steps)
        if self.cluster.is_main and has_dropout(self.module):
            log.info("with dropout every row is computed by itself: what rows begin with alike is computed for each")
        self._wrapped, self._optimizer = build_optimizer(self.module, optim, self._dtype, clip_grad=clip_grad)
        self.module.train()

    def train_step(self, microbatches: Sequence[Microbatch], objective: Objective) -> StepMetrics:
        """One optimizer step over this rank's micro-batches; see interfaces.TrainableModel."""
        assert self._wrapped is not None, "add_optimizer comes first"
        assert self._optimizer is not None
        self._digest = None
        self._wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()
        sums = run_objective(self._wrapped, microbatches, objective, self.arch.vocab_size, forward_only=False)
        averages = self._averages(sums)
        if self.cluster.any(not (math.isfinite(averages["loss"]) and self._gradient_is_finite())):
            raise TrainingError(
                f"loss {averages['loss']} or its gradient is not finite at optimizer step {self._steps_done + 1}; "
                "weights were left as they were; a lower model.optim.lr may help"
            )
        lr = self._schedule(self._steps_done)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._await_weights()
        with cuda_type_names():
            _, grad_norm, _ = self._optimizer.step()
        if self._wrapped.ddp_config.overlap_param_gather:
            self._wrapped.start_param_sync()
        self._steps_done += 1
        return StepMetrics(averages.pop("loss"), float(grad_norm or 0.0), lr, averages)

    def _gradient_is_finite(self) -> bool:
        """Whether the norm of this rank's gradient is a float32, also when squared and summed over all ranks."""
        assert self._wrapped is not None
        buffers = [*self._wrapped.buffers, *self._wrapped.expert_parallel_buffers]
        norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in buffers]
        square = sum(float(norm) ** 2 for norm in norms)
        return square * self.cluster.world_size < torch.finfo(torch.float32).max  # False for inf and nan

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], objective: Objective) -> StepMetrics:
        """The same averages without gradient or update."""
        model = self._wrapped or self.module
        model.eval()
        sums = run_objective(model, microbatches, objective, self.arch.vocab_size, forward_only=True)
        if self._wrapped is not None:
            model.train()
        averages = self._averages(sums)
        return StepMetrics(averages.pop("loss"), 0.0, 0.0, averages)

    def _averages(self, sums: Sequence[dict[str, float]]) -> dict[str, float]:
        """Σ value / Σ count over micro-batches and data-parallel ranks."""
        parts = [part for rank in self.cluster.gather(list(sums)) for part in rank]
        count = sum(part["count"] for part in parts)
        if count == 0:
            raise TrainingError("the batch has nothing to train on: every row is masked")
        return {name: sum(part[name] for part in parts) / count for name in parts[0] if name != "count"}

    def save_training_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Weights, optimizer, RNG and `state` into `folder`; appears whole or not at all."""
        training_state.save(folder, self.module, self._optimizer, self._full(state), self.cluster)

    def save_in_background(self, folder: Path, state: dict[str, Any]) -> training_state.Saving:
        """The same of how everything is now, while this goes on; see interfaces.TrainableModel."""
        return training_state.save_in_background(folder, self.module, self._optimizer, self._full(state), self.cluster)

    def _full(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "optimizer_steps": self._steps_done}

    def load_training_state(self, folder: Path) -> dict[str, Any]:
        """Restore what `save_training_state` wrote; returns `state`."""
        self._digest = None
        with cuda_type_names():
            state = training_state.load(folder, self.module, self._optimizer, self.cluster)
        self._steps_done = state["optimizer_steps"]
        return state

    def keep_chat_template(self, template: str) -> None:
        """Let `template` be the tokenizer's own from now on; see interfaces.TrainableModel."""
        self._digest = None  # an archive with another tokenizer is another archive
        self.tokenizer.chat_template = template
        self.arch = dataclasses.replace(self.arch, tokenizer={**self.arch.tokenizer, "chat_template": template})

    def save_nemo(self, path: Path, config_updates: dict[str, Any] | None = None) -> None:
        """Write the .nemo archive, of an adapter that alone unless it is to be merged; appears whole or not at all."""
        stored = {torch.float32: "32", torch.bfloat16: "bf16"}[self._dtype]
        arch = dataclasses.replace(self.arch, precision=stored, **(config_updates or {}))
        adapters = self.module.adapters
        if adapters is not None and self._lora is not None and not self._merges_adapter:
            digest = self.archive_hash() if self.cluster.is_main else ""  # rank 0 writes it
            arch.peft = nemo_archive.adapter_entry(self._lora, self._source, digest)
        nemo_archive.save_archive(path, self.module, arch, self.tokenizer, self.cluster)
        self._digest = resident.digest_of(path, self.cluster) if adapters is None else None

    def stay_in_memory(self) -> None:
        """Leave the weights to the next stage of this process, if it has one and an archive has the same.

        The model itself is not to be used any more.
        """
        if self._digest is not None:
            resident.leave(self.module, self.arch, self.tokenizer, self._digest, self.cluster)

    def archive_hash(self) -> str:
        return nemo_archive.archive_hash(self._source)
