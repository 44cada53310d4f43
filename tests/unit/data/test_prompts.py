"""The prompts of REINFORCE: which field they are in, how they begin, and which are too long."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.data.blending import Blend
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.prompts import encode_prompts, open_prompts, prompt_field, with_bos
from nemo_aligner.data.row_texts import filled
from nemo_aligner.errors import ConfigError, DataError
from tests.fakes import ByteTokenizer

KEY = "model.data.data_prefix.train"


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(prefix: Any, split: str = "train") -> Blend:
    found = open_prompts(prefix, split, KEY)
    assert found is not None
    return found


def test_bos_stands_once_before_a_text_where_there_is_one() -> None:
    assert with_bos([5, 6], 1) == [1, 5, 6]
    assert with_bos([1, 5], 1) == [1, 5]
    assert with_bos([5, 1], 1) == [1, 5, 1]
    assert with_bos([], 1) == [1]
    assert with_bos((5, 6), None) == [5, 6]
    assert with_bos([0, 5], 0) == [0, 5]


def test_braces_of_a_prompt_are_only_text() -> None:
    assert filled("Q: {text}; {other}", "text", "{text} {other}") == "Q: {text} {other}; {other}"
    assert filled(None, "text", "{text}") == "{text}"


def test_a_prompt_is_in_text_or_else_in_input_and_a_row_with_neither_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "input": "no"}, {"input": "b"}, {"text": None, "input": "c"}]
    found = opened({"train": [write(tmp_path / "good", *rows)]})
    prompts = encode_prompts(found, ByteTokenizer().encode, bos_id=None, limit=9, key=KEY)
    assert [(prompt.text, prompt.tokens) for prompt in prompts] == [(t, tuple(t.encode())) for t in "abc"]
    bad = write(tmp_path / "bad", {"text": "a"}, {"prompt": "b", "id": 3})
    with pytest.raises(DataError, match=r"bad:2: no text in field \"text\" or \"input\"; the row has 'prompt', 'id'$"):
        opened(bad)
    with pytest.raises(DataError, match=r"empty:1: .*the row has no fields$"):
        opened(write(tmp_path / "empty", {}))


@pytest.mark.parametrize(("bos", "limit", "kept"), [(None, 3, ["abc"]), (None, 4, ["abc", "abcd"]), (1, 4, ["abc"])])
def test_prompts_over_the_limit_and_empty_ones_are_left_out_and_counted(
    tmp_path: Path, bos: int | None, limit: int, kept: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = opened(write(tmp_path / "p", {"text": "abc"}, {"text": "abcd"}, {"text": "abcde"}))
    found = encode_prompts(rows, ByteTokenizer().encode, bos_id=bos, limit=limit, key=KEY)
    assert [prompt.text for prompt in found] == kept
    assert f"{3 - len(kept)} of 3 prompts left out: empty, or over {limit} tokens" in caplog.text


def test_nothing_is_said_where_all_are_used_and_it_is_a_fault_where_none_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nemo_aligner.data.prompts")
    rows = opened(write(tmp_path / "p", {"text": "abc"}))
    assert len(encode_prompts(rows, ByteTokenizer().encode, bos_id=None, limit=3, key=KEY)) == 1
    assert "left out" not in caplog.text
    with pytest.raises(DataError, match=rf"^{KEY}: every prompt is empty or has over 2 tokens"):
        encode_prompts(rows, ByteTokenizer().encode, bos_id=None, limit=2, key=KEY)
    blank = opened(write(tmp_path / "blank", {"text": ""}, {"text": "a"}))
    assert [p.text for p in encode_prompts(blank, ByteTokenizer().encode, bos_id=None, limit=9, key=KEY)] == ["a"]


def test_a_prefix_is_a_file_or_a_blend_and_stands_for_train_alone_unless_it_names_its_splits(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *({"text": f"a{i}"} for i in range(3)))
    b = write(tmp_path / "b", *({"text": f"b{i}"} for i in range(3)))
    for prefix in (a, [a], {"train": a}, {"train": [a]}):
        assert [row["text"] for row in opened(prefix)] == ["a0", "a1", "a2"]
        assert open_prompts(prefix, "validation", KEY) is None
    assert [row["text"] for row in opened({"train": a, "validation": [b]}, "validation")] == ["b0", "b1", "b2"]
    texts = [row["text"] for row in opened(["2", a, 1, b])]
    assert [text for text in texts if text[0] == "a"] == ["a0", "a1", "a2", "a0"]
    assert [text for text in texts if text[0] == "b"] == ["b0", "b1"]
    with pytest.raises(ConfigError, match=rf"^{KEY}: .* is neither \[file\] nor \[weight, file"):
        open_prompts([a, b], "train", KEY)
    with pytest.raises(ConfigError, match=rf"^{KEY}: 2 weights for 1 files"):
        open_prompts([1.0, a, 2.0], "train", KEY)


def test_text_is_the_prompt_where_a_row_has_input_too_and_the_log_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"text": "a", "input": "b"}, {"input": "c"}, {"text": "d", "input": 1}, {"text": "e", "input": "f"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level(logging.INFO):
        rows = open_prompts({"train": [str(path)]}, "train", "model.data.data_prefix.train")
    assert rows is not None
    assert [rows[i][prompt_field(rows[i]) or ""] for i in range(4)] == ["a", "c", "d", "e"]
    assert caplog.messages == ["model.data.data_prefix.train: 2 rows have both text and input; text is the prompt"]


def test_a_conversation_is_a_prompt_rendered_up_to_the_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = opened(write(tmp_path / "chats", {"messages": turns, "answer": "7"}, {"text": "plain", "messages": turns}))
    template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    chat = ChatTemplate(template, ByteTokenizer(), "k")
    first, second = encode_prompts(rows, ByteTokenizer().encode, bos_id=None, limit=99, key=KEY, chat=chat)
    assert bytes(first.tokens) == b"ua;ab;uc;a"
    assert (first.text, first.fields["answer"], first.shown) == ("c", "7", {"messages": turns})
    assert (bytes(second.tokens), second.shown, second.turns) == (b"plain", {"input": "plain"}, None)
    with pytest.raises(
        DataError, match=r"chats:1: the row is a conversation.* no chat template; give model\.data\.chat_"
    ):
        encode_prompts(rows, ByteTokenizer().encode, bos_id=None, limit=99, key=KEY)
