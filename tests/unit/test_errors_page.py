"""The page of errors has every message of the code and every line of the corpus, with what to do about it."""

from __future__ import annotations

import re

import pytest
import yaml

from scripts.site_pages import errors
from scripts.site_pages.errors import GAP, Message, messages_of


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("raise ConfigError('is wrong', 'data.n')", ["data.n: is wrong"]),
        ("raise ConfigError(f'{n} is below {low}', f'{block}.n')", [f"{GAP}.n: {GAP} is below {GAP}"]),
        ("raise ConfigError('is wrong', key='data.n')", ["data.n: is wrong"]),
        ("raise DataError('no rows', path)", ["FILE: no rows"]),
        ("raise DataError('no such field', path, line)", ["FILE:LINE: no such field"]),
        ("raise DataError('no such field', *rows.where(i))", ["FILE:LINE: no such field"]),
        ("raise errors.OutputError('cannot write it')", ["cannot write it"]),
        ("raise DataError('a folder here' if x else 'no such file')", ["a folder here", "no such file"]),
        ("yield CheckpointError('this and ' + str(x) + f'{y}{z} that')", [f"this and {GAP} that"]),
        ("raise CheckpointError(f'{folder}/{fault}') from fault", []),
        ("def said(x): return f'another run: {x}'\nraise OutputError(said(1))", [f"another run: {GAP}"]),
        (
            "for n, says in ((1, 'too many'), (2, f'too few: {x}')):\n  raise ConfigError(says, f'model.{n}')",
            [f"model.{GAP}: too many", f"model.{GAP}: too few: {GAP}"],
        ),
        (
            "sys.exit(f'error: {x} is no command' + ('' if y else '; try'))",
            [f"{GAP} is no command", f"{GAP} is no command; try"],
        ),
        ("sys.exit(f'usage: {x}')", []),
        ("raise ValueError('not for users')", []),
    ],
)
def test_a_message_is_read_as_it_is_printed(source: str, texts: list[str]) -> None:
    assert [message.text for message in messages_of(source, "m.py")] == texts


@pytest.mark.parametrize(
    ("text", "line", "is_of"),
    [
        (f"data.n: {GAP} is below 1", "data.n: 0 is below 1", True),
        (f"data.n: {GAP} is below 1", "data.n: 0 is below 10", False),
        ("FILE:LINE: no field", "rows.jsonl:3: no field", True),
        (f"{GAP} is not llama", "--input x: bert is not llama", True),
        ("a (b)", "a (b)", True),
    ],
)
def test_a_line_is_known_by_the_message_that_it_came_from(text: str, line: str, is_of: bool) -> None:
    assert Message(text, "m.py:1").is_of(line) is is_of


@pytest.mark.processes  # it reads the whole package
def test_every_message_and_every_line_of_the_corpus_has_a_family_and_no_family_is_empty() -> None:
    found, left = errors.sorted_out()
    assert left == [], "scripts/site_pages/errors.yaml does not say what to do about these"
    assert [family.title for family, entries in found.items() if not entries] == []
    held = [entry for entries in found.values() for entry in entries]
    assert len(held) == len({entry.text for entry in held})
    lines = {line for entry in held for line in (entry.text, *entry.lines)}
    assert [line for line in errors.examples() if line not in lines] == []
    page = "\n".join(errors.page())
    assert [entry.text for entry in held if entry.text not in page] == []


def test_another_message_is_one_that_no_family_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "messages", lambda: [Message("the moon is in the wrong house", "m.py:1")])
    monkeypatch.setattr(errors, "examples", lambda: ["data.n: 0 is below 1"])
    found, left = errors.sorted_out()
    assert left == ["the moon is in the wrong house"]
    assert [entry.text for entries in found.values() for entry in entries] == ["data.n: 0 is below 1"]


def test_every_family_says_what_to_do_and_is_there_once() -> None:
    every = errors.families()
    assert len({family.title for family in every}) == len(every)
    assert [family.title for family in every if len(family.advice) < 20] == []
    for subject in yaml.safe_load(errors.FAMILIES.read_text()).values():
        assert all(set(one) == {"title", "messages", "advice"} for one in subject)


def test_the_exit_statuses_are_those_of_the_code() -> None:
    from nemo_aligner.errors import EXIT_FAILURE, EXIT_STOPPED_EARLY

    told = re.findall(r"^\| (\d+) \|", next(errors.page()), re.M)
    assert {str(EXIT_FAILURE), str(EXIT_STOPPED_EARLY)} <= set(told)
