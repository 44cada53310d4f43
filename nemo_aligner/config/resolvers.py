"""Arithmetic in YAML and on the command line: `${multiply:1e-6,1.001}`, `${subtract:10,3}`, `${int_div:64,8}`."""

from __future__ import annotations

import operator

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """Make them known to OmegaConf; may be called again."""
    for name, function in (("multiply", operator.mul), ("subtract", operator.sub), ("int_div", operator.floordiv)):
        OmegaConf.register_new_resolver(name, function, replace=True)
