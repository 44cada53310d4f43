"""Requests: what is taken, and the one line that names the input where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nemo_aligner.errors import DataError
from nemo_aligner.rewards.interfaces import Candidate, Judgement, Outcome
from nemo_aligner.servers.wire import RequestError, RequestReader, answer, outcome_of, refusal, told
from tests.fakes import EOS, ByteTokenizer

READER = RequestReader(ByteTokenizer(), limit=8, vocab_size=258, append_eod=False, max_text_bytes=100)


def sentences(*texts: bytes) -> dict[str, np.ndarray]:
    return {"sentences": np.array([[text] for text in texts], dtype=object)}


def tokens(rows: Any, lengths: Any) -> dict[str, np.ndarray]:
    return {"tokens": np.array(rows, dtype=np.int64), "sequence_lengths": np.array(lengths, dtype=np.int64)}


def test_texts_and_their_tokens_are_the_same_request() -> None:
    assert READER.read(tokens([[0, 257]], [[2]])).rows == [[0, 257]], "the ends of the vocabulary"
    text = READER.read(sentences(b"abc", "é".encode()))
    padded = READER.read(tokens([[97, 98, 99], [195, 169, 0]], [[3], [2]]))
    assert text == padded
    assert text.exceeded == [False, False]


def test_a_text_beyond_the_context_is_cut_and_flagged_and_keeps_its_end() -> None:
    found = READER.read({**sentences(b"0123456789", b"01234567"), "add_EOS": np.array([[True], [False]])})
    assert found.rows == [[*b"0123456", EOS], [*b"01234567"]]
    assert found.exceeded == [True, False]


def test_eos_is_as_the_model_was_trained_unless_the_request_says() -> None:
    trained = RequestReader(ByteTokenizer(), 8, 258, append_eod=True, max_text_bytes=100)
    assert trained.read(sentences(b"a")).rows == [[97, EOS]]
    assert trained.read({**sentences(b"a"), "add_EOS": np.array([[False]])}).rows == [[97]]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "sentences: give either sentences, or tokens with sequence_lengths"),
        ({**sentences(b"a"), **tokens([[1]], [[1]])}, "sentences: give either sentences, or tokens with"),
        ({"sentences": np.array([[b"a", b"b"]], dtype=object)}, "sentences: shape [1, 2] is not [B, 1]"),
        ({"sentences": np.array([b"a"], dtype=object)}, "sentences: shape [1] is not [B, 1]"),
        ({"tokens": np.array([[1]])}, "sequence_lengths: needed with tokens"),
        (tokens([1, 2], [[1]]), "tokens: shape [2] is not [B, S]"),
        (tokens([[1, 2]], [[1], [1]]), "sequence_lengths: 2 for 1 rows of tokens"),
        (tokens([[1, 2]], [1]), "sequence_lengths: shape [1] is not [B, 1]"),
        ({**sentences(b"a"), "add_EOS": np.array([[True], [True]])}, "add_EOS: 2 for 1 texts"),
        ({**sentences(b"a"), "add_EOS": np.array([True])}, "add_EOS: shape [1] is not [B, 1]"),
    ],
)
def test_a_bad_request_is_refused_by_the_name_of_its_input(inputs: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(RequestError) as fault:
        READER.read(inputs)
    assert str(fault.value).startswith(said)


@pytest.mark.parametrize(("inputs", "rows"), [({}, 1), (sentences(b"a", b"b"), 2), (tokens([[1]] * 3, [[1]]), 3)])
def test_a_refusal_has_as_many_rows_as_the_request(inputs: dict[str, np.ndarray], rows: int) -> None:
    outputs = refusal("no", inputs, "a1")
    assert outputs["error"].tolist() == [[b"no"]] * rows
    assert outputs["exceeded"].tolist() == [[-1]] * rows
    assert [outputs[name].dtype for name in ("rewards", "exceeded", "error")] == [np.float32, np.int32, object]
    assert np.isnan(outputs["rewards"]).all()
    assert outputs["rewards"].shape == (rows, 1)


def test_as_many_bytes_as_are_allowed_are_read() -> None:
    reader = RequestReader(ByteTokenizer(), limit=200, vocab_size=258, append_eod=False, max_text_bytes=100)
    found = reader.read(sentences(b"a" * 100))
    assert (found.rows, found.errors, found.exceeded) == ([[97] * 100], [""], [False])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (sentences(b"fine", b"\xff\xfe", b"ok"), "sentences: row 1 is not valid UTF-8 (byte 0)"),
        (sentences(b"fine", b"", b"ok"), "sentences: row 1 is empty"),
        (sentences(b"fine", b"a" * 101, b"ok"), "sentences: row 1 has 101 bytes, inference.max_text_bytes is 100"),
        (tokens([[1, 2]] * 3, [[1], [3], [2]]), "sequence_lengths: row 1 says 3, tokens has 2 columns"),
        (tokens([[1, 2]] * 3, [[1], [-1], [2]]), "sequence_lengths: row 1 says -1, tokens has 2 columns"),
        (tokens([[1, 2]] * 3, [[1], [0], [2]]), "sequence_lengths: row 1 is empty"),
        (tokens([[1, 2], [1, 258], [1, 2]], [[2]] * 3), "tokens: row 1 has id 258, the vocabulary is 0 to 257"),
        (tokens([[1, 2], [1, -1], [1, 2]], [[2]] * 3), "tokens: row 1 has id -1, the vocabulary is 0 to 257"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why_and_costs_the_others_nothing(
    inputs: dict[str, np.ndarray], said: str
) -> None:
    found = READER.read({**inputs, "add_EOS": np.array([[True]] * 3)})
    assert found.errors == ["", said, ""]
    assert found.rows[1] == []
    assert all(row[-1] == EOS and len(row) > 1 for row in (found.rows[0], found.rows[2]))
    answered = answer([1.5, 2.5], found.exceeded, found.errors, "a1")
    assert answered["rewards"][[0, 2], 0].tolist() == [1.5, 2.5]
    assert np.isnan(answered["rewards"][1, 0])
    assert answered["exceeded"][:, 0].tolist() == [0, -1, 0]
    assert answered["error"][:, 0].tolist() == [b"", said.encode(), b""]


def test_ids_past_the_length_are_padding_and_may_be_anything() -> None:
    assert READER.read(tokens([[1, 2, 99999]], [[2]])).rows == [[1, 2]]


def apart(**columns: list[bytes]) -> dict[str, np.ndarray]:
    return {name: np.array([[text] for text in column], dtype=object) for name, column in columns.items()}


def needs_answer(fields: Any) -> None:
    if "answer" not in fields:
        raise DataError("no field 'answer'")


def test_prompt_response_and_fields_are_a_candidate_and_one_text() -> None:
    reader = RequestReader(ByteTokenizer(), 8, 258, False, 100, needs_answer)
    found = reader.read(apart(prompts=[b"ab", b"p"], responses=[b"c", b""], fields=[b'{"answer": 1}', b""]))
    assert found.candidates == [Candidate("ab", "c", {"answer": 1}, "row 0"), Candidate("p", "", {}, "row 1")]
    assert found.rows == [[*b"abc"], []]
    assert found.errors == ["", "no field 'answer'"]
    [alone] = RequestReader(ByteTokenizer(), 8, 258, False, 100, lambda fields: None).read(sentences(b"abc")).candidates
    assert (alone.prompt, alone.response) == ("", "abc")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (apart(responses=[b"a"]), "prompts: needed with responses"),
        ({**apart(responses=[b"a"], prompts=[b"a"]), **sentences(b"a")}, "sentences: give either sentences, or"),
        (apart(responses=[b"a"], prompts=[b"a", b"b"]), "prompts: 2 for 1 responses"),
        (apart(responses=[b"a"], prompts=[b"a"], fields=[b"{"]), "fields: row 0: not valid JSON"),
        (apart(responses=[b"a"], prompts=[b"a"], fields=[b"[1]"]), "fields: row 0: a list where an object such as"),
        (
            apart(responses=[b"a"], prompts=[b"a"], fields=[rb'{"x": ["\ud83d"]}']),
            r"fields: row 0: field 'x' holds \ud83d, one half of a character",
        ),
        (
            apart(responses=[b"a"], prompts=[b"a"], fields=[b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}"]),
            "fields: row 0: lists or objects are nested over 100 deep",
        ),
        (apart(responses=[b"a", b"\xff"], prompts=[b"a"] * 2), "responses: row 1 is not valid UTF-8"),
        (tokens([[1]], [[1]]), "tokens: reward functions read texts; give prompts and responses"),
    ],
)  # fmt: skip
def test_a_bad_request_to_functions_is_refused_by_the_name_of_its_input(
    inputs: dict[str, np.ndarray], said: str
) -> None:
    with pytest.raises(RequestError) as fault:
        RequestReader(ByteTokenizer(), 8, 258, False, 100, needs_answer).read(inputs)
    assert str(fault.value).startswith(said)


@pytest.mark.parametrize(
    ("judgement", "outcome"),
    [
        (Judgement(1.5, {"a": 1.5}), Outcome(1.5, None, {"a": 1.5})),
        (Judgement(None, {"a": None}), Outcome(None, None, {"a": None})),
        (
            Judgement(None, {"a": 1.0, "b": None}, ("b",)),
            Outcome(None, "the server could not have the reward of b", {"a": 1.0, "b": None}),
        ),
    ],
)
def test_a_judgement_arrives_as_it_was_sent(judgement: Judgement, outcome: Outcome) -> None:
    assert outcome_of(told(judgement)) == outcome
