"""Run functions on several gloo processes, each of them a rank of a Megatron cluster on the CPU or a pretend GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp

from nemo_aligner.config.schema import TrainerConfig


class Cut(NamedTuple):
    """How the processes are cut; those that are left are data-parallel."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    gpus: bool = False


class Job(NamedTuple):
    """`function(cluster, *args)`, on every rank of a cluster cut so."""

    cut: Cut
    function: Callable[..., Any]
    args: tuple[Any, ...]


def _rank(rank: int, world: int, jobs: Sequence[tuple[int, Job]]) -> None:
    torch.set_num_threads(1)
    from nemo_aligner.engine.processes.cluster import start_cluster
    from tests.pretend_gpu import pretend_gpu

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    # they meet as under torchrun: at a store of the process that started them, whose port nobody can take meanwhile
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    for port, (cut, function, args) in jobs:
        os.environ["MASTER_PORT"] = str(port)
        trainer = TrainerConfig(devices=world, accelerator="gpu" if cut.gpus else "cpu")
        sizes = {name: value for name, value in cut._asdict().items() if name != "gpus"}
        try:
            with (
                pretend_gpu(world) if cut.gpus else nullcontext(),
                start_cluster(trainer, **sizes, seed=7) as cluster,
            ):
                function(cluster, *args)
        except BaseException as fault:
            fault.add_note(f"{function.__name__} of {cut}")
            raise


def run_jobs(world: int, jobs: Sequence[Job]) -> None:
    """Each job on the same `world` processes, one after the other; a failure of any of them is raised here."""
    stores = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    ports = [store.port for store in stores]
    mp.spawn(_rank, args=(world, list(zip(ports, jobs, strict=True))), nprocs=world, join=True)


def run_ranks(world: int, function: Callable[..., Any], *args: Any, **cut: int) -> None:
    """Call `function(cluster, *args)` on `world` processes, cut as `Cut` says."""
    run_jobs(world, [Job(Cut(**cut), function, args)])
