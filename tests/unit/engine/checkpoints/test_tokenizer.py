"""Which of an archive's files is its tokenizer, and what its settings name."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from nemo_aligner.engine.checkpoints.tokenizer import (
    BYTE_TOKENIZER,
    ArchiveTokenizer,
    FastTokenizer,
    SentencePieceTokenizer,
    byte_tokenizer,
    load_tokenizer,
)
from nemo_aligner.errors import CheckpointError
from tests.tiny import ARCH


def piece_model(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the film was good"] * 20), model_writer=model, vocab_size=30, hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


def opened(folder: Path, block: dict[str, Any], **files: bytes) -> ArchiveTokenizer:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return load_tokenizer(folder, replace(ARCH, tokenizer=block))


def test_special_tokens_are_those_that_the_settings_name() -> None:
    bare = FastTokenizer(byte_tokenizer(), {"eos_token": "<|eos|>"})
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.stop_ids) == (None, 257, 257, {257})
    assert bare.vocab_size == 259
    assert bare.chat_template is None
    full = FastTokenizer(byte_tokenizer(), {**BYTE_TOKENIZER, "stop_tokens": ["<|pad|>"], "chat_template": "{{ x }}"})
    assert (full.bos_id, full.eos_id, full.pad_id, full.stop_ids) == (256, 257, 258, {257, 258})
    assert full.chat_template == "{{ x }}"
    assert full.files == {"tokenizer.json": byte_tokenizer()}
    with pytest.raises(CheckpointError, match=r"^tokenizer\.eos_token '<end>' is not in the tokenizer$"):
        FastTokenizer(byte_tokenizer(), {"eos_token": "<end>"})
    with pytest.raises(CheckpointError, match=r"^tokenizer\.eos_token None is not in the tokenizer$"):
        FastTokenizer(byte_tokenizer(), {})
    with pytest.raises(CheckpointError, match=r"^tokenizer\.stop_tokens: '<turn>' is not in the tokenizer$"):
        FastTokenizer(byte_tokenizer(), {**BYTE_TOKENIZER, "stop_tokens": ["<turn>"]})


def test_texts_are_neither_cut_nor_padded_nor_given_special_tokens() -> None:
    content = json.loads(byte_tokenizer())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 258, "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }  # fmt: skip
    eos = {"SpecialToken": {"id": "<|eos|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [text, eos], "pair": [text, eos],
        "special_tokens": {"<|eos|>": {"id": "<|eos|>", "ids": [257], "tokens": ["<|eos|>"]}},
    }  # fmt: skip
    tokenizer = FastTokenizer(json.dumps(content).encode(), BYTE_TOKENIZER)
    plain = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    for text in ("a", "abcde", "ten letters"):
        assert tokenizer.encode(text) == plain.encode(text)
        assert len(plain.encode(text)) == len(text)
        assert plain.decode([256, *plain.encode(text), 257]) == text
    assert [plain.piece(i) for i in (257, 300)] == ["<|eos|>", ""]


def test_a_vocabulary_ends_behind_its_last_id_also_where_some_are_left_out() -> None:
    content = json.loads(byte_tokenizer())
    content["model"]["vocab"]["a"] = 5000
    assert FastTokenizer(json.dumps(content).encode(), BYTE_TOKENIZER).vocab_size == 5001


def test_a_sentencepiece_model_knows_its_own_special_tokens() -> None:
    padded = SentencePieceTokenizer(piece_model(pad_id=3), {"chat_template": "{{ x }}"})
    assert (padded.bos_id, padded.eos_id, padded.pad_id, padded.stop_ids) == (1, 2, 3, {2})
    assert padded.chat_template == "{{ x }}"
    assert [padded.piece(i) for i in range(padded.vocab_size)].index("</s>") == 2
    more = [padded.vocab_size, *padded.encode("the film"), padded.vocab_size + 9]  # of rows that only pad a model's
    assert (padded.piece(more[0]), padded.decode(more)) == ("", "the film")
    bare = SentencePieceTokenizer(piece_model(bos_id=-1), {}, "a.model")
    assert (bare.bos_id, bare.pad_id, bare.chat_template) == (None, bare.eos_id, None)
    first = SentencePieceTokenizer(piece_model(bos_id=0, unk_id=1, pad_id=3), {})
    assert first.bos_id == 0
    zero = SentencePieceTokenizer(piece_model(pad_id=0, unk_id=3), {})
    assert zero.pad_id == 0
    assert list(bare.files) == ["a.model"]
    assert list(padded.files) == ["tokenizer.model"]
    assert padded.decode([1, *padded.encode("the film"), 2]) == "the film"
    assert padded.piece(2) == "</s>"


def test_the_file_that_the_block_means_is_read(tmp_path: Path) -> None:
    pieces, other = piece_model(), piece_model(pad_id=3)
    (tmp_path / "own.model").write_bytes(other)
    files = {"tokenizer__json": byte_tokenizer(), "tokenizer__model": pieces}
    assert isinstance(opened(tmp_path, BYTE_TOKENIZER, **files), FastTokenizer)
    assert isinstance(opened(tmp_path, {"eos_token": "<|eos|>"}), FastTokenizer)
    for block, content in (
        ({"library": "sentencepiece"}, {"tokenizer.model": pieces}),
        ({"library": "sentencepiece", "model": "nemo:own.model"}, {"own.model": other}),
        ({"library": "sentencepiece", "tokenizer_model": "/elsewhere/own.model"}, {"own.model": other}),
    ):
        found = opened(tmp_path, block)
        assert isinstance(found, SentencePieceTokenizer)
        assert found.files == content
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(opened(tmp_path, {}), SentencePieceTokenizer)
    with pytest.raises(CheckpointError, match=r"^tokenizer\.model: 'nemo:gone\.model' is not in the archive$"):
        opened(tmp_path, {"library": "sentencepiece", "model": "nemo:gone.model"})


def test_an_archive_without_a_tokenizer_and_one_with_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^the archive holds no tokenizer: neither tokenizer\.json nor tokenizer\.model$"
    ):
        opened(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"^tokenizer\.model: not a SentencePiece model$"):
        opened(tmp_path, {"library": "sentencepiece"}, tokenizer__model=b"broken")
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: not a tokenizer \(\S"):
        opened(tmp_path, BYTE_TOKENIZER, tokenizer__json=b"{}")
    with pytest.raises(CheckpointError, match=r"^tokenizer\.eos_token '<end>' is not in the tokenizer$"):
        opened(tmp_path, {"eos_token": "<end>"}, tokenizer__json=byte_tokenizer())
