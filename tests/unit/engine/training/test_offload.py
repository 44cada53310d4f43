"""Adam beside a GPU, by Megatron's hybrid optimizer: the steps are those of Adam on the GPU, checkpoints too.

Here the CPU plays the GPU: to the hybrid optimizer every parameter is on one, and streams do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.training import optimizer
from nemo_aligner.engine.training.optimizer import is_offloaded
from nemo_aligner.engine.training.trainable import MegatronTrainable
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.supervised.loop import sft_objective
from tests.tiny import rows
from tests.unit.engine.helpers import weights, without_optimizer


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


class Stream:
    """Of work that is done at once; its events are itself."""

    def wait_stream(self, other: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> Stream:
        return self


@pytest.fixture
def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_host(tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.clone()
        copied.on_host = True  # type: ignore[attr-defined]
        return copied

    def dealt(self: HybridDeviceOptimizer, fraction: float) -> Any:
        """Parameters between GPU and CPU, the one place where it asks a tensor where it is."""
        with monkeypatch.context() as inside:
            on_gpu = property(lambda tensor: not hasattr(tensor, "on_host"))
            inside.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
            inside.setattr(torch.Tensor, "cpu", on_the_host)
            inside.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
            return deal(self, fraction)

    empty, deal = torch.empty, HybridDeviceOptimizer._get_sub_optimizer_param_groups
    monkeypatch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", dealt)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(optimizer, "is_offloaded", lambda optim, sharded, dtype: optim.cpu_offload)


def trained(cluster: MegatronCluster, steps: range, *, offload: bool, start: Path | None = None) -> MegatronTrainable:
    model = without_optimizer(cluster, dtype=torch.bfloat16)
    optim = OptimConfig(name="mcore_distributed_optim", lr=1e-2, weight_decay=0.1, cpu_offload=offload)
    model.add_optimizer(optim, clip_grad=0.5, max_steps=10)
    if start is not None:
        model.load_training_state(start)
    for step in steps:
        model.train_step([rows(seed=step)], sft_objective)
    return model


@pytest.mark.parametrize(("written", "read"), [(True, True), (True, False), (False, True)])
def test_offloaded_steps_are_adams_also_after_a_checkpoint(
    written: bool, read: bool, cluster: MegatronCluster, beside_a_gpu: None, tmp_path: Path
) -> None:
    straight = trained(cluster, range(4), offload=False)
    first = trained(cluster, range(2), offload=written)
    first.save_training_state(tmp_path / "a", {"step": 2})
    second = trained(cluster, range(2, 4), offload=read, start=tmp_path / "a")
    for a, b in zip(weights(straight), weights(second), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    [part] = second._optimizer.chained_optimizers  # type: ignore[union-attr]
    assert (type(part.optimizer).__name__ == "HybridDeviceOptimizer") == read
    if read:
        assert part.optimizer.gpu_optimizer is None, "all of it is offloaded"


def test_nothing_is_offloaded_without_a_word_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = OptimConfig(cpu_offload=True)
    with caplog.at_level("INFO"):
        assert not is_offloaded(asked, sharded=True, dtype=torch.bfloat16)
    assert "model.optim.cpu_offload: there is no GPU" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert is_offloaded(asked, sharded=True, dtype=torch.bfloat16)
    assert not is_offloaded(OptimConfig(), sharded=True, dtype=torch.bfloat16)
    for sharded, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        with pytest.raises(ConfigError, match=r"^model\.optim\.cpu_offload: it takes name=distributed_fused_adam"):
            is_offloaded(asked, sharded=sharded, dtype=dtype)
