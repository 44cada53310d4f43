"""Process groups: who this process is among the others, and what it may ask of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.processes import standing
from nemo_aligner.engine.processes.cuda_on_cpu import enable_cpu, hides_gpu, multiplies_bf16
from nemo_aligner.engine.processes.launch import meeting
from nemo_aligner.engine.processes.watch import watching
from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")


class MegatronCluster:
    """Implements interfaces.Cluster over Megatron's process groups.

    How many ranks share a model: `tp`, `pp`, `cp`; the experts of a layer: `ep`, and each of these: `etp`.
    """

    def __init__(self, device: torch.device) -> None:
        from megatron.core import parallel_state as state

        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.tp, self.pp = state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size()
        self.cp = state.get_context_parallel_world_size()
        self.ep = state.get_expert_model_parallel_world_size()
        self.etp = state.get_expert_tensor_parallel_world_size()
        # context-parallel ranks have the same weights: each has work of its own, which the engine does with the others'
        self.dp_rank = state.get_data_parallel_rank(with_context_parallel=True)
        self.dp_size = state.get_data_parallel_world_size(with_context_parallel=True)
        self._speaks = state.get_tensor_model_parallel_rank() == 0 and state.is_pipeline_last_stage()
        self._replica = state.get_model_parallel_group()
        # objects travel as bytes: over gloo also where tensors travel over NCCL
        self._objects = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def speaks_for_replica(self) -> bool:
        return self._speaks

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._objects)

    def broadcast(self, value: T) -> T:
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._objects)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """`value` of each data-parallel rank in order (of the rank that speaks for its replica)."""
        told = self.gather_ranks((self.dp_rank, self._speaks, value))
        return [value for _, speaks, value in sorted(told, key=lambda one: one[0]) if speaks]

    def gather_ranks(self, value: T) -> list[T]:
        if self.world_size == 1:
            return [value]
        boxes: list[T | None] = [None] * self.world_size
        dist.all_gather_object(boxes, value, group=self._objects)
        return cast("list[T]", boxes)

    def any(self, flag: bool) -> bool:
        if self.world_size == 1:
            return flag
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._objects)
        return bool(raised.item())

    def any_in_replica(self, flag: bool) -> bool:
        if self.world_size == self.dp_size:
            return flag
        raised = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._replica)
        return bool(raised.item())


def _pick_device(trainer: TrainerConfig) -> torch.device:
    if standing.program is not None and trainer.accelerator != "cpu" and hides_gpu():
        raise ConfigError(
            f"{trainer.accelerator}, after a stage of this process with cpu, which leaves no way back; give all stages "
            "the same, or each a process of its own",
            "trainer.accelerator",
        )
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("gpu was asked for, but torch sees no CUDA device; use auto or cpu", "trainer.accelerator")
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _start_process_group(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:  # needs no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    dist.init_process_group(backend, rank=int(os.environ["RANK"]), world_size=world)


@contextmanager
def start_cluster(
    trainer: TrainerConfig,
    *,
    tensor: int,
    pipeline: int,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
    seed: int = 1234,
) -> Iterator[MegatronCluster]:
    """Process group, model-parallel groups and seeds; all torn down at the end, so it may be entered again.

    `expert` ranks share experts, `expert_tensor` each of them (None: as many as `tensor`).
    """
    device, threads = _pick_device(trainer), torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        enable_cpu()
        if int(os.environ.get("RANK", "0")) == 0:
            if trainer.accelerator == "auto":
                log.info("no GPU found: running on the CPU")
            if str(trainer.precision).startswith("bf16") and not multiplies_bf16():
                log.info("torch has no fast bf16 products for this CPU: trainer.precision=32 is several times as fast")
        local_ranks = min(trainer.devices, int(os.environ.get("WORLD_SIZE", "1")))
        if local_ranks > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    from megatron.core import parallel_state, tensor_parallel

    _start_process_group(device)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )
        if device.type == "cpu":
            tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
            torch.manual_seed(seed)
        else:
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
        cluster = MegatronCluster(device)
        with meeting(), watching(cluster):
            yield cluster
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        torch.set_num_threads(threads)
