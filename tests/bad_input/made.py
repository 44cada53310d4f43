"""Files of the corpus: those that a command needs beside the one that is wrong, and those that YAML cannot write."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
import zstandard

from nemo_aligner.checksums import write_sums
from nemo_aligner.engine.checkpoints.hf_config import to_hf_config
from tests.fuzz.targets import gguf_file
from tests.models_without_weights import models_without_weights
from tests.tiny import ARCHIVED

CONFIG = ARCHIVED.to_nemo()


def right(folder: Path) -> None:
    """Inputs of which nothing is wrong; archives have no weights, as nothing here comes as far as to load them."""
    row = json.dumps({"input": "a", "output": "b", "text": "c", "reward": 0.5})
    (folder / "rows.jsonl").write_text(f"{row}\n{row}\n")
    models_without_weights(folder)
    (folder / "hf/model.safetensors").write_bytes(
        safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    )
    (folder / "temporary").mkdir()


def put(path: Path, content: Any) -> None:
    """A text as it is; `{hex: ...}` as bytes; else what `{made: name, ...}` makes of the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_bytes(content.encode())
    elif "hex" in content:
        path.write_bytes(bytes.fromhex(content["hex"]))
    else:
        made = _MAKERS[content["made"]](**{name: value for name, value in content.items() if name != "made"})
        if made is None:
            path.mkdir()
        else:
            path.write_bytes(made)


def repeated(text: str, times: int, before: str = "", after: str = "") -> bytes:
    return (before + text * times + after).encode()


def packed(text: str, by: str, keep: int | None = None) -> bytes:
    """Compressed; of that the first `keep` bytes."""
    return {"gzip": gzip.compress, "zstd": zstandard.compress}[by](text.encode())[:keep]


def archive(
    config: dict[str, Any] | str | None = None,
    files: dict[str, str] | None = None,
    member: dict[str, Any] | None = None,
    sums: str | None = None,
    keep: int | None = None,
) -> bytes:
    """A .nemo: `config` over that of the tiny policy, or in its place; one more `member` with these header fields."""
    text = config if isinstance(config, str) else yaml.safe_dump({**CONFIG, **(config or {})})
    content = {"model_config.yaml": text, "model_weights/x": "weights", **(files or {})}
    if sums is not None:
        content["SHA256SUMS"] = sums
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in content.items():
            _add(tar, name, text.encode())
        if member is not None:
            found = tarfile.TarInfo("model_weights/more")
            for name, value in member.items():
                setattr(found, name, value.encode() if name == "type" else value)
            tar.addfile(found)
    return buffer.getvalue()[:keep]


def tar(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, text in files.items():
            _add(made, name, text.encode())
    return buffer.getvalue()


def _add(made: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    made.addfile(member, io.BytesIO(content))


def gguf(values: dict[str, Any] | None = None, keep: int | None = None) -> bytes:
    """Of a tiny shape, whose `values` take the place of its own; the first `keep` bytes of it."""
    return gguf_file(**(values or {}))[:keep]


def safetensors(header: dict[str, Any], data: int = 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * data


def hf_config(changes: dict[str, Any]) -> bytes:
    """The tiny model's config.json with changes; null: without the key."""
    config = {**to_hf_config(ARCHIVED, "float32"), **changes}
    return json.dumps({name: value for name, value in config.items() if value != "absent"}).encode()


def pickled() -> bytes:
    """What would run a command, were it unpickled."""

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("written_by_a_pickle"),)

    return pickle.dumps(Runs())


def checkpoint(path: Path, state: dict[str, Any], files: dict[str, str]) -> None:
    """A training checkpoint's folder with its sums."""
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    sizes = {name: len(text) for name, text in files.items()}
    (path / "state.json").write_text(json.dumps({"format": 1, "step": 3, "files": sizes, **state}))
    write_sums(path)


_MAKERS: dict[str, Callable[..., bytes | None]] = {
    maker.__name__: maker for maker in (repeated, packed, archive, tar, gguf, safetensors, hf_config, pickled)
} | {"folder": lambda: None}
