"""What several tests of the engine start from."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import MegatronCluster
from nemo_aligner.engine.training.trainable import MegatronTrainable
from tests.fakes import ByteTokenizer
from tests.tiny import ARCH


def without_optimizer(
    cluster: MegatronCluster, arch: Architecture = ARCH, dtype: torch.dtype = torch.float32
) -> MegatronTrainable:
    torch.manual_seed(5)
    run = RunOptions(dtype=dtype)
    return MegatronTrainable(LoadedModel(build_model(arch, run), arch, ByteTokenizer(), run, Path("none")), cluster)  # type: ignore[arg-type]


def split(whole: Microbatch, size: int) -> list[Microbatch]:
    """Its rows in micro-batches of `size`."""
    return [
        Microbatch(
            whole.tokens[i : i + size],
            whole.lengths[i : i + size],
            {k: v[i : i + size] for k, v in whole.fields.items()},
        )
        for i in range(0, len(whole.tokens), size)
    ]


def weights(model: MegatronTrainable) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.module.parameters()]
