"""FP8 weights by blocks are the numbers they mean, and no other way of quantising is taken for theirs."""

from __future__ import annotations

import pytest
import torch

from nemo_aligner.engine.checkpoints.hf_tensors import dequantised
from nemo_aligner.errors import CheckpointError


def test_scales_are_of_blocks_of_128_unless_the_config_says_otherwise_and_of_fp8_alone() -> None:
    stored, scale = torch.ones(130, 257).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    plain = torch.ones(2, dtype=torch.bfloat16)
    found = dequantised({"w": stored, "w_scale_inv": scale, "b": plain}, {"quant_method": "fp8"})
    assert found.keys() == {"w", "b"}
    assert found["b"] is plain
    assert found["w"].dtype == torch.float32
    assert found["w"][[0, 127, 128, 129]][:, [0, 127, 128, 255, 256]].tolist() == [
        [1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6], [4, 4, 5, 5, 6]
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"^w is torch\.bfloat16, and yet has scales of FP8 blocks$"):
        dequantised({"w": plain, "w_scale_inv": scale}, None)
    with pytest.raises(CheckpointError, match=r"^w is int8 without scales that are known$"):
        dequantised({"w": torch.ones(2, dtype=torch.int8), "w_scale_inv": scale}, {"quant_method": "fp8"})
