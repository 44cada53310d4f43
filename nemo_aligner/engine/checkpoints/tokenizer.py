"""The tokenizer inside an archive: a Hugging Face fast tokenizer, a SentencePiece model, or another that NeMo reads.

The first two are read through `tokenizers` and `sentencepiece` themselves, which start in a fraction of a second; NeMo
(nemo_tokenizer.py) takes five, and is imported for an archive that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.errors import CheckpointError

HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"


class ArchiveTokenizer(Protocol):
    """interfaces.Tokenizer, plus the files that make it up, so that an archive can carry it on."""

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]
    chat_template: str | None
    files: dict[str, bytes]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def piece(self, token: int) -> str: ...


class FastTokenizer:
    """A `tokenizer.json`; special tokens are named by the archive's `tokenizer` block."""

    def __init__(self, content: bytes, settings: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(content.decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.files = {HF_FILE: content}
        # not how many there are: some vocabularies leave ids out
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.chat_template: str | None = settings.get("chat_template")
        eos = self._id(settings.get("eos_token"))
        if eos is None:
            raise CheckpointError(f"tokenizer.eos_token {settings.get('eos_token')!r} is not in the tokenizer")
        self.eos_id = eos
        stops = settings.get("stop_tokens") or []
        if not isinstance(stops, list):
            raise CheckpointError(f"tokenizer.stop_tokens: {stops!r} is not a list of tokens")
        self.stop_ids = frozenset({eos, *map(self._needed_id, stops)})
        self.bos_id = self._id(settings.get("bos_token"))
        pad = self._id(settings.get("pad_token"))
        self.pad_id = eos if pad is None else pad

    def _needed_id(self, token: str) -> int:
        found = self._id(token)
        if found is None:
            raise CheckpointError(f"tokenizer.stop_tokens: {token!r} is not in the tokenizer")
        return found

    def _id(self, token: Any) -> int | None:
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""


class SentencePieceTokenizer:
    """A SentencePiece `.model`; it knows its own special tokens. `name` is that of the file in the archive."""

    def __init__(self, content: bytes, settings: dict[str, Any], name: str = SENTENCEPIECE_FILE) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception:  # whose words are those of a parser
            raise CheckpointError(f"{name}: not a SentencePiece model") from None
        self.files = {name: content}
        self.vocab_size = self._processor.vocab_size()
        self.chat_template: str | None = settings.get("chat_template")
        self.eos_id = self._processor.eos_id()
        self.stop_ids = frozenset({self.eos_id})
        bos, pad = self._processor.bos_id(), self._processor.pad_id()
        self.bos_id = bos if bos >= 0 else None
        self.pad_id = pad if pad >= 0 else self.eos_id

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i < self.vocab_size and not self._processor.is_control(i)]
        return self._processor.decode(kept)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token) if token < self.vocab_size else ""


BYTE_TOKENIZER = {"library": "huggingface", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
"""The archive's `tokenizer` block for `byte_tokenizer`."""


def byte_tokenizer() -> bytes:
    """A `tokenizer.json` of one token per byte and three special ones; ids never change. For tests and tiny models."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(BYTE_TOKENIZER[f"{name}_token"], special=True) for name in ("bos", "eos", "pad")]
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str().encode()


def named_file(folder: Path, settings: dict[str, Any], *keys: str) -> Path | None:
    """The file that the first given one of `keys` names in an opened archive; None where none is given.

    NeMo writes `nemo:<hash>_<name>`, the name inside the archive; of any other path the last part counts, so that no
    file outside the archive is ever read. Raises CheckpointError where the archive has no such file.
    """
    for key in keys:
        if settings.get(key):
            path = folder / PurePosixPath(str(settings[key]).removeprefix("nemo:")).name
            if not path.is_file():
                raise CheckpointError(f"tokenizer.{key}: {settings[key]!r} is not in the archive")
            return path
    return None


def load_tokenizer(folder: Path, arch: Architecture) -> ArchiveTokenizer:
    """The tokenizer of an opened archive. Raises CheckpointError naming what was looked for."""
    settings = arch.tokenizer
    library = settings.get("library")
    # a block with special tokens of its own means NeMo's handling of them; SentencePiece's `sentencepiece_legacy`
    # changes nothing without them
    plain = not (settings.get("special_tokens") or settings.get("additional_special_tokens"))
    fast = folder / HF_FILE
    try:
        if (
            library in (None, "huggingface")
            and plain
            and fast.is_file()
            and (library is None or settings.get("eos_token"))
        ):
            return FastTokenizer(fast.read_bytes(), settings)
        if library in (None, "sentencepiece") and plain:
            piece = named_file(folder, settings, "model", "tokenizer_model") or folder / SENTENCEPIECE_FILE
            if piece.is_file():
                return SentencePieceTokenizer(piece.read_bytes(), settings, piece.name)
    except CheckpointError:
        raise
    except Exception as fault:  # `tokenizers` raises bare Exceptions for a damaged file
        raise CheckpointError(f"{HF_FILE}: not a tokenizer ({' '.join(str(fault).split())[:200]})") from None
    if library is None:
        raise CheckpointError(f"the archive holds no tokenizer: neither {HF_FILE} nor {SENTENCEPIECE_FILE}")
    from nemo_aligner.engine.checkpoints.nemo_tokenizer import load_nemo_tokenizer

    return load_nemo_tokenizer(folder, settings)
