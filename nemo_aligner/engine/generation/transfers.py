"""Between host and device, in one copy each way: every other would make the host wait for the device once more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one shape, int64, float64 or bool, as tensors on `device`; nothing waits for them to arrive."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = np.stack([array.astype(np.int64) if array.dtype == bool else array.view(np.int64) for array in arrays])
    sent = torch.from_numpy(packed).pin_memory().to(device, non_blocking=True)
    types = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}
    return [
        row.bool() if array.dtype == bool else row.view(types[array.dtype])
        for row, array in zip(sent, arrays, strict=True)
    ]


def download(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Tensors of one shape on one device as arrays of their dtypes; integers of at most 53 bits."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    # float64 holds each of them as it is
    packed = torch.stack([tensor.double() for tensor in tensors]).cpu()
    return [row.to(tensor.dtype).numpy() for row, tensor in zip(packed, tensors, strict=True)]
