"""Names that NeMo-Aligner 0.7 and earlier, or Megatron, used for keys of ours: accepted, with one line of log each."""

from __future__ import annotations

# ahead of what may be missing
import nemo_aligner.config.requirements  # noqa: F401

# isort: split
import logging
import re
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

Aliases = Mapping[str, str]

# other name → name here; applied from top to bottom
TRAINING: Aliases = {
    "model.optim.overlap_grad_reduce": "model.optim.overlap_grad_sync",
    "model.optim.overlap_param_gather": "model.optim.overlap_param_sync",
}
REINFORCE: Aliases = {
    **TRAINING,
    "trainer.reinforce": "trainer.ppo",
    "model.reinforce": "model.ppo",
    "remote_rm": "remote_critic_rm",
    "trainer.ppo.num_rollouts_per_prompt": "model.ppo.num_rollout_per_prompt",
    "model.ppo.num_rollouts_per_prompt": "model.ppo.num_rollout_per_prompt",
}
SERVING: Aliases = {
    "trainer.rs.inference_micro_batch_size": "inference.inference_micro_batch_size",
    "trainer.ppo.inference_micro_batch_size": "inference.inference_micro_batch_size",
    "inference.micro_batch_size": "inference.inference_micro_batch_size",
    "model.forward_micro_batch_size": "inference.inference_micro_batch_size",
}


_NEMOS_BLOCKS = r"trainer\.ppo\.(trt_llm|batch_iterator)\."
"""Below blocks that NeMo-Aligner's YAMLs have, and that are null here."""


def let_through(arguments: Sequence[str], aliases: Aliases) -> list[str]:
    """Overrides of older names with `++`, so that Hydra takes keys which the YAML does not have."""
    if not aliases:
        return list(arguments)
    old = re.compile(rf"({'|'.join(map(re.escape, aliases))})[.=]|{_NEMOS_BLOCKS}")
    return [f"++{argument}" if old.match(argument) else argument for argument in arguments]


def renamed(cfg: DictConfig, aliases: Aliases) -> DictConfig:
    """`cfg` with older names in their new places; values given under an older name win."""
    for old, new in aliases.items():
        parent, _, name = old.rpartition(".")
        holder = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(holder, DictConfig) or name not in holder:
            continue
        log.info("%s is taken as %s", old, new)
        value = holder._get_node(name)
        del holder[name]
        OmegaConf.update(cfg, new, value, merge=True, force_add=True)
        for depth in range(old.count("."), 0, -1):  # the innermost first: it may be all that the one around it holds
            _drop_if_empty(cfg, ".".join(old.split(".")[:depth]), keep=new)
    return cfg


def _drop_if_empty(cfg: DictConfig, block: str, keep: str) -> None:
    """A block that held nothing but older names goes, or it would be an unknown key."""
    parent, _, name = block.rpartition(".")
    holder = OmegaConf.select(cfg, parent) if parent else cfg
    if not keep.startswith(f"{block}.") and isinstance(holder, DictConfig) and holder.get(name) == {}:
        del holder[name]
