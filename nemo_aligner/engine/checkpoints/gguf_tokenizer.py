"""The tokenizer of a GGUF file, rebuilt as a tokenizer.json: byte-level BPE, split as `tokenizer.ggml.pre` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_aligner.errors import CheckpointError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_EXPRESSIONS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}
_GPT2 = ("gpt-2", "smollm")  # GPT-2's expression; smollm takes digits one by one before it
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is that token, whatever the merges say

_SPECIAL, _USER_DEFINED = (2, 3), 4  # of `tokenizer.ggml.token_type`: unknown and control; text that is one token


def checked_tokenizer(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same values, of which every one that is read here is of its kind. Raises CheckpointError."""
    count = len(values["tokens"]) if isinstance(values.get("tokens"), list) else 0

    def are(name: str, kind: type) -> bool:
        return isinstance(values.get(name), list) and all(isinstance(one, kind) for one in values[name])

    ids = {name: value for name, value in values.items() if name.endswith("_token_id")}
    for name, fits, wanted in (
        ("tokens", count and are("tokens", str), "a list of texts"),
        ("token_type", are("token_type", int) and len(values["token_type"]) == count, "a number for each token"),
        ("merges", "merges" not in values or are("merges", str), "a list of texts"),
        *((name, type(value) is int and 0 <= value < count, "one of the tokens") for name, value in ids.items()),
    ):
        if not fits:
            raise CheckpointError(f"tokenizer.ggml.{name}={str(values.get(name))[:80]} is not {wanted}")
    return values


def tokenizer_json(values: Mapping[str, Any]) -> bytes:
    """From the values of a file under `tokenizer.ggml.`. Raises CheckpointError for other kinds of tokenizers."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    kind, split = values.get("model"), values.get("pre")
    if kind != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model={kind}: only byte-level BPE (gpt2) is read from GGUF files")
    if split not in _EXPRESSIONS and split not in _GPT2:
        known = ", ".join((*_GPT2, *_EXPRESSIONS))
        raise CheckpointError(f"tokenizer.ggml.pre={split} is not one of {known}: texts would be split otherwise")
    tokens: list[str] = values["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split in _WHOLE_WORDS))
    except Exception as fault:  # it raises bare ones
        raise CheckpointError(f"tokenizer.ggml.merges: {' '.join(str(fault).split())[:200]}") from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in _GPT2)
    steps: list[Any] = [byte_level]
    if split == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif split in _EXPRESSIONS:
        steps.insert(0, pre_tokenizers.Split(Regex(_EXPRESSIONS[split]), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, normalized=False) for token in tokens]
    sorts = values["token_type"]
    tokenizer.add_special_tokens([token for token, sort in zip(added, sorts, strict=True) if sort in _SPECIAL])
    tokenizer.add_tokens([token for token, sort in zip(added, sorts, strict=True) if sort == _USER_DEFINED])
    return tokenizer.to_str().encode()


def tokenizer_settings(values: Mapping[str, Any], chat_template: str | None) -> dict[str, Any]:
    """The archive's `tokenizer` block; the end of a turn ends a response as EOS does."""
    tokens = values["tokens"]

    def token(name: str) -> str | None:
        index = values.get(f"{name}_token_id")
        return None if index is None else tokens[index]

    names = {"bos_token": token("bos"), "eos_token": token("eos"), "pad_token": token("padding")}
    ends = [text for text in (token("eot"), token("eom")) if text and text != names["eos_token"]]
    more = {"stop_tokens": ends} if ends else {}
    return {"library": "huggingface", **names, **more, "chat_template": chat_template}
