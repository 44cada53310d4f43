"""Run a function on several gloo processes, each of them a rank of a Megatron cluster on the CPU or a pretend GPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.multiprocessing as mp

from nemo_aligner.config.schema import TrainerConfig


def _rank(
    rank: int,
    world: int,
    port: int,
    sizes: tuple[int, int],
    gpus: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from nemo_aligner.engine.processes.cluster import start_cluster
    from tests.pretend_gpu import pretend_gpu

    trainer = TrainerConfig(devices=world, accelerator="gpu" if gpus else "cpu")
    with (
        pretend_gpu(world) if gpus else nullcontext(),
        start_cluster(trainer, tensor=sizes[0], pipeline=sizes[1], seed=7) as cluster,
    ):
        function(cluster, *args)


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, tensor: int = 1, pipeline: int = 1, gpus: bool = False
) -> None:
    """Call `function(cluster, *args)` on `world` processes; a failure of any of them is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(world, port, (tensor, pipeline), gpus, function, args), nprocs=world, join=True)
