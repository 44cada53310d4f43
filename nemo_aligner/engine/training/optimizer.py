"""From `model.optim` to Megatron's optimizer: master weights, clipping by global norm, decoupled weight decay."""

from __future__ import annotations

import logging

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.utils import get_model_config
from torch import nn

from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.engine.checkpoints.optimizer_state import make_checkpointable
from nemo_aligner.engine.kernels.weight_gradient import fuse_weight_gradients
from nemo_aligner.engine.processes.cuda_on_cpu import cuda_type_names
from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)

_BYTES = 4  # of a gradient: they are summed in fp32


def build_optimizer(
    model: nn.Module, optim: OptimConfig, dtype: torch.dtype, *, clip_grad: float
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Wrap `model` for data-parallel training and build its optimizer.

    Adam is AdamW (arXiv 1711.05101): decay is decoupled, and not applied to biases and norms. bf16 weights get fp32
    master weights. Raises ConfigError for overlap_param_sync without sharded state.
    """
    sharded = is_sharded(optim, parallel_state.get_data_parallel_world_size(with_context_parallel=True))
    ddp = data_parallel_settings(optim, sharded)
    wrapped = DistributedDataParallel(config=get_model_config(model), ddp_config=ddp, module=model)
    fuse_weight_gradients(wrapped, dtype)
    offloads = is_offloaded(optim, sharded, dtype)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        clip_grad=clip_grad,
        use_distributed_optimizer=sharded,
        overlap_param_gather=ddp.overlap_param_gather,
        optimizer_cpu_offload=offloads,
        optimizer_offload_fraction=float(offloads),  # all of it
        overlap_cpu_optimizer_d2h_h2d=offloads,  # parameters are copied while others are computed
    )
    with cuda_type_names():
        # the overrides take biases and norms out of weight decay; Megatron will not do so by itself for ever
        optimizer = get_megatron_optimizer(settings, [wrapped], get_standard_config_overrides(settings))
    for group in optimizer.param_groups:  # Megatron leaves this to its own schedule class, which is not used here
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        if not torch.cuda.is_available():  # there the optimizer is torch's, whose one pass takes a quarter of the time
            group["fused"] = True
    make_checkpointable(optimizer)
    config = get_model_config(model)
    config.grad_scale_func = optimizer.scale_loss
    # schedules give it what they call, the chunks of the model, and gradients are the whole model's
    config.finalize_model_grads_func = lambda _, *args, **kwargs: finalize_model_grads([wrapped], *args, **kwargs)
    if ddp.overlap_grad_reduce:
        config.no_sync_func = wrapped.no_sync  # all micro-batches but the last
    if ddp.overlap_param_gather:
        wrapped.start_param_sync()  # as after every step; or a first forward pass would ask for it
    return wrapped, optimizer


def is_sharded(optim: OptimConfig, ranks: int) -> bool:
    """Whether Adam's state is cut over the data-parallel `ranks`.

    On a CPU alone nothing can be cut, and weights that are not part of one buffer are generated with at less memory.
    """
    if optim.name == "distributed_fused_adam":
        return ranks > 1 or torch.cuda.is_available()
    return optim.name == "mcore_distributed_optim"


def is_offloaded(optim: OptimConfig, sharded: bool, dtype: torch.dtype) -> bool:
    """Whether Adam's moments lie in CPU memory beside a GPU. Raises ConfigError where Megatron cannot do that."""
    if optim.cpu_offload and not torch.cuda.is_available():
        log.info("model.optim.cpu_offload: there is no GPU, so Adam's state is in the CPU's memory anyway")
    elif optim.cpu_offload and not (sharded and dtype == torch.bfloat16):
        raise ConfigError("it takes name=distributed_fused_adam and trainer.precision=bf16", "model.optim.cpu_offload")
    return optim.cpu_offload and torch.cuda.is_available()


def data_parallel_settings(optim: OptimConfig, sharded: bool) -> DistributedDataParallelConfig:
    """How ranks sum gradients and fetch the weights that others updated: at once, or beside the passes.

    Beside them, gradients go by buckets of `bucket_cap_mb` MiB, each as soon as the backward pass has filled it.
    """
    if optim.bucket_cap_mb is not None and not optim.overlap_grad_sync:
        log.info(
            "model.optim.bucket_cap_mb: one bucket for all gradients, as overlap_grad_sync=False sums them at once"
        )
    if optim.overlap_param_sync and not sharded:
        if optim.name != "distributed_fused_adam":
            raise ConfigError(
                f"with name={optim.name} every rank updates all weights; take distributed_fused_adam, or leave it out",
                "model.optim.overlap_param_sync",
            )
        log.info("model.optim.overlap_param_sync: one rank updates all weights, there is nothing to fetch")
    return DistributedDataParallelConfig(
        use_distributed_optimizer=sharded,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optim.overlap_grad_sync,
        overlap_param_gather=optim.overlap_param_sync and sharded,
        align_param_gather=optim.overlap_param_sync and sharded,  # all buckets are fetched from the step's end on
        bucket_size=None if optim.bucket_cap_mb is None else int(optim.bucket_cap_mb * 2**20) // _BYTES,
    )
