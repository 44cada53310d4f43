"""Tokenizers that NeMo reads for us: those of an archive's `tokenizer` block other than the two of tokenizer.py.

    library         type              files of the block              what it is
    tiktoken                          vocab_file, a .json             BPE over bytes, special tokens first
    megatron        GPT2BPETokenizer  vocab_file, merge_file          GPT-2's BPE
    byte-level                                                        UTF-8 bytes
    regex                             model, vocab_file               words of a regular expression
    sentencepiece                     model                           with `special_tokens` of the block
    huggingface     any               those of a Hugging Face folder  whatever transformers reads

All are made by NeMo's `get_nmt_tokenizer` out of files in the archive; nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner.engine.checkpoints.tokenizer import HF_FILE, SENTENCEPIECE_FILE, named_file
from nemo_aligner.errors import CheckpointError
from nemo_aligner.quiet_nemo import quiet_nemo

log = logging.getLogger(__name__)

LIBRARIES = ("huggingface", "sentencepiece", "tiktoken", "megatron", "byte-level", "regex")
HF_CONFIG = "tokenizer_config.json"

_GPT2 = ("GPT2BPETokenizer", "megatron-gpt-345m", "gpt2")
"""Names under which NeMo means GPT-2's BPE; given as they are it asks a hub for GPT-2's settings."""

_HF_FILES = (
    HF_CONFIG,
    HF_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    SENTENCEPIECE_FILE,
    "spiece.model",
    "chat_template.jinja",
)
"""What a tokenizer consists of in a Hugging Face folder."""


class NemoTokenizer:
    """A tokenizer of NeMo as tokenizer.ArchiveTokenizer.

    `special` are ids that have no text, `text` decodes all others. NeMo's own `ids_to_text` is not used: it strips
    blanks at the ends, decodes the bytes of a character one by one, or shows special tokens, depending on the library.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: dict[str, Any],
        files: dict[str, bytes],
        special: set[int],
        text: Callable[[list[int]], str],
    ) -> None:
        self._tokenizer, self._special, self._text = tokenizer, special, text
        self.files = files
        self.vocab_size = int(tokenizer.vocab_size)
        eos = _special_id(tokenizer, "eos")
        if eos is None:
            raise CheckpointError("the archive's tokenizer has no end-of-text token; name one in its special_tokens")
        self.eos_id: int = eos
        self.stop_ids = frozenset({eos})
        self.bos_id = _special_id(tokenizer, "bos")
        pad = _special_id(tokenizer, "pad")
        self.pad_id: int = eos if pad is None else pad
        self.chat_template = _jinja_template(tokenizer, settings)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.text_to_ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self._text([i for i in ids if i not in self._special and 0 <= i < self.vocab_size])

    def piece(self, token: int) -> str:
        return str(self._tokenizer.ids_to_tokens([token])[0])


def _special_id(tokenizer: Any, name: str) -> int | None:
    """The id of eos, bos or pad; None where the tokenizer has none."""
    try:
        found = getattr(tokenizer, f"{name}_id")
    except AttributeError:  # SentencePiece with a list of special tokens, none of which has a role: the model's own
        found = getattr(tokenizer.tokenizer, f"{name}_id")()
    return found if isinstance(found, int) and found >= 0 else None


def _jinja_template(tokenizer: Any, settings: dict[str, Any]) -> str | None:
    """The block's template, else that of the tokenizer's own files; NeMo's mapping of roles to texts is no Jinja."""
    template = settings.get("chat_template") or getattr(getattr(tokenizer, "tokenizer", None), "chat_template", None)
    return template if isinstance(template, str) else None


