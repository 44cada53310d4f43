"""Preference sets in the forms that the Hub has: each row becomes two texts, as transformers would render them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.data.preferences import Preferences, open_pairs, side_text
from nemo_aligner.data.row_texts import texts_of
from nemo_aligner.errors import DataError
from tests import chats
from tests.chats import SMOLLM2, assistant, jsonl, ours, system, user

ASKED = [system("be brief"), user("q1"), assistant("a1"), user("q2")]
GOOD, BAD = assistant("good"), assistant("bad")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = chats.theirs(tmp_path_factory.mktemp("theirs"))
    found.chat_template = SMOLLM2
    return found


def texts(path: str, chat: bool = False, template: str | None = None) -> list[tuple[str, str]]:
    data = OfflineDataConfig(chat_template=SMOLLM2, prompt_template=template, input_key="prompt")
    found = open_pairs(path, key="k", chat=chat)
    return [tuple(side_text(side, texts_of(data, ours())) for side in pair) for pair in found]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, ASKED),
        ({"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}, ASKED),
        ({"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, ASKED),
        ({"prompt": ASKED, "chosen": "good", "rejected": "bad"}, ASKED),
        ({"prompt": "q1", "chosen": [user("q1"), GOOD], "rejected": [user("q1"), BAD]}, ASKED[1:2]),
        ({"prompt": "q1", "chosen": [GOOD], "rejected": [BAD]}, ASKED[1:2]),
    ],
    ids=["implicit", "explicit", "both", "answers as texts", "as UltraFeedback", "prompt as a text"],
)
def test_message_lists_are_what_transformers_renders(
    tmp_path: Path, theirs: Any, row: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    found = texts(jsonl(tmp_path / "pairs", {**row, "score_chosen": 8.0}))
    assert found == [tuple(theirs.apply_chat_template([*messages, end], tokenize=False) for end in (GOOD, BAD))]


def test_texts_are_taken_as_they_are_behind_their_prompt(tmp_path: Path) -> None:
    explicit = jsonl(tmp_path / "explicit", {"prompt": "q: ", "chosen": "a", "rejected": "b"})
    assert texts(explicit) == [("q: a", "q: b")]
    assert texts(explicit, template="User: {prompt}\nAssistant: ") == [
        ("User: q: \nAssistant: a", "User: q: \nAssistant: b")
    ]
    whole = jsonl(tmp_path / "implicit", {"chosen": "H: q A: a", "rejected": "H: q A: b"})
    assert texts(whole) == [("H: q A: a", "H: q A: b")]
    by_twos = jsonl(tmp_path / "twos", {"text": "a+"}, {"text": "a-"}, {"text": "b+"}, {"text": "b-"})
    assert texts(by_twos) == [("a+", "a-"), ("b+", "b-")]


def test_texts_are_turns_where_the_config_says_so(tmp_path: Path, theirs: Any) -> None:
    path = jsonl(tmp_path / "pairs", {"prompt": "q1", "chosen": "good", "rejected": "bad"})
    wanted = tuple(theirs.apply_chat_template([user("q1"), end], tokenize=False) for end in (GOOD, BAD))
    assert texts(path, chat=True) == [wanted]


def test_pairs_are_made_when_asked_for_and_their_lines_are_known(tmp_path: Path) -> None:
    rows = [{"chosen": f"a{i}", "rejected": f"b{i}"} for i in range(3)]
    found = open_pairs(jsonl(tmp_path / "pairs", *rows), key="k", chat=False)
    assert isinstance(found, Preferences)
    assert (len(found), list(found.numbers), found.unit) == (3, [1, 2, 3], "pairs")
    assert found[1][0].row == {"text": "a1"}


def test_where_the_template_refuses_the_row_is_named(tmp_path: Path) -> None:
    refuses = "{{ raise_exception('no system') }}"
    [pair] = open_pairs(
        jsonl(tmp_path / "pairs", {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}), key="k", chat=False
    )
    found = texts_of(OfflineDataConfig(chat_template=refuses), ours())
    with pytest.raises(DataError, match=r"pairs:1: the chat template refuses the conversation: no system$"):
        side_text(pair[0], found)
