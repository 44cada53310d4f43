"""What a Hugging Face folder says of its model, without the weights: read before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.checkpoints.hf_config import architecture_of
from nemo_aligner.engine.checkpoints.settings import placed
from nemo_aligner.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
TOKENS = ("bos", "eos", "pad")
_ROLES = (*TOKENS, "unk", "sep", "cls", "mask")
"""Of the tokens that transformers adds by their names."""
_NAMED = ("tokenizer_config.json", "special_tokens_map.json")
_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")
_ADDED = "added_tokens.json"
_BY_ID = ("generation_config.json", CONFIG)


def named(key: str, path: str | Path) -> str:
    """A path as it was given: after a flag, or as a key of the config."""
    return f"{key} {path}" if key.startswith("--") else f"{key}={path}"


def is_hf_folder(path: Path) -> bool:
    """Whether it is a folder with Hugging Face's config, and not an extracted .nemo archive."""
    return (path / CONFIG).is_file() and not (path / "model_config.yaml").exists()


def read_hf_architecture(folder: Path, *, key: str = "--input") -> Architecture:
    """Shape and tokenizer settings of a folder. Raises CheckpointError; `key` is what named it."""
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise CheckpointError(f"{named(key, folder)}: the folder has no {name}")
    with placed(named(key, folder)):
        arch = architecture_of(read_json(folder / CONFIG, key=key))
    return replace(arch, tokenizer=_tokenizer_settings(folder, (folder / TOKENIZER).read_bytes(), key))


def weight_map(folder: Path, *, key: str = "--input") -> dict[str, str] | None:
    """The file of every tensor, where an index says so. Raises CheckpointError for files that are not there."""
    index = folder / INDEX
    if not index.is_file():
        return None
    found = read_json(index, key=key).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{named(key, index)}: no weight_map that says which file holds which tensor")
    for name in sorted(set(found.values())):
        if "/" in name or "\0" in name or not (folder / name).is_file():
            raise CheckpointError(f"{named(key, folder)}: {INDEX} names {name}, which is not there")
    if (folder / SINGLE).is_file() and set(found.values()) != {SINGLE}:  # which transformers would take in their place
        raise CheckpointError(f"{named(key, folder)}: {INDEX} names other files beside {SINGLE}; take one of them away")
    return found


def weight_files(folder: Path, *, key: str = "--input") -> list[Path]:
    """The files that count. Raises CheckpointError where none does, or nothing says which."""
    places = weight_map(folder, key=key)
    if places is not None:
        return [folder / name for name in sorted(set(places.values()))]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in found or len(found) == 1:
        return [folder / (SINGLE if SINGLE in found else found[0])]
    if found:
        raise CheckpointError(f"{named(key, folder)}: {len(found)} *.safetensors, and no {INDEX} to say which count")
    raise CheckpointError(f"{named(key, folder)}: the folder has no *.safetensors")


def files_that_count(folder: Path) -> Iterator[Path]:
    """All that is read of the folder, and nothing of what a download may leave beside it. Raises CheckpointError."""
    names = {*_NAMED, *_BY_ID, TOKENIZER, TEMPLATE, INDEX}
    yield from (folder / name for name in sorted(names) if (folder / name).is_file())
    yield from weight_files(folder, key="archive")


def check_nothing_else_is_read(folder: Path, patterns: Iterable[str], written: Set[str]) -> None:
    """Raises OutputError for another model's file, which would be read with those that are written, or before them.

    `patterns` are those of the files that readers look at.
    """
    there = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    for name in there:
        if name not in written:
            raise OutputError(
                f"cannot write {folder}: its {name} would be read too; take it away, or give a new folder"
            )


