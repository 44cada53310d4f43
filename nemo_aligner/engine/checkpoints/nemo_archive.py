"""The .nemo archive: an uncompressed tar of `model_config.yaml`, `model_weights/` and the tokenizer's files.

    model_config.yaml         shape and provenance, NeMo's key names
    SHA256SUMS                sums of all other files, checked before a weight is used; other programs' have none
    model_weights/            megatron torch_dist shards, keys with NeMo's prefix `model.`; any TP/PP reads them
    tokenizer.json | *.model  the tokenizer

An extracted folder is accepted wherever a file is, and so is a Hugging Face folder. The archive of an adapter has the
base's shape and tokenizer, the adapter's weights alone, and says in `peft` of its `model_config.yaml` which archive its
base is.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner.checksums import check_sums, known_sum, write_sums
from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.engine.checkpoints.archive_tar import checked_members, open_tar, pack, read_member
from nemo_aligner.engine.checkpoints.archive_weights import ADAPTERS, PREFIX, WEIGHTS
from nemo_aligner.engine.checkpoints.hf_settings import files_that_count, is_hf_folder, named, read_hf_architecture
from nemo_aligner.errors import CheckpointError
from nemo_aligner.files import fsync, writing
from nemo_aligner.ranks import together
from nemo_aligner.scratch import remove_leftovers, scratch_folder, scratch_root

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensors
    from nemo_aligner.engine.checkpoints.tokenizer import ArchiveTokenizer
    from nemo_aligner.engine.interfaces import Cluster

log = logging.getLogger(__name__)

CONFIG = "model_config.yaml"
_OPENED = "nemo_aligner_archive_"


def read_architecture(path: str | Path, *, key: str = "archive") -> Architecture:
    """The shape an archive (file, extracted folder or Hugging Face folder) declares; cheap: no weights are read.

    `key` is the config key that named the archive, for messages. Raises CheckpointError.
    """
    path = Path(path)
    if is_hf_folder(path):
        return read_hf_architecture(path, key=key)
    if path.is_dir():
        config = path / CONFIG
        if not config.is_file():
            raise CheckpointError(
                f"{named(key, path)}: neither an extracted .nemo archive ({CONFIG}) nor a Hugging Face folder "
                "(config.json)"
            )
        text = config.read_bytes()
    else:
        with open_tar(path, key) as tar:
            text = read_member(tar, CONFIG, path, key)
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as fault:
        raise CheckpointError(
            f"{named(key, path)}: {CONFIG} is not valid YAML: {' '.join(str(fault).split())}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{named(key, path)}: {CONFIG} is not a mapping")
    try:
        return Architecture.from_nemo(content)
    except (CheckpointError, TypeError) as fault:
        raise CheckpointError(f"{named(key, path)}: {fault}") from None


def adapter_entry(lora: LoraTuning, base: Path, digest: str) -> dict[str, Any]:
    """The `peft` of an adapter's archive; `digest` is the `archive_hash` of the archive `base`."""
    where = {"path": str(base.resolve()), "sha256": digest}
    return {"peft_scheme": "lora", "lora_tuning": lora.to_nemo(), "base": where}


def base_of(path: str | Path, arch: Architecture, *, key: str) -> Path:
    """The archive that the adapter at `path` belongs to: where it was, or beside the adapter.

    Raises CheckpointError where it is in neither place.
    """
    assert arch.peft is not None, "a whole model has no base"
    stored = Path(arch.peft["base"]["path"])
    for place in (stored, Path(path).parent / stored.name):
        if place.exists():
            return place
    raise CheckpointError(
        f"{named(key, path)} is an adapter, and its base is not there: {stored} (put it beside the adapter, if it has "
        "moved)"
    )


def check_base(path: str | Path, base: Path, arch: Architecture, cluster: Cluster, *, key: str) -> None:
    """Raises CheckpointError on every rank where `base` is not what the adapter at `path` was trained beside."""
    assert arch.peft is not None, "a whole model has no base"
    with together(cluster):
        if cluster.is_main and archive_hash(base) != arch.peft["base"]["sha256"]:
            raise CheckpointError(f"{named(key, path)} is an adapter of another archive than {base} as it is now")


