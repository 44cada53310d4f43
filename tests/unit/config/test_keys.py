"""A key's meaning is the comment on its line, whatever its value looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aligner.config.keys import Key, keys_in, keys_of


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("a: 1 # one\n", [Key("a", "1", "one")]),
        ("a: '#1' # one # two\n", [Key("a", "'#1'", "one # two")]),
        ('a: "x # y"\n', [Key("a", '"x # y"', "")]),
        ("a: [1, '#'] # list\n", [Key("a", "[1, '#']", "list")]),
        ("a: {b: 1} # flow\n", [Key("a", "{b: 1}", "flow")]),
        ("a: # block\n  b: null # inner\n", [Key("a", None, "block"), Key("a.b", "null", "inner")]),
        ("# head\n\na:\n  b: x#y\n", [Key("a", None, ""), Key("a.b", "x#y", "")]),
        ("a: ${b.c} # other\ndefaults: [x]\n", [Key("a", "${b.c}", "other")]),
        ("", []),
        ("# only\n", []),
    ],
)
def test_a_key_is_read_with_default_and_comment(text: str, keys: list[Key]) -> None:
    assert keys_in(text) == keys


def test_a_yaml_that_begins_from_another_changes_defaults_and_keeps_meanings(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: 1 # one\nb: 2 # two\n")
    (tmp_path / "own.yaml").write_text("defaults: [base, _self_]\nb: 3\nc: 4 # four\na: 5 # five\n")
    assert keys_of(tmp_path, "own") == [Key("a", "5", "five"), Key("b", "3", "two"), Key("c", "4", "four")]
