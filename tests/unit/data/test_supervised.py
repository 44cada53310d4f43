"""What a row becomes for training: tokens, and a mask of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.supervised import SFTDatasetConfig
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.jsonl import Rows, load_rows
from nemo_aligner.data.supervised import chat_examples, pairs_of, preference_examples, sft_examples
from nemo_aligner.errors import ConfigError, DataError
from tests.fakes import EOS, ByteTokenizer

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = ChatTemplate(CHATML, ByteTokenizer(), "k")


def rows(tmp_path: Path, *values: dict[str, Any]) -> Rows:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return load_rows(path, required={})


def example(tmp_path: Path, row: dict[str, Any], *, answer_only: bool = True, **config: Any) -> tuple[str, str]:
    """The text of the row's tokens, and of those that are targets; EOS shown as $."""
    settings = SFTDatasetConfig(**config)
    [found] = sft_examples(
        rows(tmp_path, row), settings, ByteTokenizer(), answer_only=answer_only, max_length=1000, key="k"
    )
    [tokens], [mask] = found.rows, found.masks
    targets = [token for token, keep in zip(tokens, mask, strict=True) if keep]
    return tuple("".join("$" if t == EOS else chr(t) for t in part) for part in (tokens, targets))  # type: ignore[return-value]


ROW = {"input": " a b ", "output": " c  "}


@pytest.mark.parametrize(
    ("config", "tokens", "targets"),
    [
        ({}, "a b c$", " c$"),
        ({"prompt_template": "{input}{output}"}, " a b  c  $", " c  $"),
        ({"prompt_template": "Q: {input}\nA: {output}"}, "Q: a b\nA: c$", " c$"),
        ({"add_eos": False}, "a b c", " c"),
        ({"max_seq_length": 5}, "a  c$", " c$"),
        ({"max_seq_length": 5, "truncation_method": "left"}, " b c$", " c$"),
        ({"max_seq_length": 2}, " $", " $"),
    ],
)
def test_the_template_places_cuts_and_masks(tmp_path: Path, config: dict[str, Any], tokens: str, targets: str) -> None:
    assert example(tmp_path, ROW, **config) == (tokens, targets)


def test_braces_in_the_text_are_only_text(tmp_path: Path) -> None:
    assert example(tmp_path, {"input": "{output} {x}", "output": "{input}"})[0] == "{output} {x} {input}$"


def test_training_on_all_tokens_is_a_choice(tmp_path: Path) -> None:
    assert example(tmp_path, ROW, answer_only=False)[1] == "a b c$"


@pytest.mark.parametrize("template", ["{input}{output}", "{input} {output}"])
def test_rows_without_an_answer_are_left_out(tmp_path: Path, template: str) -> None:
    data = rows(tmp_path, {"input": "a", "output": ""}, ROW)
    config = SFTDatasetConfig(prompt_template=template)
    assert len(sft_examples(data, config, ByteTokenizer(), answer_only=True, max_length=99, key="k")) == 1


@pytest.mark.parametrize("template", ["{output} {input}", "{input}", "plain", "{input} {output}."])
def test_a_template_that_does_not_end_with_the_label_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match=r"k\.prompt_template: .* must end with the label"):
        example(tmp_path, ROW, prompt_template=template)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"},
                      {"role": "user", "content": "u2"}, {"role": "assistant", "content": "a2"}]},
        {"conversations": [{"from": "User", "value": "u1"}, {"from": "Assistant", "value": "a1"},
                           {"from": "human", "value": "u2"}, {"from": "gpt", "value": "a2"}]},
    ],
)  # fmt: skip
def test_chat_trains_every_assistant_turn_and_nothing_else(tmp_path: Path, row: dict[str, Any]) -> None:
    [found] = chat_examples(rows(tmp_path, row), CHAT, ByteTokenizer(), answer_only=True, limit=1000)
    [tokens], [mask] = found.rows, found.masks
    assert bytes(tokens).decode() == "<user>u1;<assistant>a1;<user>u2;<assistant>a2;"
    assert bytes(t for t, keep in zip(tokens, mask, strict=True) if keep).decode() == "a1;a2;"


def test_chat_rows_without_turns_are_named_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a chat row needs"):
        chat_examples(
            rows(tmp_path, {"input": "x"}),
            CHAT,
            ByteTokenizer(),
            answer_only=True,
            limit=9,
        )


def test_pairs_are_adjacent_lines_and_too_long_ones_are_skipped_pair_by_pair(tmp_path: Path) -> None:
    data = rows(tmp_path, *({"text": text} for text in ("good", "bad", "good" * 9, "bad", "fine", "poor")))
    found = preference_examples(pairs_of(data), ByteTokenizer(), eos=True, limit=10, source="k")
    assert [[bytes(side[:-1]).decode() for side in e.rows] for e in found] == [["good", "bad"], ["fine", "poor"]]
    assert all(side[-1] == EOS for e in found for side in e.rows)


def test_an_odd_number_of_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: 3 rows"):
        pairs_of(rows(tmp_path, *({"text": t} for t in "abc")))


@pytest.mark.parametrize(("least", "kept"), [(1, ["a", "bcd"]), (4, ["bcd"]), (5, ["bcd"]), (6, [])])
def test_rows_of_fewer_tokens_than_min_seq_length_are_left_out_and_counted(
    tmp_path: Path, least: int, kept: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = SFTDatasetConfig(prompt_template="{input}{output}", min_seq_length=least)
    found = sft_examples(
        rows(tmp_path, {"input": "a", "output": "x"}, {"input": "bcd", "output": "x"}),  # 3 and 5 tokens with EOS
        settings, ByteTokenizer(), answer_only=True, max_length=1000, key="k",
    )  # fmt: skip
    assert ["".join(map(chr, example.rows[0][:-2])) for example in found] == kept
    assert (f"{2 - len(kept)} rows left out: under min_seq_length={least}" in caplog.text) == (len(kept) < 2)


def test_rows_that_are_left_out_or_cut_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = SFTDatasetConfig(prompt_template="{input}{output}", max_seq_length=6)
    data = rows(
        tmp_path, {"input": "a", "output": ""}, {"input": "b", "output": ""}, {"input": "c", "output": "d"},
        {"input": "long prompt", "output": "e"},
    )  # fmt: skip
    sft_examples(data, config, ByteTokenizer(), answer_only=True, max_length=99, key="k")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "1 rows were cut to 6 tokens",
        "2 of 4 rows left out: nothing of the answer is left to train on",
    ]
