"""Small tokenizers of the kinds that models have, trained on a few lines."""

from __future__ import annotations

import functools
import io
import json

from nemo_aligner.engine.checkpoints.tokenizer import (
    BYTE_TOKENIZER,
    ArchiveTokenizer,
    FastTokenizer,
    SentencePieceTokenizer,
    byte_tokenizer,
)

CORPUS = [
    "the film was good and the plot was thin, a small wonder of a film",
    "Größe, naïve café: the prices were 100 or 2,000 and more!",
    "def f(x):\n    return x + 1\n",
    "日本語の映画 was good. 中文",
] * 20


@functools.cache
def vocabulary(kind: str) -> ArchiveTokenizer:
    """`bytes`, `sentencepiece` (as Llama 2 has it), `metaspace` (that as a tokenizer.json), `llama3`, `wordpiece`."""
    if kind == "bytes":
        return FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
    if kind == "sentencepiece":
        return SentencePieceTokenizer(sentencepiece_model(), {})
    content = wordpiece_json() if kind == "wordpiece" else tokenizer_json(kind)
    return FastTokenizer(content, {"eos_token": "</s>", "bos_token": "<s>"})


def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, hard_vocab_limit=False, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def wordpiece_json() -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    special = ["[UNK]", "<s>", "</s>"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str().encode()


def tokenizer_json(kind: str) -> bytes:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token=None))
    special = ["<s>", "</s>"]
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # while it is trained
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [] if kind == "metaspace" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    if kind == "metaspace":
        content["pre_tokenizer"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in ("<s>", "</s>")]
    return json.dumps(content).encode()
