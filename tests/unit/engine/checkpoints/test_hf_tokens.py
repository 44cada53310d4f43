"""A folder's tokens are those that transformers makes of its files, or the folder is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from nemo_aligner.engine.checkpoints.hf_settings import read_hf_architecture
from nemo_aligner.engine.checkpoints.tokenizer import FastTokenizer
from nemo_aligner.errors import CheckpointError
from tests.models_without_weights import models_without_weights

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
NEW, KNOWN = {"content": "<x>", **FLAGS}, {"content": "<|bos|>", **FLAGS}
TEXT = "a <x> b <|bos|> c"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models_without_weights(tmp_path)
    return tmp_path / "hf"


def configure(folder: Path, **settings: Any) -> None:
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**more, **settings}))


def theirs(folder: Path) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)


def ours(folder: Path) -> list[int]:
    content, arch = (folder / "tokenizer.json").read_bytes(), read_hf_architecture(folder)
    return FastTokenizer(content, arch.tokenizer).encode(TEXT)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"added_tokens_decoder": {"256": KNOWN}},
        {"added_tokens_decoder": {"256": {**KNOWN, "normalized": True}}},  # there is no normalizer
        {"additional_special_tokens": ["<|bos|>"]},
        {"add_prefix_space": False, "split_special_tokens": False},
        {"extra_special_tokens": {"begin": "<|bos|>"}},
    ],
)
def test_tokens_that_are_in_both_files_are_read_as_transformers_reads_them(
    folder: Path, settings: dict[str, Any]
) -> None:
    configure(folder, **settings)
    (folder / "added_tokens.json").write_text('{"<|bos|>": 256}')
    assert ours(folder) == theirs(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"added_tokens_decoder": {"259": NEW}}, "added_tokens_decoder: <x> is not an added token of tokenizer.json"),
        (
            {"additional_special_tokens": ["<x>"]},
            "additional_special_tokens: <x> is not an added token of tokenizer.json",
        ),
        ({"extra_special_tokens": {"x": "<x>"}}, "extra_special_tokens: <x> is not an added token of tokenizer.json"),
        (
            {"added_tokens_decoder": {"256": {**KNOWN, "lstrip": True}}},
            r"added_tokens_decoder: <\|bos\|> has lstrip=True, other than in tokenizer.json",
        ),
        (
            {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|eos|>"},
            "add_prefix_space=True, other than in tokenizer.json; change it there",
        ),
        (
            {"split_special_tokens": True},
            "split_special_tokens=True is not supported: special tokens in texts are whole",
        ),
    ],
)
def test_a_token_that_transformers_would_read_otherwise_is_refused(
    folder: Path, settings: dict[str, Any], said: str
) -> None:
    configure(folder)
    plain = ours(folder)
    configure(folder, **settings)
    assert theirs(folder) != plain
    with pytest.raises(CheckpointError, match=rf"^--input {folder}: {said}"):
        ours(folder)


def test_the_older_file_of_added_tokens_counts_where_the_newer_says_nothing(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<x>": 259}')
    configure(folder)
    with pytest.raises(CheckpointError, match=r": added_tokens\.json: <x> is not an added token of tokenizer"):
        ours(folder)
    configure(folder, added_tokens_decoder={"256": KNOWN})
    assert ours(folder) == theirs(folder)


@pytest.mark.parametrize(
    "settings", [{"added_tokens_decoder": {"1": 3}}, {"additional_special_tokens": [3]}, {"extra_special_tokens": 3}]
)
def test_what_is_no_token_is_named(folder: Path, settings: dict[str, Any]) -> None:
    configure(folder, **settings)
    with pytest.raises(CheckpointError, match=rf": {next(iter(settings))}: 3 is not the text of a token$"):
        ours(folder)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["<x>", "ab"])  # in no vocabulary, and in that of tokenizer.json without being added
def test_a_token_with_a_role_that_transformers_would_add_is_refused(
    folder: Path, file: str, name: str, token: str
) -> None:
    if token == "ab":
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"]["ab"], content["model"]["merges"] = 259, []
        (folder / "tokenizer.json").write_text(json.dumps(content))
    configure(folder)
    text = f"a{token}c"
    plain = transformers.AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    if file == "tokenizer_config.json":
        configure(folder, **{name: token})
    else:
        (folder / file).write_text(json.dumps({name: {"content": token, "lstrip": False}}))
    assert transformers.AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False) != plain
    said = rf"^--input {folder}: {file}: {name}: {token} is not an added token of tokenizer\.json; add it there$"
    with pytest.raises(CheckpointError, match=said):
        ours(folder)


@pytest.mark.parametrize(
    ("older", "settings"),
    [
        ({"pad_token": "<|bos|>"}, {}),
        ({"pad_token": {"content": "<|bos|>", "lstrip": True}, "eos_token": "<|pad|>"}, {}),
        ({"pad_token": None}, {}),
        ({"pad_token": "<x>", "unk_token": "<y>"}, {"added_tokens_decoder": {"256": KNOWN}}),
    ],
)
def test_of_two_files_that_name_a_token_the_one_counts_that_transformers_reads(
    folder: Path, older: dict[str, Any], settings: dict[str, Any]
) -> None:
    configure(folder, pad_token="<|pad|>", **settings)
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    reference, named = transformers.AutoTokenizer.from_pretrained(folder), read_hf_architecture(folder).tokenizer
    assert ours(folder) == theirs(folder)
    assert (named["eos_token"], named["pad_token"]) == (reference.eos_token, reference.pad_token)
