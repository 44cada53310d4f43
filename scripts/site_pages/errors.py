"""The page of errors: messages read out of the code that raises them, examples out of the corpus of bad input.

What a message means and what to do is written once for each family of them, in errors.yaml. A message that no family
takes, and a family that takes none, are faults of this page (tests/unit/scripts/test_errors_page.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nemo_aligner import errors

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = Path(__file__).with_name("errors.yaml")
CORPUS = ROOT / "tests/bad_input/cases"
KINDS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.AlignerError | errors.StoppedEarly)
}
GAP = "…"
"""What stands in a message for a value, a path or a key."""


@dataclass(frozen=True)
class Message:
    """A message as the code has it, with `GAP` for each value, and where it is raised: `file:line`."""

    text: str
    where: str

    @property
    def says_nothing(self) -> bool:
        """It hands on what another message said."""
        return len(re.findall(r"[A-Za-z]", self.text)) < 6

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        gaps = ".*".join(map(re.escape, re.split(rf"{GAP}|FILE:LINE|FILE", self.text)))
        return re.compile(rf"(?:.*: )?{gaps}", re.DOTALL)

    def is_of(self, line: str) -> bool:
        return self._pattern.fullmatch(line) is not None


@dataclass(frozen=True)
class Family:
    """Messages that are answered alike: those that `pattern` finds, and that no earlier family took."""

    title: str
    subject: str
    pattern: re.Pattern[str]
    advice: str

    def takes(self, text: str) -> bool:
        return self.pattern.search(text) is not None


def families() -> list[Family]:
    """Those of errors.yaml, in its order."""
    subjects: Mapping[str, Iterable[Mapping[str, str]]] = yaml.safe_load(FAMILIES.read_text(encoding="utf-8"))
    return [
        Family(one["title"], subject, re.compile(one["messages"]), one["advice"].strip())
        for subject, members in subjects.items()
        for one in members
    ]


def messages() -> list[Message]:
    """Of every place in the package that raises a fault of nemo_aligner/errors.py."""
    found = []
    for path in sorted((ROOT / "nemo_aligner").rglob("*.py")):
        if path.name != "errors.py":
            found += messages_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    return found


def messages_of(source: str, name: str) -> Iterator[Message]:
    """Messages of the faults that `source`, the module called `name`, makes; none of those that say nothing."""
    tree = ast.parse(source)
    known = dict(_named_texts(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for text in _texts(node.args[0], known):
            if kind not in KINDS and not text.startswith("error: "):  # what is printed by hand
                continue
            placed = re.sub(rf"{GAP}(\.?{GAP})*", GAP, _placed(kind, text, node).removeprefix("error: "))
            message = Message(placed, f"{name}:{node.lineno}")
            if not message.says_nothing:
                yield message


def _named_texts(tree: ast.AST) -> Iterator[tuple[str, list[ast.expr]]]:
    """What functions of a module return, and what its loops over a table of tuples give their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name, [at.value for at in ast.walk(node) if isinstance(at, ast.Return) and at.value is not None]
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Tuple) and isinstance(node.iter, ast.Tuple):
            rows = [row.elts for row in node.iter.elts if isinstance(row, ast.Tuple)]
            for index, target in enumerate(node.target.elts):
                if isinstance(target, ast.Name):
                    yield target.id, [row[index] for row in rows if len(row) > index]


def examples() -> list[str]:
    """Lines of the corpus, each once, to the letter but for what depends on the machine."""
    lines = (
        re.sub(r"\{(here|python|shapes|any)\}", GAP, case["line"])
        for path in sorted(CORPUS.glob("*.yaml"))
        for case in yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    )
    return [*dict.fromkeys(lines)]


def _placed(kind: str, text: str, call: ast.Call) -> str:
    """`text` behind the place that the fault names, as its constructor puts it there."""
    given = {word.arg: word.value for word in call.keywords}
    place: Any = call.args[1] if len(call.args) > 1 else given.get("key", given.get("path"))
    if place is None or kind not in ("ConfigError", "DataError"):
        return text
    if kind == "ConfigError":
        return f"{_texts(place, {})[0]}: {text}"
    numbered = len(call.args) > 2 or "line" in given or isinstance(place, ast.Starred)
    return f"FILE:LINE: {text}" if numbered else f"FILE: {text}"


def _texts(node: ast.expr, known: Mapping[str, list[ast.expr]]) -> list[str]:
    """The texts that an expression may be, with GAP for what is only known when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)]  # type: ignore[misc]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, known), *_texts(node.orelse, known)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _texts(node.left, known) for right in _texts(node.right, known)]
    name = getattr(node.func if isinstance(node, ast.Call) else node, "id", None)
    return [text for value in known.get(name, ()) for text in _texts(value, {})] or [GAP]


@dataclass(frozen=True)
class Entry:
    """A message, and lines of the corpus that it gave."""

    text: str
    lines: tuple[str, ...]


def sorted_out() -> tuple[dict[Family, list[Entry]], list[str]]:
    """Entries of each family, and what no family takes."""
    known = {message.text: message for message in messages()}
    lines: dict[str, list[str]] = {text: [] for text in known}
    from_elsewhere = []
    for line in examples():
        of = [text for text, message in known.items() if message.is_of(line)]
        if of:
            lines[max(of, key=lambda text: len(text.replace(GAP, "")))].append(line)
        else:
            from_elsewhere.append(line)
    every = [*families()]
    found: dict[Family, list[Entry]] = {family: [] for family in every}
    left = []
    for text in (*known, *from_elsewhere):
        family = next((one for one in every if one.takes(text)), None)
        if family is None:
            left.append(text)
        else:
            found[family].append(Entry(text, tuple(lines.get(text, ()))))
    return found, left


_INTRODUCTION = """\
# Errors by message

A fault that you can do something about is one line on stderr, `error: ...`, from whichever rank met it
(`[rank 3] error: ...`). Its messages are below as the code has them, with … for keys, paths and values, and real ones
under them; search for the words of yours.

| exit status | |
|---|---|
| 0 | done |
| 1 | `error: ...`: nothing that was there is lost; put right what it names, and run the same command again |
| 75 | `stopped early: ...`: time limit or SIGTERM; state is saved, and the same command goes on |
| 130 | `interrupted`: Ctrl-C; the same command goes on |

Anything else, such as a traceback, is a fault of this program: please report it with the command and its last lines."""


def page() -> Iterator[str]:
    """The page, in Markdown."""
    yield _INTRODUCTION
    found, _ = sorted_out()
    subject = ""
    for family, entries in found.items():
        if family.subject != subject:
            subject = family.subject
            yield f"\n## {subject}"
        yield f"\n### {family.title}\n\n{family.advice}\n"
        for entry in sorted(entries, key=lambda entry: entry.text.lstrip(f"{GAP}: ")):
            yield f"- {_code(entry.text)}"
            if GAP in entry.text:
                yield from (f"    - {_code(line)}" for line in entry.lines[:_SHOWN])


_SHOWN = 3
"""Examples of one message, at most."""


def _code(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
