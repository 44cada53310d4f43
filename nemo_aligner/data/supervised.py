"""Rows for the two supervised losses, as token ids with a mask of what is trained on."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from nemo_aligner.config.schema import one_of
from nemo_aligner.config.supervised import SFTDatasetConfig
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.jsonl import Row, Rows
from nemo_aligner.data.prompts import with_bos
from nemo_aligner.data.token_texts import TextTokenizer, continuation, drawn_tokens
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.records import Turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One thing to train on: a row for SFT and REINFORCE, two (chosen, rejected) for a reward model.

    `masks[i][t]` is 1 where token t of row i is a target, which it is not at t = 0; `weight` is what the loss is
    multiplied by, the advantage in REINFORCE.
    """

    rows: tuple[list[int], ...]
    masks: tuple[list[int], ...]
    weight: float = 1.0
    targets: int | None = None  # how many it counts for; null: those of the masks

    @property
    def longest(self) -> int:
        return max(len(row) for row in self.rows)


_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class _Piece:
    tokens: list[int]
    field: str | None  # None: literal text of the template


class PromptTemplate:
    """`model.data.*.prompt_template`, such as "{input} {output}": the label last, everything before it is context.

    Where the template has text of its own, spaces at both ends of a field are the template's business and are stripped
    from the field; "{input}{output}" changes nothing. A space before the label belongs to the label, as tokenizers
    that keep it with the word want it. Pieces are tokenized one by one, as going on from those before, so that context
    tokens do not depend on the label; of a label that comes with the tokens that were drawn for it, these are taken.
    """

    def __init__(self, template: str, label_key: str, key: str) -> None:
        self.fields = _PLACEHOLDER.findall(template)
        if not self.fields or self.fields[-1] != label_key or not template.endswith(f"{{{label_key}}}"):
            raise ConfigError(f"{template!r} must end with the label {{{label_key}}}", f"{key}.prompt_template")
        self._label_key = label_key
        parts = _PLACEHOLDER.split(template)
        self._literals, self._names = parts[0::2], parts[1::2]
        self._strip = any(self._literals)
        lead = self._literals[-2] if len(self._literals) > 1 else ""
        kept = lead.rstrip(" ")
        self._label_lead = lead[len(kept) :]
        self._literals[-2] = kept

    @classmethod
    def of(cls, config: SFTDatasetConfig, key: str) -> PromptTemplate:
        """The template of a data set, whose fields `truncation_field` names. Raises ConfigError, naming keys of `key`.

        A template of the label alone has nothing else to cut, whatever is named.
        """
        template = cls(config.prompt_template, config.label_key, key)
        context = [name for name in template.fields if name != config.label_key]
        for name in truncation_fields(config) if context else ():
            one_of(context, name, f"{key}.truncation_field")
        return template

    def pieces(self, row: Row, tokenizer: TextTokenizer) -> tuple[list[_Piece], list[int]]:
        """Context pieces and label token ids."""
        values = {name: row[name].strip(" ") if self._strip else row[name] for name in self._names}
        context: list[_Piece] = []
        before: list[int] = []
        for literal, name in zip(self._literals, self._names, strict=False):
            for text, field in ((literal, None), (values[name], name))[: 1 + (name != self._label_key)]:
                if text:
                    tokens = continuation(tokenizer, before, text)
                    context.append(_Piece(tokens, field))
                    before += tokens
        answer = values[self._label_key]
        label = self._label_lead + answer if answer else ""
        drawn = drawn_tokens(row, self._label_key, label, before, tokenizer)
        if drawn is not None:
            return context, drawn
        return context, continuation(tokenizer, before, label)


def sft_examples(
    rows: Rows, config: SFTDatasetConfig, tokenizer: TextTokenizer, *, answer_only: bool, max_length: int, key: str
) -> list[Example]:
    """SFT rows through the prompt template.

    Rows whose answer is empty or cut away, and those of fewer than `min_seq_length` tokens, are left out and counted.
    """
    template = PromptTemplate.of(config, key)
    limit = min(config.max_seq_length, max_length)
    examples, dropped, cut = [], 0, 0
    for row in rows:
        context, label = template.pieces(row, tokenizer)
        bos, begins = tokenizer.bos_id if config.add_bos else None, context[0].tokens if context else label
        front = [] if bos is None or begins[:1] == [bos] else [bos]  # the template may write it itself
        end = [tokenizer.eos_id] if config.add_eos else []
        excess = len(front) + sum(len(p.tokens) for p in context) + len(label) + len(end) - limit
        if excess > 0:
            cut += 1
            context, label = truncated(context, label, excess, config)
        tokens = [*front, *(token for piece in context for token in piece.tokens)]
        if not label:
            dropped += 1
            continue
        mask = [0] * len(tokens) if answer_only else [0] * len(front) + [1] * (len(tokens) - len(front))
        examples.append(Example(([*tokens, *label, *end],), ([*mask, *[1] * (len(label) + len(end))],)))
    _report(rows, dropped, cut, limit)
    return long_enough(examples, config.min_seq_length, str(rows.path))


def long_enough(examples: list[Example], least: int, source: str) -> list[Example]:
    """Examples of at least `least` tokens; the others are counted in the log."""
    kept = [example for example in examples if example.longest >= least]
    if len(kept) < len(examples):
        log.warning("%s: %d rows left out: under min_seq_length=%d tokens", source, len(examples) - len(kept), least)
    return kept


