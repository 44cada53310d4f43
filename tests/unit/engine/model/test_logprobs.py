"""Log-probabilities from logits and their gradient, against log_softmax in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.model import logprobs
from nemo_aligner.engine.model.logprobs import TokenLogprobs
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=1) as cluster:
        yield cluster


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_together", [1, 3, 100, None], ids=lambda rows: f"{rows} rows" if rows else "in C")
def test_logprobs_and_gradient_are_those_of_log_softmax_over_the_real_vocabulary(
    dtype: torch.dtype, rows_together: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows_together is not None:  # as torch does it
        parts = [slice(start, start + rows_together) for start in range(0, 7, rows_together)]
        monkeypatch.setattr(logprobs, "_parts", lambda logits: iter(parts))
        monkeypatch.setattr(logprobs, "cpu_kernels", lambda dtype, device: None)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 20, generator=generator)).to(dtype).requires_grad_()
    targets, given = torch.randint(0, 17, (7,), generator=generator), torch.randn(7, generator=generator)
    with torch.no_grad():
        logits[:, 17:] = 9.0  # padding of the vocabulary: larger than all, and not looked at
        logits[2, targets[2]] = 30.0  # as good as certain

    found = TokenLogprobs.apply(logits, targets, 17)
    exact = logits.detach().double().requires_grad_()
    wanted = exact[:, :17].log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)

    [gradient] = torch.autograd.grad(found, logits, given)
    [right] = torch.autograd.grad(wanted, exact, given.double())
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), right, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_every_row_is_in_one_part() -> None:
    logits = torch.empty(2**11, 2**10)
    covered = [row for part in logprobs._parts(logits) for row in range(len(logits))[part]]
    assert covered == list(range(len(logits)))
    assert len(list(logprobs._parts(logits))) == 2
