"""A command arrives as it was sent, or not at all."""

from __future__ import annotations

import io

import pytest

from nemo_aligner.engine.processes.standing import receive, send

COMMANDS = [["-m", "package", 'key="a b"', ""], [], ["RANK=1", "two\nlines", "\N{GREEK SMALL LETTER BETA}", "\udcff"]]


def test_commands_arrive_word_for_word_in_their_order() -> None:
    stream = io.BytesIO()
    for words in COMMANDS:
        send(stream, words)
    stream.seek(0)
    assert [receive(stream) for _ in COMMANDS] == COMMANDS
    assert receive(stream) is None


@pytest.mark.parametrize("cut", range(12))
def test_a_command_whose_sender_is_gone_in_the_middle_of_it_is_none(cut: int) -> None:
    stream = io.BytesIO()
    send(stream, ["-m", "module"])
    assert len(stream.getvalue()) == 12
    assert receive(io.BytesIO(stream.getvalue()[:cut])) is None