def truncation_fields(config: SFTDatasetConfig) -> list[str]:
    return [name.strip() for name in config.truncation_field.split(",") if name.strip()]


def truncated(
    context: list[_Piece], label: list[int], excess: int, config: SFTDatasetConfig
) -> tuple[list[_Piece], list[int]]:
    """Take `excess` tokens out of the fields named by `truncation_field`, in equal parts, then off the label's end."""
    names = truncation_fields(config)
    fields = [i for i, piece in enumerate(context) if piece.field in names]
    result = list(context)
    for left, i in zip(range(len(fields), 0, -1), fields, strict=True):
        tokens = result[i].tokens
        take = min(len(tokens), -(-excess // left))
        kept = tokens[: len(tokens) - take] if config.truncation_method == "right" else tokens[take:]
        result[i] = _Piece(kept, result[i].field)
        excess -= take
    return result, label[: max(0, len(label) - excess)]


def chat_examples(
    rows: Rows,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    config: SFTDatasetConfig,
    *,
    answer_only: bool,
    max_length: int,
) -> list[Example]:
    """Conversations through a chat template.

    The assistant's turns are the targets; of a row that holds its answer under `label_key`, as samplers write it, the
    answer alone, and what the template puts behind it. What is longer than the limit is cut at its end, and counted.
    """
    examples, dropped, cut, limit = [], 0, 0, min(config.max_seq_length, max_length)
    for index, row in enumerate(rows):
        tokens: list[int] = []
        mask: list[int] = []
        for ids, is_target in _chat_pieces(row, template, tokenizer, config, str(rows.path), rows.numbers[index]):
            tokens += ids
            mask += [int(is_target or not answer_only)] * len(ids)
        cut += len(tokens) > limit
        tokens, mask = tokens[:limit], mask[:limit]
        if not any(mask):
            dropped += 1
            continue
        examples.append(Example((tokens,), (mask,)))
    _report(rows, dropped, cut, limit)
    return examples


def _chat_pieces(
    row: Row, template: ChatTemplate, tokenizer: TextTokenizer, config: SFTDatasetConfig, path: str, line: int
) -> Iterator[tuple[list[int], bool]]:
    """Token ids of a conversation, and whether they are targets, one piece going on from another."""
    turns, before = Turns.of(row, None), list[int]()
    if turns is None or turns.answered or not isinstance(row.get(config.label_key), str):
        for place, (text, is_target) in enumerate(template.segments(row, path, line)):
            ids = continuation(tokenizer, before, text)
            ids = ids if place or not config.add_bos else with_bos(ids, tokenizer.bos_id)
            before += ids
            yield ids, is_target
        return
    frame, answer = template.frame(row, path, line), row[config.label_key]
    prompt = tokenizer.encode(frame.prompt)
    yield with_bos(prompt, tokenizer.bos_id if config.add_bos else None), False
    drawn = drawn_tokens(row, config.label_key, answer, prompt, tokenizer)
    if drawn is None:
        drawn = continuation(tokenizer, prompt, answer + frame.closing)
    else:
        drawn = drawn + continuation(tokenizer, prompt + drawn, frame.closing)
    yield drawn, True
    yield continuation(tokenizer, prompt + drawn, frame.rest), False


def preference_examples(
    rows: Sequence[tuple[Any, Any]],
    tokenizer: TextTokenizer,
    *,
    eos: bool,
    limit: int,
    source: str,
    text: Callable[[Any], str] = itemgetter("text"),
) -> list[Example]:
    """Pairs of texts; one with a side longer than `limit` tokens is left out, and counted in the log under `source`.

    `text` is that of a side.
    """
    examples = []
    for pair in rows:
        sides = tuple(tokenizer.encode(text(row)) + ([tokenizer.eos_id] if eos else []) for row in pair)
        if all(0 < len(side) <= limit for side in sides):
            examples.append(Example(sides, tuple([1] * len(side) for side in sides)))
    if len(examples) < len(rows):
        log.warning(
            "%s: %d of %d pairs left out: a side is empty or has over %d tokens",
            source,
            len(rows) - len(examples),
            len(rows),
            limit,
        )
    return examples


class Pairs(Sequence[tuple[Row, Row]]):
    """Adjacent lines as (chosen, rejected), read when asked for. Raises DataError for an odd number."""

    unit = "pairs"

    def __init__(self, rows: Rows) -> None:
        self.path, self.numbers, self._rows = rows.path, rows.numbers[::2], rows
        if len(rows) % 2:
            raise DataError(
                f"{len(rows)} rows; chosen and rejected texts come in pairs of adjacent lines",
                rows.path,
                rows.numbers[-1],
            )

    def __len__(self) -> int:
        return len(self._rows) // 2

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._rows[2 * index], self._rows[2 * index + 1]


def _report(rows: Rows, dropped: int, cut: int, limit: int) -> None:
    if cut:
        log.warning("%s: %d rows were cut to %d tokens", rows.path, cut, limit)
    if dropped:
        log.warning(
            "%s: %d of %d rows left out: nothing of the answer is left to train on", rows.path, dropped, len(rows)
        )


def required_texts(template: PromptTemplate, key: str) -> Mapping[str, str]:
    """Fields a row must have, with the config key that names them."""
    return {name: f"{key}.prompt_template" for name in template.fields}