@contextmanager
def open_archive(path: str | Path, cluster: Cluster, *, key: str = "archive") -> Iterator[Path]:
    """The archive's folder: itself when already extracted, else a temporary one that is removed afterwards.

    One rank per node extracts. Raises CheckpointError for archives that are damaged, by the sums in them too, and for
    members that leave the folder, are no plain files, or claim more than is there.
    """
    path = Path(path)
    if path.is_dir():
        with together(cluster):
            if cluster.is_main:
                _check_sums(path, path, key)
        yield path
        return
    extracts = int(os.environ.get("LOCAL_RANK", "0")) == 0
    # the same name on every rank of a node, whoever makes it; another on every node, as two may share a machine
    token = cluster.broadcast(next(tempfile._get_candidate_names()))  # type: ignore[attr-defined]
    node = os.environ.get("SLURM_NODEID") or os.environ.get("GROUP_RANK") or "0"
    folder = scratch_root() / f"{_OPENED}{token}_{node}"
    with contextlib.ExitStack() as stack:
        with together(cluster):
            if extracts:
                remove_leftovers(folder.parent, _OPENED)
                stack.enter_context(scratch_folder(folder))
                _extract(path, folder, key)
                _check_sums(path, folder, key)
        yield folder
        cluster.barrier()  # nobody may still be reading when the folder goes


def _extract(path: Path, folder: Path, key: str) -> None:
    with open_tar(path, key) as tar:
        for member in checked_members(tar, path, key, room=shutil.disk_usage(folder).free):
            try:
                tar.extract(member, folder, filter="data")
            except tarfile.FilterError as fault:
                raise CheckpointError(f"{named(key, path)}: refused, {fault}") from None
            except OSError as fault:
                if isinstance(fault, tarfile.ReadError):
                    raise
                raise CheckpointError(f"{named(key, path)}: cannot be extracted to {folder}: {fault}") from None
    if not (folder / WEIGHTS).is_dir():
        found = "model_weights.ckpt" if (folder / "model_weights.ckpt").exists() else "nothing"
        raise CheckpointError(
            f"{named(key, path)}: weights are read from {WEIGHTS}/ (megatron torch_dist); found {found}"
        )


def _check_sums(path: Path, folder: Path, key: str) -> None:
    try:
        check_sums(folder)
    except CheckpointError as fault:
        raise CheckpointError(f"{named(key, path)}: {fault}") from None


def save_archive(
    path: str | Path,
    model: MegatronModule,
    arch: Architecture,
    tokenizer: ArchiveTokenizer,
    cluster: Cluster,
    weights: LazyTensors | None = None,
) -> None:
    """Write the archive; collective. It appears whole or not at all: shards, tar, fsync, rename.

    Of a model with adapters these alone where `arch.peft` says so, and where it does not, its weights with these added.
    `weights` are whole Megatron tensors in the place of the model's own.
    """
    import yaml

    from nemo_aligner.engine.checkpoints.sharded import save_sharded, without_extra_state, without_frozen

    path = Path(path)
    staging, partial = path.with_name(f".{path.name}.saving"), path.with_name(f".{path.name}.partial")
    with together(cluster), writing(path):
        if cluster.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)  # what a killed save left
            (staging / WEIGHTS).mkdir(parents=True)
    try:
        state = without_extra_state(model.sharded_state_dict(prefix=PREFIX))
        if arch.peft is not None:
            state = without_frozen(state, model, PREFIX)
        else:
            state = {name: value for name, value in state.items() if not name.startswith(ADAPTERS)}
        if weights is not None:
            from nemo_aligner.engine.checkpoints.whole_weights import save_whole

            with weights.counted("writing", show=cluster.is_main) as tensors:
                save_whole(state, staging / WEIGHTS, tensors, PREFIX)
        elif model.adapters is None or arch.peft is not None:
            save_sharded(state, staging / WEIGHTS)
        else:
            from nemo_aligner.engine.checkpoints.merged import save_merged

            save_merged(state, staging / WEIGHTS, model, PREFIX)
        with together(cluster), writing(path):
            if cluster.is_main:
                (staging / CONFIG).write_text(yaml.safe_dump(arch.to_nemo(), sort_keys=False))
                for name, content in tokenizer.files.items():
                    (staging / name).write_bytes(content)
                write_sums(staging)
                pack(staging, partial, first=CONFIG)
                os.replace(partial, path)
                fsync(path.parent)
    finally:
        if cluster.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):  # a disk that takes nothing lets go of nothing either
                partial.unlink()
    if cluster.is_main:
        log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)


def archive_hash(path: str | Path) -> str:
    """sha256 over every byte of an archive file, or over names and contents of a folder, in name order.

    Of a Hugging Face folder the files count that are read.
    """
    path = Path(path)
    if path.is_file():
        return known_sum(path)
    digest = hashlib.sha256()
    entries = files_that_count(path) if is_hf_folder(path) else (p for p in path.rglob("*") if p.is_file())
    for entry in sorted(entries):
        digest.update(str(entry.relative_to(path)).encode())
        with entry.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
