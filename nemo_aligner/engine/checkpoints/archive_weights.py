"""The weights of an opened archive, into a model or as whole tensors, whatever TP and PP wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.architecture import padded_vocab_size
from nemo_aligner.engine.checkpoints.hf_settings import is_hf_folder, named
from nemo_aligner.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.transformer.module import MegatronModule

    from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensors
    from nemo_aligner.engine.interfaces import Cluster

WEIGHTS = "model_weights"
PREFIX = "model."
ADAPTERS = f"{PREFIX}adapters."


def load_weights(
    model: MegatronModule, folder: Path, cluster: Cluster, *, new_head: bool = False, key: str = "archive"
) -> None:
    """Read an opened archive's weights into `model`, whatever TP and PP wrote them.

    `new_head`: the archive is a policy's and the model a reward model whose head keeps its random values.
    """
    from nemo_aligner.engine.checkpoints.sharded import without_extra_state

    state = without_extra_state(model.sharded_state_dict(prefix=PREFIX))
    state = {name: value for name, value in state.items() if not name.startswith(ADAPTERS)}
    if new_head:
        state = {name: value for name, value in state.items() if ".rm_head." not in name}
    if is_hf_folder(folder):
        _fill_from_hf(state, folder, model.config.tensor_model_parallel_size, key)
        cluster.barrier()
        return
    may_stay = ["_extra_state", *(["output_layer.weight"] if hasattr(model, "rm_head") or new_head else [])]
    _fill(model, state, folder, may_stay)
    cluster.barrier()


def load_adapter(model: MegatronModule, folder: Path, cluster: Cluster, *, new_head: bool = False) -> None:
    """Read an opened adapter's archive into the adapters of `model`, and into its reward head unless `new_head`."""
    from nemo_aligner.engine.checkpoints.sharded import without_extra_state, without_frozen

    state = without_frozen(without_extra_state(model.sharded_state_dict(prefix=PREFIX)), model, PREFIX)
    if new_head:
        state = {name: value for name, value in state.items() if ".rm_head." not in name}
    _fill(model, state, folder, ["_extra_state"])
    cluster.barrier()


def _fill(model: MegatronModule, state: dict[str, Any], folder: Path, may_stay: list[str]) -> None:
    """The weights of `model` that `state` names, from an opened archive."""
    from nemo_aligner.engine.checkpoints.sharded import load_sharded

    loaded = load_sharded(state, folder / WEIGHTS, may_stay=may_stay)
    weights = {name.removeprefix(PREFIX): value for name, value in loaded.items() if name.startswith(PREFIX)}
    _, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise CheckpointError(f"the archive's weights do not fit the model: {', '.join(unexpected[:4])}")


def _fill_from_hf(state: ShardedStateDict, folder: Path, tp: int, key: str) -> None:
    from nemo_aligner.engine.checkpoints.hf_folder import read_hf_folder
    from nemo_aligner.engine.checkpoints.hf_weights import to_megatron
    from nemo_aligner.engine.checkpoints.whole_weights import fill

    arch, tensors, _ = read_hf_folder(folder, key=key)
    try:
        fill(state, to_megatron(arch, tensors, padded_vocab_size(arch, tp)), PREFIX)
    except CheckpointError as fault:
        raise CheckpointError(f"{named(key, folder)}: {fault}") from None


def whole_tensors(model: MegatronModule, folder: Path) -> LazyTensors:
    """An opened archive's weights as whole Megatron tensors, read when they are asked for; `model` is the whole one."""
    from nemo_aligner.engine.checkpoints.sharded import without_extra_state
    from nemo_aligner.engine.checkpoints.whole_weights import archive_tensors

    return archive_tensors(folder / WEIGHTS, without_extra_state(model.sharded_state_dict(prefix=PREFIX)), PREFIX)
