"""From a Hugging Face folder, a GGUF file or a bare shape to a .nemo archive, and back to a Hugging Face folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_aligner.config.architecture import Architecture, padded_vocab_size
from nemo_aligner.config.cut import WHOLE, uneven
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.config.yaml_file import read_mapping
from nemo_aligner.engine.checkpoints.gguf_weights import read_gguf
from nemo_aligner.engine.checkpoints.hf_config import to_hf_config
from nemo_aligner.engine.checkpoints.hf_folder import SHARD_BYTES, read_hf_folder, write_hf_folder
from nemo_aligner.engine.checkpoints.hf_settings import is_hf_folder
from nemo_aligner.engine.checkpoints.hf_weights import layer_of, to_megatron
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensors
from nemo_aligner.engine.checkpoints.nemo_archive import (
    adapter_entry,
    archive_hash,
    open_archive,
    read_architecture,
    save_archive,
)
from nemo_aligner.engine.checkpoints.peft_folder import read_peft_folder, write_peft_folder
from nemo_aligner.engine.checkpoints.settings import placed
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer, load_tokenizer
from nemo_aligner.engine.loading import described_archive, load_for_inference, start_for_archive, with_vocabulary
from nemo_aligner.engine.model.build import RunOptions, build_model, parse_precision
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.processes.launch import launch_local_ranks
from nemo_aligner.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What an archive is made of: the shape, whole tensors under Hugging Face names, and a tokenizer.json."""

    arch: Architecture
    tensors: LazyTensors | None  # None: random weights
    tokenizer_json: bytes
    where: str = ""  # names what was read, for messages


def read_checkpoint(path: Path) -> Checkpoint:
    """A Hugging Face folder or a GGUF file. Raises CheckpointError."""
    if not path.exists():
        # "owner/name" may be a model of the hub, which nothing here downloads
        hub = len(path.parts) == 2 and not path.is_absolute() and not path.parent.is_dir()
        hint = f"; is it on the hub? hf download {path} --local-dir {path.name}" if hub else ""
        raise CheckpointError(f"--input {path}: no such file or folder{hint}")
    log.info("reading %s", path)
    return Checkpoint(*(read_hf_folder(path) if path.is_dir() else read_gguf(path)), where=f"--input {path}")


def random_checkpoint(shape: Path) -> Checkpoint:
    """Random weights in the shape of a YAML such as those of conf/model, with the byte tokenizer.

    Raises ConfigError, CheckpointError.
    """
    given = read_mapping(shape, "--random-init")
    where = f"--random-init {shape}"
    return Checkpoint(
        Architecture.from_nemo({**given, "tokenizer": BYTE_TOKENIZER}, where), None, byte_tokenizer(), where
    )


