"""Models of `transformers` with random weights, for ours to be compared with."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def random_model(family: str, settings: dict[str, Any]) -> torch.nn.Module:
    """`<family>ForCausalLM` of these settings, in evaluation mode.

    Biases and norms are 0 and 1 at first, so all are drawn anew: every weight must matter.
    """
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(**settings)
    model: torch.nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model
