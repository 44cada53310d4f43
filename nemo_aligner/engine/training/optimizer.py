"""From `model.optim` to Megatron's optimizer: master weights, clipping by global norm, decoupled weight decay."""

from __future__ import annotations

import logging

import torch
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
from nemo_aligner.engine.processes.cuda_on_cpu import cuda_type_names
from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)

_NAMES = {  # all are AdamW; True: its state is sharded over data-parallel ranks
    "distributed_fused_adam": True,
    "mcore_distributed_optim": True,
    "fused_adam": False,
    "adamw": False,
    "adam": False,
}


def build_optimizer(
    model: nn.Module, optim: OptimConfig, dtype: torch.dtype, *, clip_grad: float
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Wrap `model` for data-parallel training and build its optimizer.

    Adam is AdamW (arXiv 1711.05101): decay is decoupled, and not applied to biases and norms. bf16 weights get fp32
    master weights. Raises ConfigError for an unknown name.
    """
    if optim.name not in _NAMES:
        raise ConfigError(f"{optim.name!r} is not one of {', '.join(_NAMES)}", "model.optim.name")
    distributed = _NAMES[optim.name]
    if distributed and not torch.cuda.is_available():
        log.info("model.optim.name=%s: on a CPU the optimizer state is not sharded over ranks", optim.name)
        distributed = False
    wrapped = DistributedDataParallel(
        config=get_model_config(model),
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        ),
        module=model,
    )
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
        use_distributed_optimizer=distributed,
    )
    with cuda_type_names():
        # the overrides take biases and norms out of weight decay; without them Megatron decays everything
        optimizer = get_megatron_optimizer(settings, [wrapped], get_standard_config_overrides(settings))
    for group in optimizer.param_groups:  # Megatron leaves this to its own schedule class, which is not used here
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)
    config = get_model_config(model)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped, optimizer
