"""What a row becomes for training: tokens, and a mask of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.supervised import SFTDatasetConfig
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.jsonl import Rows, load_rows
from nemo_aligner.data.supervised import Pairs, PromptTemplate, chat_examples, preference_examples, sft_examples
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
    [found] = chat_examples(
        rows(tmp_path, row), CHAT, ByteTokenizer(), SFTDatasetConfig(), answer_only=True, max_length=1000
    )
    [tokens], [mask] = found.rows, found.masks
    assert bytes(tokens).decode() == "<user>u1;<assistant>a1;<user>u2;<assistant>a2;"
    assert bytes(t for t, keep in zip(tokens, mask, strict=True) if keep).decode() == "a1;a2;"


def test_chat_rows_without_turns_are_named_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a chat row needs"):
        chat_examples(
            rows(tmp_path, {"input": "x"}),
            CHAT,
            ByteTokenizer(),
            SFTDatasetConfig(),
            answer_only=True,
            max_length=9,
        )


def test_pairs_are_adjacent_lines_and_too_long_ones_are_skipped_pair_by_pair(tmp_path: Path) -> None:
    data = rows(tmp_path, *({"text": text} for text in ("good", "bad", "good" * 9, "bad", "fine", "poor")))
    found = preference_examples(Pairs(data), ByteTokenizer(), eos=True, limit=10, source="k")
    assert [[bytes(side[:-1]).decode() for side in e.rows] for e in found] == [["good", "bad"], ["fine", "poor"]]
    assert all(side[-1] == EOS for e in found for side in e.rows)


def test_an_odd_number_of_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: 3 rows"):
        Pairs(rows(tmp_path, *({"text": t} for t in "abc")))


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


class WithBos(ByteTokenizer):
    bos_id = 1  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("config", "begins", "tokens"),
    [
        ({"add_bos": True}, "", [1, *b"q a", EOS]),
        ({"add_bos": True, "add_eos": False}, "", [1, *b"q a"]),
        ({"add_bos": False}, "", [*b"q a", EOS]),
        ({"add_bos": True}, "\x01", [1, *b"q a", EOS]),
        ({"add_bos": True, "max_seq_length": 4}, "", [1, *b" a", EOS]),
    ],
)
def test_bos_and_eos_are_put_around_a_row_once_and_bos_is_no_target(
    tmp_path: Path, config: dict[str, Any], begins: str, tokens: list[int]
) -> None:
    settings = SFTDatasetConfig(prompt_template=f"{begins}{{input}} {{output}}", **config)
    data = rows(tmp_path, {"input": "q", "output": "a"})
    for answer_only in (True, False):
        [found] = sft_examples(data, settings, WithBos(), answer_only=answer_only, max_length=99, key="k")
        assert found.rows == (tokens,)
        [mask] = found.masks
        assert len(mask) == len(tokens)
        assert mask[0] == int(not answer_only and (tokens[0] != 1 or begins != ""))
        answer = tokens.index(ord("a")) - 1
        assert all(mask[answer:])
        assert any(mask[1:answer]) == (not answer_only and answer > 1)


def test_the_models_context_is_a_limit_too(tmp_path: Path) -> None:
    data = rows(tmp_path, {"input": "abcdef", "output": "xyz"})
    config = SFTDatasetConfig(prompt_template="{input}{output}")
    [found] = sft_examples(data, config, ByteTokenizer(), answer_only=True, max_length=6, key="k")
    assert found.rows == ([*b"abxyz", EOS],)
    [whole] = sft_examples(data, config, ByteTokenizer(), answer_only=True, max_length=10, key="k")
    assert whole.rows == ([*b"abcdefxyz", EOS],)


@pytest.mark.parametrize(
    ("fields", "method", "limit", "text"),
    [
        ("a,b", "right", 9, "123ABCxy$"),
        ("a, b", "left", 9, "345CDExy$"),
        ("a,b", "right", 8, "12ABCxy$"),
        ("b", "right", 9, "12345Axy$"),
        ("b", "right", 6, "12345$"),
        ("", "right", 12, "12345ABCDEx$"),
    ],
)
def test_what_is_too_long_is_taken_in_equal_parts_from_the_fields_named_and_then_off_the_answer(
    tmp_path: Path, fields: str, method: str, limit: int, text: str
) -> None:
    settings = SFTDatasetConfig(
        prompt_template="{a}{b}{output}", truncation_field=fields, truncation_method=method, max_seq_length=limit
    )
    data = rows(tmp_path, {"a": "12345", "b": "ABCDE", "output": "xy"})
    found = sft_examples(data, settings, ByteTokenizer(), answer_only=True, max_length=99, key="k")
    told = ["".join("$" if t == EOS else chr(t) for t in example.rows[0]) for example in found]
    assert told == ([text] if "x" in text else []), "without an answer there is nothing to learn"


@pytest.mark.parametrize("fields", ["prompt", "a,input", "output", "a,output"])
def test_a_field_to_cut_is_one_of_the_templates_before_the_label(tmp_path: Path, fields: str) -> None:
    config = SFTDatasetConfig(prompt_template="{a}{b}{output}", truncation_field=fields)
    said = rf"^k\.truncation_field: '{fields.rpartition(',')[2]}' is not one of a, b$"
    with pytest.raises(ConfigError, match=said):
        PromptTemplate.of(config, "k")


def test_of_an_answer_alone_the_end_is_cut_whatever_field_is_named(tmp_path: Path) -> None:
    assert example(tmp_path, ROW, prompt_template="{output}", max_seq_length=4) == (" c $", " c $")


def test_a_chat_is_cut_at_the_limit_and_left_out_where_no_answer_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "abc"}]
    whole = b"<user>u;<assistant>abc;"
    data = rows(tmp_path, {"messages": turns})

    def made(limit: int, answer_only: bool = True) -> list[tuple[list[int], list[int]]]:
        found = chat_examples(
            data, CHAT, ByteTokenizer(), SFTDatasetConfig(), answer_only=answer_only, max_length=limit
        )
        return [(example.rows[0], example.masks[0]) for example in found]

    begins = whole.index(b"abc")
    for limit in (begins + 1, len(whole), 99):
        mask = [0] * begins + [1] * (len(whole) - begins)
        caplog.clear()
        assert made(limit) == [(list(whole[:limit]), mask[:limit])]
        assert (f"1 rows were cut to {limit} tokens" in caplog.text) == (limit < len(whole))
        assert "left out" not in caplog.text
    assert made(begins) == []
    assert "1 of 1 rows left out: nothing of the answer is left to train on" in caplog.text
    assert made(begins, answer_only=False) == [(list(whole[:begins]), [1] * begins)]


@pytest.mark.parametrize(("eos", "limit", "kept"), [(True, 5, 2), (True, 4, 1), (False, 4, 2), (False, 2, 0)])
def test_a_pair_is_used_where_both_sides_fit_and_every_token_counts(
    tmp_path: Path, eos: bool, limit: int, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows(tmp_path, *({"text": text} for text in ("abcd", "a", "abc", "ab", "", "a")))
    found = preference_examples(Pairs(data), ByteTokenizer(), eos=eos, limit=limit, source="k")
    fit = len(found) - eos * (limit >= 2)  # an empty side is EOS alone
    assert fit == kept
    assert all(
        mask == [1] * len(row) for example in found for row, mask in zip(example.rows, example.masks, strict=True)
    )
    assert (f"{3 - len(found)} of 3 pairs left out" in caplog.text) == (len(found) < 3)


def test_a_row_with_its_answer_beside_the_turns_trains_on_the_answer_alone_as_it_was_drawn(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
    ]
    drawn = {"output": "é", "output_token_ids": list("é".encode())}
    for row in ({"messages": turns, "output": "é"}, {"messages": turns, **drawn}):
        [found] = chat_examples(
            rows(tmp_path, row), CHAT, ByteTokenizer(), SFTDatasetConfig(), answer_only=True, max_length=99
        )
        [tokens], [mask] = found.rows, found.masks
        assert bytes(tokens).decode() == "<user>u1;<assistant>a1;<user>u2;<assistant>é;"
        assert bytes(t for t, keep in zip(tokens, mask, strict=True) if keep).decode() == "é;"