@dataclass
class _Block:
    """An opened archive and its `tokenizer` block."""

    folder: Path
    settings: dict[str, Any]

    def file(self, *keys: str) -> Path | None:
        return named_file(self.folder, self.settings, *keys)

    def required(self, *keys: str) -> Path:
        path = self.file(*keys)
        if path is None:
            raise CheckpointError(
                f"tokenizer.library {self.settings['library']}: tokenizer.{keys[0]} is not given, and nothing is "
                f"downloaded; the file belongs into the archive"
            )
        return path

    def make(self, **arguments: Any) -> Any:
        """NeMo's tokenizer of the block, `arguments` taking the place of what the block says."""
        from nemo.collections.common.tokenizers.tokenizer_utils import get_nmt_tokenizer

        given = {
            "library": self.settings["library"],
            "model_name": self.settings.get("type") or self.settings["library"],  # it wants one, used or not
            "special_tokens": self.settings.get("special_tokens"),
            "use_fast": self.settings.get("use_fast", False),
        }
        return get_nmt_tokenizer(**{**given, **arguments})


def load_nemo_tokenizer(folder: Path, settings: dict[str, Any]) -> NemoTokenizer:
    """The tokenizer of an opened archive, read by NeMo. Raises CheckpointError, in one line."""
    library = settings.get("library")
    if library not in _READERS:
        raise CheckpointError(f"tokenizer.library: {library!r} is not one of {', '.join(LIBRARIES)}")
    if settings.get("trust_remote_code"):
        raise CheckpointError("tokenizer.trust_remote_code: code of an archive is never run; set it to False")
    refused = () if library in ("huggingface", "megatron", "sentencepiece") else ("additional_special_tokens",)
    for key in (*refused, *(("special_tokens",) if library == "regex" else ())):
        if settings.get(key):
            raise CheckpointError(f"tokenizer.{key}: tokenizer.library {library} takes none")
    if not isinstance(settings.get("chat_template"), str | None):
        log.warning("the archive's chat template is not Jinja and is not used; for chats give model.data.chat_template")
    try:
        with quiet_nemo(), _offline():
            return _READERS[library](_Block(folder, settings))
    except CheckpointError:
        raise
    except Exception as fault:  # NeMo and the libraries below it raise anything, asserts without a text among them
        said = " ".join(str(fault).split()) or type(fault).__name__
        raise CheckpointError(f"the archive's {library} tokenizer cannot be read: {said}") from None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face libraries look nowhere but on this machine, also where they are imported already."""
    from huggingface_hub import constants

    before, variable = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable


def _contents(*paths: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


def _tiktoken(block: _Block) -> NemoTokenizer:
    from nemo.collections.common.tokenizers.tokenizer_utils import get_tokenizer

    path, special = block.required("vocab_file", "model"), block.settings.get("special_tokens")
    if special:  # get_nmt_tokenizer would pass them over
        listed = special["additional_special_tokens"] if isinstance(special, dict) else special
        names = {"additional_special_tokens": list(listed)}
        tokenizer = get_tokenizer("tiktoken", vocab_file=str(path), special_tokens=names)  # type: ignore[arg-type]
    else:
        tokenizer = block.make(vocab_file=str(path))
    first = tokenizer.num_special_tokens
    return NemoTokenizer(
        tokenizer,
        block.settings,
        _contents(path),
        set(range(first)),
        lambda ids: tokenizer.tokenizer.decode([i - first for i in ids]),
    )


def _byte_level(block: _Block) -> NemoTokenizer:
    tokenizer = block.make()
    special = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, *range(256, tokenizer.vocab_size)}
    return NemoTokenizer(tokenizer, block.settings, {}, special, lambda ids: bytes(ids).decode(errors="replace"))


def _regex(block: _Block) -> NemoTokenizer:
    model, vocab = block.required("model", "tokenizer_model"), block.required("vocab_file")
    tokenizer = block.make(tokenizer_model=str(model), vocab_file=str(vocab))
    if tokenizer.unk_token not in tokenizer.vocab:
        raise CheckpointError(f"{vocab.name} has no {tokenizer.unk_token!r}, which stands for unknown words")
    special = {getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos", "mask", "sep")}
    return NemoTokenizer(
        tokenizer, block.settings, _contents(model, vocab), special, lambda ids: "".join(tokenizer.ids_to_tokens(ids))
    )


def _sentencepiece(block: _Block) -> NemoTokenizer:
    settings, path = block.settings, block.file("model", "tokenizer_model") or block.folder / SENTENCEPIECE_FILE
    if not path.is_file():
        path = block.required("model", "tokenizer_model")
    legacy = settings.get("sentencepiece_legacy")  # NeMo's GPT models take True where it is not given
    tokenizer = block.make(tokenizer_model=str(path), legacy=True if legacy is None else legacy)
    if settings.get("additional_special_tokens"):
        tokenizer.add_special_tokens(list(settings["additional_special_tokens"]))
    model = tokenizer.tokenizer
    special = set(tokenizer.id_to_special_token) | {i for i in range(model.vocab_size()) if model.is_control(i)}
    return NemoTokenizer(tokenizer, settings, _contents(path), special, model.decode_ids)


def _gpt2(block: _Block) -> NemoTokenizer:
    vocab, merges = block.required("vocab_file"), block.required("merge_file", "merges_file")
    parts = {
        "vocab.json": vocab.read_bytes(),
        "merges.txt": merges.read_bytes(),
        HF_CONFIG: json.dumps({"tokenizer_class": "GPT2Tokenizer"}).encode(),
    }
    return _from_hf_files(block, parts, _contents(vocab, merges))


def _megatron(block: _Block) -> NemoTokenizer:
    kind = block.settings.get("type")
    if kind == "GPTSentencePieceTokenizer":
        return _sentencepiece(_Block(block.folder, {**block.settings, "library": "sentencepiece"}))
    if kind not in _GPT2:
        raise CheckpointError(
            f"tokenizer.type: {kind!r} of tokenizer.library megatron is not {_GPT2[0]} or GPTSentencePieceTokenizer"
        )
    return _gpt2(block)


def _huggingface(block: _Block) -> NemoTokenizer:
    name = str(block.settings.get("type") or "")
    if block.settings.get("vocab_file"):
        if name in _GPT2:
            return _gpt2(block)
        raise CheckpointError(
            f"tokenizer.vocab_file: {name or 'it'} would be downloaded to be used with it, and nothing is downloaded; "
            f"put the tokenizer's own files ({HF_CONFIG} and those beside it) into the archive instead"
        )
    files = _hf_files(block.folder)
    if not files and Path(name).is_dir():
        files = _hf_files(Path(name))
    if not files and not name:
        raise CheckpointError(f"the archive holds no tokenizer: neither tokenizer.json nor {HF_CONFIG}")
    if not files:
        raise CheckpointError(
            f"tokenizer.type: {name!r} would be downloaded, and nothing is; put the tokenizer's files ({HF_CONFIG} and "
            "those beside it) into the archive's folder, or give a local folder"
        )
    return _from_hf_files(block, {HF_CONFIG: b'{"tokenizer_class": "PreTrainedTokenizerFast"}', **files}, files)


def _hf_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer of a Hugging Face folder, or nothing."""
    files = _contents(*(folder / name for name in _HF_FILES if (folder / name).is_file()))
    return files if HF_CONFIG in files or HF_FILE in files else {}


def _from_hf_files(block: _Block, parts: dict[str, bytes], files: dict[str, bytes]) -> NemoTokenizer:
    """What transformers makes of a folder of `parts`; `files` are what the archive carries on."""
    settings = block.settings
    with tempfile.TemporaryDirectory() as folder:
        for name, content in parts.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = block.make(library="huggingface", model_name=folder)
    if settings.get("additional_special_tokens"):
        tokenizer.add_special_tokens({"additional_special_tokens": list(settings["additional_special_tokens"])})
    inner = tokenizer.tokenizer
    return NemoTokenizer(
        tokenizer,
        settings,
        files,
        set(),
        lambda ids: inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )


_READERS: dict[Any, Callable[[_Block], NemoTokenizer]] = {
    "huggingface": _huggingface,
    "sentencepiece": _sentencepiece,
    "tiktoken": _tiktoken,
    "megatron": _megatron,
    "byte-level": _byte_level,
    "regex": _regex,
}
