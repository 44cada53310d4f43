"""Tokenizers of archives as NeMo writes them: the ids are those of the libraries, before and after a new archive."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken

from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture, save_archive
from nemo_aligner.engine.checkpoints.tokenizer import ArchiveTokenizer, load_tokenizer
from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.engine.loading import load_for_inference
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.errors import CheckpointError
from tests.tiny import ARCH

TEXTS = [
    "the cat sat on the mat",
    " a leading blank, and one behind ",
    "café, naïve, 日本語 and 🙂",
    "two\n\nlines\tand a tab\n",
    "specials as text: <s> </s> <pad> <|endoftext|>",
    "",
]
CORPUS = ["the cat sat on the mat", "the café isn't naïve", "a mat and a hat, 日本語"] * 20


@dataclass
class Case:
    """An archive's tokenizer block with its files, and what the ids and the text must be."""

    block: dict[str, Any]
    files: dict[str, bytes]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocab_size: int
    special: tuple[int | None, int, int]  # bos, eos, pad


def tiktoken_case() -> Case:
    """Single bytes, merges of a small corpus, then pairs that occur in no text: NeMo wants 130072 of them."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the", b"at", b"caf", "é".encode()]
    tokens += [bytes([255 - i // 65536, i // 256 % 256, i % 256]) for i in range(130072 - len(tokens))]
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for i, token in enumerate(tokens)
    ]
    pattern = (  # of Mistral-NeMo and Nemotron
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = {token: i for i, token in enumerate(tokens)}
    plain = tiktoken.Encoding("plain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return Case(
        {"library": "tiktoken", "type": None, "model": None, "vocab_file": "nemo:4f1a_mix.vocab.json"},
        {"4f1a_mix.vocab.json": json.dumps(rows).encode()},
        encode=lambda text: [1000 + i for i in plain.encode_ordinary(text)],
        decode=lambda ids: plain.decode([i - 1000 for i in ids]),
        vocab_size=131072,
        special=(1, 2, 4),  # <unk> <s> </s> <mask> <pad> ...
    )


def gpt2_case(folder: Path) -> Case:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=300, min_frequency=2, special_tokens=["<|endoftext|>"])
    trained.save_model(str(folder))
    vocab, merges = (folder / "vocab.json").read_bytes(), (folder / "merges.txt").read_bytes()
    return Case(
        {
            "library": "megatron",
            "type": "GPT2BPETokenizer",
            "model": None,
            "vocab_file": "nemo:aa_gpt2-vocab.json",
            "merge_file": "nemo:bb_gpt2-merges.txt",
            "delimiter": None,
            "sentencepiece_legacy": False,
        },
        {"aa_gpt2-vocab.json": vocab, "bb_gpt2-merges.txt": merges},
        encode=lambda text: trained.encode(text).ids,
        decode=lambda ids: trained.decode(ids, skip_special_tokens=True),
        vocab_size=trained.get_vocab_size(),
        special=(0, 0, 0),
    )


def byte_case() -> Case:
    return Case(
        {"library": "byte-level", "type": None},
        {},
        encode=lambda text: list(text.encode()),
        decode=lambda ids: bytes(ids).decode(),
        vocab_size=512,
        special=(None, 0, 1),
    )


def sentencepiece_model(**options: Any) -> bytes:
    model = io.BytesIO()
    fixed = {"vocab_size": 310, "hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **{**fixed, **options})
    return model.getvalue()


def legacy_case() -> Case:
    """SentencePiece with tokens that the block adds behind the model's own."""
    content = sentencepiece_model()
    own = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = own.vocab_size()

    def encode(text: str) -> list[int]:
        """Pieces of the model around the added token; a blank of its own goes between two of them, in NeMo."""
        [before, *rest] = [own.encode(part) for part in text.split("<turn>")]
        between = [ids[1:] if ids[:1] == [own.piece_to_id("▁")] else ids for ids in rest[:-1]]
        return before + [i for ids in [*between, *rest[-1:]] for i in [size, *ids]]

    return Case(
        {
            "library": "sentencepiece",
            "model": "nemo:cc_own.model",
            "sentencepiece_legacy": True,
            "special_tokens": ["<turn>", "<end>"],
        },
        {"cc_own.model": content},
        encode=encode,
        decode=lambda ids: own.decode([i for i in ids if i < size]),
        vocab_size=size + 2,
        special=(own.bos_id(), own.eos_id(), own.eos_id()),
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["tiktoken", "megatron", "byte-level", "sentencepiece"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return {
        "tiktoken": tiktoken_case,
        "megatron": lambda: gpt2_case(tmp_path_factory.mktemp("gpt2")),
        "byte-level": byte_case,
        "sentencepiece": legacy_case,
    }[request.param]()


def opened(folder: Path, block: dict[str, Any], files: dict[str, bytes]) -> ArchiveTokenizer:
    """The tokenizer of an extracted archive."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder, replace(ARCH, tokenizer=block))


def check(tokenizer: ArchiveTokenizer, case: Case) -> None:
    assert tokenizer.vocab_size == case.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == case.special
    for text in [*TEXTS, "a<turn>the cat<turn>"]:
        ids = tokenizer.encode(text)
        assert ids == case.encode(text)
        known = [i for i in ids if i not in case.special]
        assert tokenizer.decode(ids) == case.decode(known)
        special = [i for i in case.special if i is not None]
        assert tokenizer.decode([*special, *ids, tokenizer.eos_id]) == tokenizer.decode(ids), "specials have no text"


def test_ids_and_text_are_the_librarys_and_go_on_into_a_new_archive(
    case: Case, cluster: Cluster, tmp_path: Path
) -> None:
    first = opened(tmp_path / "given", case.block, case.files)
    check(first, case)
    arch = replace(ARCH, vocab_size=case.vocab_size, tokenizer=case.block)
    for name in ("one", "two"):  # an archive of an archive
        save_archive(tmp_path / f"{name}.nemo", build_model(arch, RunOptions()), arch, first, cluster)
        first = load_for_inference(tmp_path / f"{name}.nemo", cluster, precision="32", key="k").tokenizer
        check(first, case)
        assert read_architecture(tmp_path / f"{name}.nemo").tokenizer == case.block
    assert first.files == case.files


def test_a_text_comes_back_whole_also_where_a_character_spans_tokens(case: Case, tmp_path: Path) -> None:
    tokenizer = opened(tmp_path / "given", case.block, case.files)
    for text in TEXTS:
        if case.block["library"] == "sentencepiece":  # it knows no blanks at the ends, and none but blanks
            text = " ".join(text.split())
        if case.block["library"] == "megatron":  # special tokens are known in text, too
            text = text.replace("<|endoftext|>", "")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # drawn ids, whatever they are, decode to something
    for start in range(0, case.vocab_size, max(1, case.vocab_size // 50)):
        assert isinstance(tokenizer.decode([start, start + 1, case.vocab_size - 1, case.vocab_size]), str)


def test_what_is_no_byte_has_no_text(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path / "given", byte_case().block, {})
    for token in (0, 1, *range(256, 513)):  # the first two are EOS and padding
        assert tokenizer.decode([65, token, 66]) == "AB"
    for token in range(2, 128):
        assert tokenizer.decode([65, token, 66]) == f"A{chr(token)}B"


def test_a_sentencepiece_model_by_the_name_that_megatron_has_for_it_is_the_same(tmp_path: Path) -> None:
    case = legacy_case()
    named = {**case.block, "library": "megatron", "type": "GPTSentencePieceTokenizer"}
    check(opened(tmp_path / "given", named, case.files), case)


def test_more_special_tokens_stand_behind_those_of_the_block(tmp_path: Path) -> None:
    case = legacy_case()
    plain = opened(tmp_path / "plain", case.block, case.files)
    more = opened(tmp_path / "more", {**case.block, "additional_special_tokens": ["<more>"]}, case.files)
    assert more.vocab_size == plain.vocab_size + 1
    assert more.encode("<more>")[-1] == plain.vocab_size
    assert more.decode([*plain.encode("the cat"), plain.vocab_size]) == "the cat"


def test_tiktokens_own_list_of_special_tokens_is_used(tmp_path: Path) -> None:
    case = tiktoken_case()
    special = ["<unk>", "<bot>", "</s>", "<s>", "<mask>", "<pad>", "<cls>", "<sep>"]
    tokenizer = opened(tmp_path / "given", {**case.block, "special_tokens": special}, case.files)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (3, 2, 5)
    assert tokenizer.encode("the cat") == case.encode("the cat")


def test_special_tokens_of_the_block_join_gpt2s(tmp_path: Path) -> None:
    case = gpt2_case(tmp_path)
    block = {**case.block, "special_tokens": {"pad_token": "<pad>"}, "additional_special_tokens": ["<turn>"]}
    tokenizer = opened(tmp_path / "given", block, case.files)
    size = case.vocab_size
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (size + 2, size, 0)
    assert tokenizer.encode("the<turn> cat") == [*case.encode("the"), size + 1, *case.encode(" cat")]
    assert tokenizer.decode(tokenizer.encode("the<turn> cat")) == "the cat"


def test_a_hugging_face_folder_inside_the_archive_or_on_this_machine_is_read_and_carried_on(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from nemo_aligner.engine.checkpoints.tokenizer import byte_tokenizer

    (tmp_path / "raw.json").write_bytes(byte_tokenizer())
    made = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "raw.json"), eos_token="<|eos|>", bos_token="<|bos|>")
    made.save_pretrained(tmp_path / "hub")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    reference = AutoTokenizer.from_pretrained(tmp_path / "hub")
    block = {"library": "huggingface", "type": str(tmp_path / "hub"), "use_fast": True}
    local = opened(tmp_path / "local", block, {})
    inside = opened(tmp_path / "inside", {**block, "type": "some/model"}, local.files)
    assert local.files == inside.files == files
    for tokenizer in (local, inside):
        assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
        for text in TEXTS:
            assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids
            assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode(text)]) == text


def test_words_of_a_regular_expression_and_unknown_ones(tmp_path: Path) -> None:
    vocabulary = ["<PAD>", "?", "^", "&", "<MASK>", "<SEP>", "Cl", "C", "O", "("]
    block = {"library": "regex", "model": "nemo:a_smiles.model", "vocab_file": "nemo:a_smiles.vocab"}
    files = {"a_smiles.model": b"Cl|Br", "a_smiles.vocab": "\n".join(vocabulary).encode()}
    tokenizer = opened(tmp_path / "given", block, files)
    assert tokenizer.encode("CClO(N") == [7, 6, 8, 9, 1]
    assert tokenizer.decode([2, 7, 6, 8, 9, 3]) == "CClO("
    assert tokenizer.files == files


def test_sentencepiece_without_added_tokens_is_ours_under_the_name_the_archive_gives_it(tmp_path: Path) -> None:
    content = sentencepiece_model(pad_id=3)
    own = sentencepiece.SentencePieceProcessor(model_proto=content)
    block = {"library": "sentencepiece", "model": "nemo:dd_own.model", "sentencepiece_legacy": True}
    tokenizer = opened(tmp_path / "given", block, {"dd_own.model": content})
    assert type(tokenizer).__name__ == "SentencePieceTokenizer"
    assert tokenizer.files == {"dd_own.model": content}
    from nemo_aligner.engine.checkpoints.nemo_tokenizer import load_nemo_tokenizer

    nemos = load_nemo_tokenizer(tmp_path / "given", block)
    for text in TEXTS:
        assert tokenizer.encode(text) == nemos.encode(text) == own.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (nemos.bos_id, nemos.eos_id, nemos.pad_id)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"library": "megatron", "type": "GPT2BPETokenizer"}, "vocab_file is not given, and nothing is downloaded"),
        ({"library": "megatron", "type": "BertWordPieceCase"}, "'BertWordPieceCase' of tokenizer.library megatron"),
        ({"library": "tiktoken"}, "tokenizer.library tiktoken: tokenizer.vocab_file is not given"),
        ({"library": "tiktoken", "vocab_file": "nemo:gone.json"}, "vocab_file: 'nemo:gone.json' is not in the archive"),
        ({"library": "tiktoken", "vocab_file": "/etc/passwd"}, "'/etc/passwd' is not in the archive"),
        ({"library": "tiktoken", "vocab_file": "broken.json"}, "tiktoken tokenizer cannot be read: "),
        ({"library": "sentencepiece", "model": "nemo:../x.model"}, r"model: 'nemo:../x.model' is not in the archive"),
        ({"library": "huggingface", "type": "meta-llama/Llama-3"}, "'meta-llama/Llama-3' would be downloaded"),
        ({"library": "huggingface", "type": "bert-base", "vocab_file": "broken.json"}, "bert-base would be downloaded"),
        ({"library": "huggingface", "type": "x", "trust_remote_code": True}, "code of an archive is never run"),
        ({"library": "byte-level", "additional_special_tokens": ["<x>"]}, "additional_special_tokens: .* takes none"),
        ({"library": "tabular", "type": None}, "'tabular' is not one of huggingface, sentencepiece, tiktoken"),
        ({"library": "null", "vocab_size": 10}, "'null' is not one of"),
    ],
)
def test_what_would_be_downloaded_or_is_not_there_is_refused_in_one_line_without_the_network(
    block: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(CheckpointError, match=said) as fault:
        opened(tmp_path / "given", block, {"broken.json": b"[1]"})
    assert "\n" not in str(fault.value)


@pytest.mark.processes
def test_log_lines_warnings_and_stdout_stay_as_they_were(tmp_path: Path) -> None:
    program = """
import logging, sys, warnings
from pathlib import Path
from nemo_aligner.engine.checkpoints.tokenizer import load_tokenizer
from tests.tiny import ARCH, replace
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(name)s %(message)s")
warnings.simplefilter("always")
load_tokenizer(Path(sys.argv[1]), replace(ARCH, tokenizer={"library": "byte-level"}))
logging.getLogger("mine").info("a line")
warnings.warn("a warning")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "mine a line\n"
    assert [line for line in done.stderr.splitlines() if "a warning" in line] == [
        "<string>:10: UserWarning: a warning",
    ]
    assert "NeMo" not in done.stderr


def test_a_template_that_is_no_jinja_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = {"prefix": "", "roles": {"User": "{_content_}"}}
    with caplog.at_level(logging.WARNING):
        tokenizer = opened(tmp_path / "given", {"library": "byte-level", "chat_template": template}, {})
    assert tokenizer.chat_template is None
    assert "chat template is not Jinja" in caplog.text
    given = opened(tmp_path / "given", {"library": "byte-level", "chat_template": "{{ messages }}"}, {})
    assert given.chat_template == "{{ messages }}"