def with_first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The first `count` layers alone: a small backbone for a reward model out of a pretrained policy."""
    if not 1 <= count <= checkpoint.arch.num_layers:
        raise CheckpointError(f"--num-layers {count}: the model has {checkpoint.arch.num_layers} layers")
    arch = replace(checkpoint.arch, num_layers=count)
    if isinstance(arch.moe_layer_freq, list):
        arch.moe_layer_freq = arch.moe_layer_freq[:count]
        if not any(arch.moe_layer_freq):
            arch.num_moe_experts = None
    tensors = checkpoint.tensors
    if tensors is not None:
        tensors = LazyTensors({name: part for name, part in tensors.parts.items() if (layer_of(name) or 0) < count})
    return replace(checkpoint, arch=arch, tensors=tensors)


def write_archive(checkpoint: Checkpoint, output: Path, *, precision: str, seed: int, tensor: int = 1) -> None:
    """Save the archive, each of `tensor` processes its part, a tensor at a time; random weights as a whole.

    `precision` is bf16 or 32. Raises CheckpointError for weights that are not those of the shape, and for a shape that
    cannot be cut so; the weights of an archive are the same however many processes wrote it.
    """
    arch, trainer = checkpoint.arch, TrainerConfig(accelerator="cpu", devices=tensor)
    _check_cut(checkpoint, tensor)
    log.info("writing %s: %d layers of %d, vocabulary %d", output, arch.num_layers, arch.hidden_size, arch.vocab_size)
    launch_local_ranks(trainer)
    with start_cluster(trainer, tensor=tensor, pipeline=1, seed=seed) as cluster:
        write_part(checkpoint, output, cluster, precision=precision)


def _check_cut(checkpoint: Checkpoint, tensor: int) -> None:
    """Raises CheckpointError where the tensors of `checkpoint` cannot be cut into so many parts."""
    arch = checkpoint.arch
    if tensor > 1 and checkpoint.tensors is None:
        raise CheckpointError("--tensor-parallel: random weights would not be those of one process; leave it out")
    if tensor < 1:
        raise CheckpointError(f"--tensor-parallel {tensor}: it is below 1")
    rows = padded_vocab_size(arch, 1)
    for name in (*uneven(arch, tensor), *([f"padded vocabulary {rows}"] if rows % tensor else [])):
        raise CheckpointError(f"--tensor-parallel {tensor}: it does not divide the model's {name}")


def write_part(checkpoint: Checkpoint, output: Path, cluster: MegatronCluster, *, precision: str) -> None:
    """This rank's part of `write_archive`. Collective."""
    arch, given = checkpoint.arch, checkpoint.tensors
    rows = padded_vocab_size(arch, 1)
    # as many rows as one process would have, where a model that is cut so pads to more
    cut = replace(arch, make_vocab_size_divisible_by=rows // cluster.tp) if cluster.tp > 1 else arch
    run = RunOptions(dtype=parse_precision(precision), tp=cluster.tp, shapes_only=given is not None)
    with placed(checkpoint.where):
        weights = None if given is None else to_megatron(arch, given, rows)
        tokenizer = FastTokenizer(checkpoint.tokenizer_json, arch.tokenizer)
        arch = with_vocabulary(arch, tokenizer, checkpoint.where)
    save_archive(output, build_model(cut, run), replace(arch, precision=precision), tokenizer, cluster, weights)


def import_adapter(folder: Path, base: Path, output: Path, *, precision: str) -> None:
    """An adapter of the PEFT library as the archive of an adapter of `base`. Raises CheckpointError."""
    arch = read_architecture(base, key="--base")
    if arch.peft is not None or arch.reward_model_type is not None:
        raise CheckpointError(f"--base {base}: an adapter, or a reward model; give a whole policy")
    log.info("reading %s", folder)
    lora, tensors = read_peft_folder(folder, arch)
    with start_for_archive(TrainerConfig(accelerator="cpu"), base, WHOLE, key="--base") as cluster:
        with open_archive(base, cluster, key="--base") as opened, placed(f"--base {base}"):
            tokenizer = load_tokenizer(opened, arch)
        arch = with_vocabulary(arch, tokenizer, f"--base {base}")
        model = build_model(arch, RunOptions(dtype=parse_precision(precision), lora=lora))
        _, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected, unexpected
        peft = adapter_entry(lora, base, archive_hash(base))
        save_archive(output, model, replace(arch, precision=precision, peft=peft), tokenizer, cluster)


def export_adapter(source: Path, target: Path) -> None:
    """A policy's adapter as a folder that the PEFT library loads. Raises CheckpointError where there is none."""
    arch = read_architecture(source, key="--input")
    if arch.peft is None:
        raise CheckpointError(f"--input {source}: a whole model; --adapter wants the archive of an adapter")
    if arch.reward_model_type is not None:
        raise CheckpointError(f"--input {source}: of a reward model, whose head has no Hugging Face form")
    to_hf_config(arch, arch.precision)  # or there is no Hugging Face model that it could be loaded into
    with start_for_archive(TrainerConfig(accelerator="cpu"), source, WHOLE, key="--input") as cluster:
        loaded = load_for_inference(source, cluster, precision=arch.precision, key="--input", merge=False)
        log.info("writing %s", target)
        write_peft_folder(target, arch, LoraTuning.from_nemo(arch.peft), loaded.module.state_dict())
    log.info("wrote %s", target)


def export_hf(source: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A policy's archive as a folder that transformers loads; a tensor at a time, unless it is an adapter's.

    Raises CheckpointError for reward models, and for weights that are not those of the shape.
    """
    if read_architecture(source, key="--input").reward_model_type is not None:
        raise CheckpointError(f"--input {source}: a reward model, whose head has no Hugging Face form; give a policy")
    if is_hf_folder(source):
        raise CheckpointError(f"--input {source}: a Hugging Face folder already")
    trainer, key = TrainerConfig(accelerator="cpu"), "--input"
    with (
        start_for_archive(trainer, source, WHOLE, key=key) as cluster,
        described_archive(source, cluster, key=key) as found,
    ):
        log.info("writing %s", target)
        with found.tensors.counted("writing", show=cluster.is_main) as tensors:
            write_hf_folder(target, found.arch, tensors, found.tokenizer, shard_bytes)
    log.info("wrote %s", target)
