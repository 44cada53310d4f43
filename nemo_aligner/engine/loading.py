"""From an archive to processes that hold its model: what every stage does first."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core.transformer.module import MegatronModule

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.cut import AS_STORED, Sizes
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.config.schema import ModelOverrides, TrainerConfig
from nemo_aligner.engine.checkpoints import archive_weights, nemo_archive, resident
from nemo_aligner.engine.checkpoints.hf_settings import named
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensors
from nemo_aligner.engine.checkpoints.settings import placed
from nemo_aligner.engine.checkpoints.tokenizer import ArchiveTokenizer, load_tokenizer
from nemo_aligner.engine.checks import parallel_sizes
from nemo_aligner.engine.model.build import RunOptions, activation_of, build_model, parse_precision
from nemo_aligner.engine.model.libraries import choose, this_machine
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.processes.launch import launch_local_ranks
from nemo_aligner.errors import CheckpointError

log = logging.getLogger(__name__)


@contextmanager
def start_for_archive(
    trainer: TrainerConfig,
    path: str | Path,
    sizes: Sizes = AS_STORED,
    *,
    key: str,
    seed: int = 1234,
) -> Iterator[MegatronCluster]:
    """The processes of this run, cut as the archive at `path` or the caller asks.

    `key` is the config key that named the archive. The archive's config is read before any process starts, so a wrong
    path fails at once.
    """
    tensor, pipeline = parallel_sizes(trainer, path, sizes, key=key)
    launch_local_ranks(trainer)
    with start_cluster(
        trainer,
        tensor=tensor,
        pipeline=pipeline,
        context=sizes.context,
        expert=sizes.expert,
        expert_tensor=sizes.expert_tensor,
        seed=seed,
    ) as cluster:
        yield cluster


@contextmanager
def start_without_model(trainer: TrainerConfig, *, seed: int = 1234) -> Iterator[MegatronCluster]:
    """The processes of a run that loads nothing: all of them data-parallel ranks."""
    launch_local_ranks(trainer)
    with start_cluster(trainer, tensor=1, pipeline=1, seed=seed) as cluster:
        yield cluster


def start_for_training(
    trainer: TrainerConfig, model: ModelOverrides, *, key: str
) -> AbstractContextManager[MegatronCluster]:
    """The processes of a training run, cut as its `model.*` keys say; `key` names the archive in messages."""
    return start_for_archive(trainer, model.restore_from_path, model.sizes, key=key, seed=model.seed)


@dataclass(frozen=True)
class LoadedModel:
    """This rank's part of an archive's model, with what belongs to it."""

    module: MegatronModule
    arch: Architecture
    tokenizer: ArchiveTokenizer
    run: RunOptions
    source: Path  # the archive it came from
    merges_adapter: bool = False  # before it is written
    digest: str | None = None  # of the archive whose weights these are, all of them; None also where nobody asks


def load_for_inference(
    path: str | Path, cluster: MegatronCluster, *, precision: str, key: str, merge: bool = True
) -> LoadedModel:
    """The archive's model in evaluation mode; computes in `precision`.

    Of an adapter's archive: its base with the adapter merged, or beside the weights without `merge`.
    """
    run = RunOptions.for_inference(parse_precision(precision), tp=cluster.tp, pp=cluster.pp)
    loaded = _load(path, nemo_archive.read_architecture(path, key=key), cluster, run, key=key, merge=merge)
    loaded.module.eval()
    return loaded


def load_for_training(
    model: ModelOverrides, trainer: TrainerConfig, cluster: MegatronCluster, *, key: str, new_head: str | None = None
) -> LoadedModel:
    """The archive's model with the `model.*` overrides of a training run.

    `new_head`: a reward model type; the archive is then a policy's, and gets a fresh reward head instead of its
    output layer.
    """
    arch = model.with_router_settings(nemo_archive.read_architecture(model.restore_from_path, key=key))
    if model.encoder_seq_length is not None:
        arch = replace(arch, encoder_seq_length=model.encoder_seq_length)
    libraries = choose(
        model,
        this_machine(),
        arch,
        activation=activation_of(arch),
        tp=cluster.tp,
        lora=model.peft.lora is not None,
        selective=model.activations_checkpoint_granularity == "selective",
    )
    if cluster.is_main:
        log.info("%s", libraries)
    loaded = _load(
        model.restore_from_path,
        arch,
        cluster,
        RunOptions(
            dtype=parse_precision(trainer.precision),
            tp=cluster.tp,
            pp=cluster.pp,
            vpp=model.virtual_pipeline_model_parallel_size or 1,
            context=cluster.cp,
            ep=cluster.ep,
            etp=cluster.etp,
            sequence_parallel=model.sequence_parallel,
            activations_checkpoint_granularity=model.activations_checkpoint_granularity,
            activations_checkpoint_method=model.activations_checkpoint_method,
            activations_checkpoint_num_layers=model.activations_checkpoint_num_layers,
            hidden_dropout=model.hidden_dropout,
            attention_dropout=model.attention_dropout,
            lora=model.peft.lora,
            lora_seed=model.seed,
            libraries=libraries,
        ),
        key=key,
        new_head=new_head,
    )
    if model.peft.restore_from_path is not None:
        _begin_adapter(loaded, model.peft.restore_from_path, cluster)
    return replace(loaded, merges_adapter=model.peft.merge)


def _begin_adapter(loaded: LoadedModel, path: str, cluster: MegatronCluster) -> None:
    """Fill the adapters of `loaded` with those of the archive at `path`, which `check_adapter` has looked at."""
    key = "model.peft.restore_from_path"
    arch = nemo_archive.read_architecture(path, key=key)
    nemo_archive.check_base(path, loaded.source, arch, cluster, key=key)
    with nemo_archive.open_archive(path, cluster, key=key) as folder:
        archive_weights.load_adapter(loaded.module, folder, cluster, new_head=arch.reward_model_type is None)


def _load(
    path: str | Path,
    arch: Architecture,
    cluster: MegatronCluster,
    run: RunOptions,
    *,
    key: str,
    new_head: str | None = None,
    merge: bool = True,
) -> LoadedModel:
    """`arch` is that of the archive at `path`, with what the run changes of it."""
    source = base = Path(path)  # `base` has the weights, which an adapter's archive does not
    adapter, has_head = arch.peft, arch.reward_model_type is not None
    if adapter is not None:
        base = nemo_archive.base_of(path, arch, key=key)
        nemo_archive.check_base(path, base, arch, cluster, key=key)
        run = replace(run, lora=LoraTuning.from_nemo(adapter))
    arch = replace(arch, reward_model_type=new_head or arch.reward_model_type)
    head_is_new = arch.reward_model_type is not None and (
        nemo_archive.read_architecture(base, key=key).reward_model_type is None
    )
    # what stays in memory is all of a model: neither a new head nor adapters, be they new or an archive's, are there
    digest = None if run.lora is not None or head_is_new else resident.digest_of(path, cluster)
    stayed = resident.take(arch, digest, run.dtype, cluster, run.vpp)
    if stayed is not None:
        if cluster.is_main:
            log.info("%s is in memory already", path)
        arch, tokenizer = with_vocabulary(arch, stayed.tokenizer, named(key, path)), stayed.tokenizer
        module = build_model(arch, run)
        resident.fill(module, stayed.weights)
        return LoadedModel(module, arch, tokenizer, run, source, digest=digest)
    with nemo_archive.open_archive(base, cluster, key=key) as folder:
        arch, tokenizer = _opened(path, folder, arch, key)
        module = build_model(arch, run)
        archive_weights.load_weights(module, folder, cluster, new_head=head_is_new, key=key)
    if adapter is not None:
        with nemo_archive.open_archive(path, cluster, key=key) as folder:
            archive_weights.load_adapter(module, folder, cluster, new_head=not has_head)
        if merge and module.adapters is not None:
            module.adapters.dissolve(module)
            arch = replace(arch, peft=None)
    return LoadedModel(module, arch, tokenizer, run, source, digest=digest)


def _opened(path: str | Path, folder: Path, arch: Architecture, key: str) -> tuple[Architecture, ArchiveTokenizer]:
    """The shape with its vocabulary, and the tokenizer, of an opened archive."""
    with placed(named(key, path)):
        tokenizer = load_tokenizer(folder, arch)
    return with_vocabulary(arch, tokenizer, named(key, path)), tokenizer


def with_vocabulary(arch: Architecture, tokenizer: ArchiveTokenizer, where: str) -> Architecture:
    """The shape with its vocabulary, which archives of NeMo leave to the tokenizer.

    Raises CheckpointError where `tokenizer` has tokens that the model does not.
    """
    if tokenizer.vocab_size > (arch.vocab_size or tokenizer.vocab_size):
        last = tokenizer.vocab_size - 1
        raise CheckpointError(f"{where}: the tokenizer has ids up to {last}, the model up to {arch.vocab_size - 1}")
    return replace(arch, vocab_size=arch.vocab_size or tokenizer.vocab_size)


@dataclass(frozen=True)
class DescribedArchive:
    """An opened archive, none of whose weights is in memory: `tensors` are whole Megatron tensors."""

    arch: Architecture
    tokenizer: ArchiveTokenizer
    tensors: LazyTensors


@contextmanager
def described_archive(path: str | Path, cluster: MegatronCluster, *, key: str) -> Iterator[DescribedArchive]:
    """The archive at `path` as one process would hold it. Raises CheckpointError.

    An adapter is merged into its base, for which all of it is in memory.
    """
    arch = nemo_archive.read_architecture(path, key=key)
    if arch.peft is not None:
        loaded = load_for_inference(path, cluster, precision=arch.precision, key=key)
        weights = {name: value for name, value in loaded.module.state_dict().items() if hasattr(value, "shape")}
        yield DescribedArchive(loaded.arch, loaded.tokenizer, LazyTensors.of(weights))
        return
    with nemo_archive.open_archive(path, cluster, key=key) as folder:
        arch, tokenizer = _opened(path, folder, arch, key)
        model = build_model(arch, RunOptions(dtype=parse_precision(arch.precision), shapes_only=True))
        yield DescribedArchive(arch, tokenizer, archive_weights.whole_tensors(model, folder))
