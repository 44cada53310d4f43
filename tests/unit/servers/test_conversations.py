"""A conversation reaches the reward server as turns, and is there the tokens that the labeler makes of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.config.reinforce import RemoteRewardModelConfig
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.judged_text import TextEncoder
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.errors import ServerError
from nemo_aligner.records import Turns
from nemo_aligner.rewards.interfaces import Candidate
from nemo_aligner.servers.reward_client import RewardClient
from nemo_aligner.servers.wire import RequestError, RequestReader
from tests.chats import SMOLLM2, assistant, ours, user

ASKED = [user("q1"), assistant("a1"), user("q2")]
TEMPLATE = "{{ tools | tojson }}{{ mood }}" + SMOLLM2
TOOLS = [{"name": "look"}]
MESSAGES = {"messages": ASKED, "tools": TOOLS, "chat_template_kwargs": {"mood": "calm"}, "id": 3}
NEMO = {"system": "be brief", "conversations": [{"from": "User", "value": "q"}]}


def reader(template: str | None = TEMPLATE, check_fields: Any = None) -> RequestReader:
    tokenizer = ours(template)
    chat = ChatTemplate.of(tokenizer, ChatKeys(), "chat_template")
    texts = RowTexts(None, "input", chat, "chat_template")
    return RequestReader(tokenizer, 512, 261, False, 1000, check_fields, "a" * 64, texts)


def candidate(row: dict[str, Any], response: str = "good") -> Candidate:
    turns = Turns.of(row, None)
    assert turns is not None
    return Candidate(turns.text, response, row, "p.jsonl:1", turns)


def sent(candidates: list[Candidate], *, parts: bool = False, conversations: bool = True) -> dict[str, np.ndarray]:
    """What the client asks of a server that takes so much."""
    client, asked = RewardClient(RemoteRewardModelConfig()), []
    client.reads_parts, client.reads_conversations = parts, conversations

    def infer_batch(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(inputs)
        count = len(candidates)
        told = [[json.dumps({"reward": 1.0, "parts": {}, "failed": []}).encode()]] * count
        return {"rewards": np.ones((count, 1), np.float32), "parts": np.array(told, dtype=object)}

    client._connection = lambda: SimpleNamespace(infer_batch=infer_batch)  # type: ignore[method-assign]
    assert [outcome.reward for outcome in client.judge(candidates).result(10)] == [1.0] * len(candidates)
    client.close()
    return asked[0]


@pytest.mark.parametrize("parts", [False, True])
def test_the_server_reads_what_the_labeler_reads_of_conversations_and_plain_prompts_in_one_request(parts: bool) -> None:
    candidates = [candidate(MESSAGES), Candidate("plain ", "text"), candidate(NEMO, " so ")]
    found = reader(check_fields=(lambda fields: None) if parts else None).read(sent(candidates, parts=parts))
    model = SimpleNamespace(tokenizer=ours(TEMPLATE), max_sequence_length=512, append_eod=False)
    labeler = TextEncoder(OfflineDataConfig(), model)  # type: ignore[arg-type]
    rows = [{**MESSAGES, "output": "good"}, {"input": "plain ", "output": "text"}, {**NEMO, "output": " so "}]
    assert found.rows == [labeler.tokens(row) for row in rows]
    assert found.errors == ["", "", ""]
    if parts:
        assert [c.prompt for c in found.candidates] == ["q2", "plain ", "q"]
        assert found.candidates[0].fields == MESSAGES


def test_conversations_alone_are_a_request_and_functions_get_their_answers() -> None:
    rows = [json.dumps({"messages": ASKED, "response": "good"}).encode()]
    found = reader(check_fields=lambda fields: None).read({"conversations": np.array([rows], dtype=object)})
    assert [(c.response, c.fields) for c in found.candidates] == [("good", {"messages": ASKED})]
    assert found.rows == reader().read(sent([candidate({"messages": ASKED})])).rows


def test_a_server_that_takes_texts_alone_is_not_asked_about_conversations() -> None:
    client = RewardClient(RemoteRewardModelConfig())
    with pytest.raises(ServerError, match=r"takes texts alone, and p\.jsonl:1 is a conversation"):
        client.judge([Candidate("a", "b"), candidate(MESSAGES)])
    client.close()


def asked(*rows: bytes | dict[str, Any]) -> dict[str, np.ndarray]:
    raw = [[row if isinstance(row, bytes) else json.dumps(row).encode()] for row in rows]
    return {"conversations": np.array(raw, dtype=object)}


GOOD = {"messages": ASKED, "response": "good"}


@pytest.mark.parametrize(
    ("given", "template", "line"),
    [
        ({"response": "a"}, TEMPLATE, 'conversations: row 0 is no {"messages": [...], "response": "..."}'),
        ({"messages": ASKED}, TEMPLATE, 'conversations: row 0 is no {"messages": [...], "response": "..."}'),
        ({"messages": [{}], "response": "a"}, TEMPLATE, "conversations: row 0: the turn {} lacks a role or a text"),
        ({"messages": [assistant("a")], "response": "a"}, TEMPLATE, "row 0: the conversation ends with the assistant"),
        (GOOD, None, "row 0: the row is a conversation, and the model's tokenizer has no chat template; give"),
        (GOOD, "{{ raise_exception('no') }}", "row 0: the chat template refuses the conversation: no"),
        ({"messages": ASKED, "response": "a" * 1001}, SMOLLM2, "bytes, inference.max_text_bytes is 1000"),
    ],
)
def test_a_conversation_that_cannot_be_read_has_no_reward_and_says_why(given: Any, template: str, line: str) -> None:
    found = reader(template).read(asked(given, GOOD))
    assert line in found.errors[0]
    assert (found.errors[1] == "") == (given != GOOD)


HALVES = (
    rb'{"messages": [{"role": "user", "content": "hi \ud83d"}], "response": "x"}',
    rb'{"messages": [{"role": "user", "content": "hi"}], "response": "\udc4d"}',
    rb'{"messages": [{"role": "user", "content": "hi"}], "response": "x", "tools": [{"\ud83d": 1}]}',
)


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"{", "row 0: not valid JSON"),
        (b"[]", "row 0: a list where an object such as"),
        *((half, r"row 0: field '\w+' holds .*, one half of a character$") for half in HALVES),
    ],
)
def test_what_is_no_json_is_refused(raw: bytes, line: str) -> None:
    with pytest.raises(RequestError, match=f"^conversations: {line}"):
        reader().read(asked(raw, GOOD))
    with pytest.raises(RequestError, match=r"^conversations: 1 for 2 texts"):
        reader().read({**asked(GOOD), "sentences": np.array([[b"a"], [b"b"]], dtype=object)})
