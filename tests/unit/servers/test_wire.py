"""Requests: what is taken, and the one line that names the input where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nemo_aligner.servers.wire import RequestError, RequestReader
from tests.fakes import EOS, ByteTokenizer

READER = RequestReader(ByteTokenizer(), limit=8, vocab_size=258, append_eod=False, max_text_bytes=100)


def sentences(*texts: bytes) -> dict[str, np.ndarray]:
    return {"sentences": np.array([[text] for text in texts], dtype=object)}


def tokens(rows: Any, lengths: Any) -> dict[str, np.ndarray]:
    return {"tokens": np.array(rows, dtype=np.int64), "sequence_lengths": np.array(lengths, dtype=np.int64)}


def test_texts_and_their_tokens_are_the_same_request() -> None:
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
    ("inputs", "named"),
    [
        ({}, "sentences"),
        ({**sentences(b"a"), **tokens([[1]], [[1]])}, "sentences"),
        (sentences(b"fine", b"\xff\xfe"), "sentences: row 1 is not valid UTF-8"),
        (sentences(b""), "sentences: row 0 is empty"),
        (sentences(b"a" * 101), "sentences: row 0 has 101 bytes"),
        ({"sentences": np.array([[b"a", b"b"]], dtype=object)}, "sentences: shape [1, 2]"),
        ({"tokens": np.array([[1]])}, "sequence_lengths: needed"),
        (tokens([[1, 2]], [[3]]), "sequence_lengths: row 0 says 3"),
        (tokens([[1, 2]], [[-1]]), "sequence_lengths: row 0 says -1"),
        (tokens([[1, 2]], [[0]]), "sequence_lengths: row 0 is empty"),
        (tokens([[1, 2]], [[1], [1]]), "sequence_lengths: 2 for 1"),
        (tokens([[1, 258]], [[2]]), "tokens: row 0 has id 258"),
        (tokens([[1, -1]], [[2]]), "tokens: row 0 has id -1"),
        ({**sentences(b"a"), "add_EOS": np.array([[True], [True]])}, "add_EOS: 2 for 1"),
    ],
)
def test_a_bad_request_is_refused_by_the_name_of_its_input(inputs: dict[str, np.ndarray], named: str) -> None:
    with pytest.raises(RequestError) as fault:
        READER.read(inputs)
    assert str(fault.value).startswith(named)


def test_ids_past_the_length_are_padding_and_may_be_anything() -> None:
    assert READER.read(tokens([[1, 2, 99999]], [[2]])).rows == [[1, 2]]