def read_json(path: Path, *, key: str = "--input") -> dict[str, Any]:
    """Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise CheckpointError(f"{named(key, path)}: cannot be read as JSON ({fault})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{named(key, path)}: not a JSON object")
    return content


def _tokenizer_settings(folder: Path, tokenizer_json: bytes, key: str) -> dict[str, Any]:
    """Special tokens, what ends a response, and chat template, from whichever of the folder's files names them.

    tokenizer_config.json and special_tokens_map.json name tokens, generation_config.json and config.json ids; the
    former come first. Several ids for EOS all end a response.
    """
    by_name, by_id = (
        [read_json(folder / name, key=key) if (folder / name).is_file() else {} for name in names]
        for names in (_NAMED, _BY_ID)
    )
    roles = _named_tokens(*by_name)
    vocabulary = _vocabulary(tokenizer_json, named(key, folder / TOKENIZER))
    older = read_json(folder / _ADDED, key=key) if (folder / _ADDED).is_file() else {}
    _check_splitting(json.loads(tokenizer_json).get("pre_tokenizer"), by_name[0], named(key, folder))

    def refused(name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{named(key, folder)}: {name}={str(value)[:80]} is not {wanted}")

    def of_ids(kind: str) -> list[str | None]:
        name = f"{kind}_token_id"
        found: Any = next((c[name] for c in by_id if c.get(name) is not None), [])
        ids = found if isinstance(found, list) else [found]
        if not all(type(one) is int and 0 <= one < 2**31 for one in ids):
            raise refused(name, found, "a token id, or a list of them")
        return [vocabulary.id_to_token(one) for one in ids]

    for name, (_, given) in roles.items():
        if not isinstance(given, str):
            raise refused(name, given, "the text of a token")
    given = ((f"{file}: {name}", text) for name, (file, text) in roles.items())
    _check_added_tokens(vocabulary, [*_added_tokens(by_name, older), *given], named(key, folder))

    def token(kind: str) -> str | None:
        name = f"{kind}_token"
        return roles[name][1] if name in roles else next(iter(of_ids(kind)), None)

    settings: dict[str, Any] = {f"{kind}_token": token(kind) for kind in TOKENS}
    ends = [text for text in of_ids("eos") if text and text != settings["eos_token"]]
    return {
        "library": "huggingface",
        **settings,
        **({"stop_tokens": ends} if ends else {}),
        "chat_template": _chat_template(folder, by_name[0].get("chat_template"), key),
    }


def _named_tokens(config: dict[str, Any], legacy: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """{bos_token: (the file that names it, its text), ...} as transformers has them; what is no text is as it is.

    special_tokens_map.json goes first, but counts only beside a tokenizer_config.json without `added_tokens_decoder`.
    """
    sources = dict.fromkeys((f"{kind}_token" for kind in _ROLES), (_NAMED[0], config))
    if "added_tokens_decoder" not in config:
        sources |= {name: (_NAMED[1], legacy) for name in sources if name in legacy}
    found = {name: (file, content.get(name)) for name, (file, content) in sources.items()}
    return {
        name: (file, one.get("content", one) if isinstance(one, dict) else one)
        for name, (file, one) in found.items()
        if one
    }


def _added_tokens(by_name: Sequence[dict[str, Any]], older: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tokens that transformers adds to those of tokenizer.json where they are not there, and who names them."""
    decoder = by_name[0].get("added_tokens_decoder")
    blocks = [("added_tokens_decoder", decoder)] if decoder else [(_ADDED, list(older))]
    blocks += [(name, found.get(name)) for name in _ADDITIONAL for found in by_name]
    for name, block in blocks:
        one_by_one = block.values() if isinstance(block, dict) else block if isinstance(block, list) else [block]
        yield from ((name, one) for one in one_by_one if block is not None)


def _check_added_tokens(vocabulary: Tokenizer, given: Iterable[tuple[str, Any]], where: str) -> None:
    """Raises CheckpointError for a token that is not in tokenizer.json, or there with spaces of its own."""
    known = {token.content: token for token in vocabulary.get_added_tokens_decoder().values()}
    flags = ("lstrip", "rstrip", "single_word", *(["normalized"] if vocabulary.normalizer is not None else []))
    for name, one in given:
        own = one if isinstance(one, dict) else {"content": one}
        text = own.get("content")
        if not isinstance(text, str):
            raise CheckpointError(f"{where}: {name}: {str(one)[:80]} is not the text of a token")
        if text not in known:
            raise CheckpointError(f"{where}: {name}: {text[:80]} is not an added token of {TOKENIZER}; add it there")
        for flag in flags:
            if flag in own and own[flag] != getattr(known[text], flag):
                raise CheckpointError(f"{where}: {name}: {text} has {flag}={own[flag]}, other than in {TOKENIZER}")


def _check_splitting(splits: Any, settings: dict[str, Any], where: str) -> None:
    """Raises CheckpointError for settings by which transformers splits texts otherwise than `splits` of the file."""
    if settings.get("split_special_tokens"):
        raise CheckpointError(f"{where}: split_special_tokens=True is not supported: special tokens in texts are whole")
    name, own = "add_prefix_space", splits if isinstance(splits, dict) else {}
    if name in own and settings.get(name) not in (None, own[name]):
        raise CheckpointError(f"{where}: {name}={settings[name]}, other than in {TOKENIZER}; change it there")


def _vocabulary(tokenizer_json: bytes, where: str) -> Tokenizer:
    """Raises CheckpointError for what `tokenizers` cannot read; `where` names the file."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(tokenizer_json.decode())
    except Exception as fault:  # it raises bare Exceptions
        raise CheckpointError(f"{where}: not a tokenizer ({' '.join(str(fault).split())[:200]})") from None


def _chat_template(folder: Path, given: Any, key: str) -> str | None:
    """A file of its own, or that of tokenizer_config.json; of several, the one called default."""
    file = folder / TEMPLATE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as fault:
            raise CheckpointError(f"{named(key, file)}: not valid UTF-8 ({fault})") from None
    if isinstance(given, list):
        entries = [entry for entry in given if isinstance(entry, dict)]
        names = sorted(str(entry.get("name")) for entry in entries)
        found = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        if not found:
            raise CheckpointError(f"{named(key, folder)}: chat templates {names}, none of them called default")
        given = found[-1]
        if given is None:
            raise CheckpointError(f"{named(key, folder)}: the chat template called default has no template")
    if given is not None and not isinstance(given, str):
        raise CheckpointError(f"{named(key, folder)}: chat_template={str(given)[:80]} is not a text")
    return given
