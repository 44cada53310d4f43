"""FP8 weights by blocks are the numbers they mean, and no other way of quantising is taken for theirs."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("block", [None, [16], "x", [0, 8], [8, 8, 8], [8.0, 8.0]])
def test_a_block_that_is_not_two_lengths_is_refused(block: Any) -> None:
    said = r"config\.json: quantization_config: weight_block_size=.* is not two whole numbers from 1 on"
    with pytest.raises(CheckpointError, match=f"^{said}$"):
        dequantised({}, {"quant_method": "fp8", "weight_block_size": block})


@pytest.mark.parametrize(
    ("weight", "scale"),
    [((40, 32), ()), ((40, 32), (2, 2)), ((40, 32), (3, 2, 1)), ((40,), (3,)), ((4, 40, 32), (3, 2))],
)
def test_scales_that_are_not_one_for_each_block_are_refused_by_name(weight: tuple, scale: tuple) -> None:
    given = {"w": torch.ones(weight).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(scale)}
    with pytest.raises(
        CheckpointError, match=r"^w_scale_inv is \[.*\] for a weight of \[.*\], and not one scale for each"
    ):
        dequantised(given, {"quant_method": "fp8", "weight_block_size": [16, 16]})
