"""A reward model reads the same tokens wherever a text comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from nemo_aligner.config.evaluation import EvaluationConfig
from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.data.judged_text import TextEncoder, ended
from nemo_aligner.servers.wire import SENTENCES, RequestReader
from tests.fakes import EOS, ByteTokenizer


@dataclass
class Judge:
    tokenizer: ByteTokenizer
    max_sequence_length: int = 12
    append_eod: bool = False


class WithBos(ByteTokenizer):
    bos_id = 1  # type: ignore[assignment]


ROW = {"input": "ab", "output": "cd"}
DATA = OfflineDataConfig(file_names=[])


@pytest.mark.parametrize("length", [3, 4, 5, 6])
@pytest.mark.parametrize("eos", [None, EOS])
def test_a_text_has_at_most_the_limit_and_ends_with_eos_where_it_should(length: int, eos: int | None) -> None:
    found, cut = ended(list(range(length)), limit=5, eos=eos)
    room = 5 if eos is None else 4
    assert found == [*range(min(length, room)), *([] if eos is None else [eos])]
    assert cut == (length > room)


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("text", ["ab", "a long text, cut", "0123456789a"])
def test_labeler_and_server_make_the_same_tokens_of_a_text(append_eod: bool, text: str) -> None:
    judge = Judge(ByteTokenizer(), append_eod=append_eod)
    labeled = TextEncoder(DATA, judge).tokens({"input": text[:1], "output": text[1:]})
    reader = RequestReader(judge.tokenizer, judge.max_sequence_length, 258, append_eod, 1000)
    served = reader.read({SENTENCES: np.array([[text.encode()]], dtype=object)})
    assert served.rows == [labeled]
    assert served.exceeded == [len(text) > 12 - append_eod]


def test_the_keys_say_what_is_put_around_the_text_and_how_long_it_may_be() -> None:
    judge = Judge(WithBos(), append_eod=True)

    def tokens(**more: object) -> list[int]:
        return TextEncoder(replace(DATA, **more), judge).tokens(ROW)  # type: ignore[arg-type]

    assert tokens() == [*b"abcd", EOS]
    assert tokens(add_eos=False) == [*b"abcd"]
    assert tokens(add_bos=True) == [1, *b"abcd", EOS]
    assert tokens(max_seq_length=3) == [*b"ab", EOS]
    assert tokens(prompt_template="<{input}>") == [*b"<ab>cd", EOS]
    assert TextEncoder(DATA, judge).tokens({"input": "", "output": ""}) == [EOS]


def test_evaluation_judges_with_the_labelers_defaults() -> None:
    data = EvaluationConfig().data
    assert (data.max_seq_length, data.add_eos, data.add_bos) == (4096, None, False)
