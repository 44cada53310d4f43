"""The command writes one page, safe from what is in it, and goes on with a run until it ends."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.report import cli, page
from tests.results import NASTY, make_loop, make_reinforce, samples, write_json, write_rows


@pytest.fixture(autouse=True)
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_plotly", lambda: "")  # packing 5 MB takes a while


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.started: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.started.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        name = self.started[-1][1].get("id") if self.started else None
        if name is not None:
            self.texts[name] = self.texts.get(name, "") + data

    def unpacked(self, name: str) -> dict:
        return json.loads(gzip.decompress(base64.b64decode(self.texts[f"data-{name}"])))


def test_the_page_is_one_file_that_holds_all_samples_and_names_no_address(tmp_path: Path) -> None:
    cli.run([str(make_loop(tmp_path))])
    text = (tmp_path / "report.html").read_text()
    found = Elements(text)
    head = found.unpacked("head")
    assert len(head["sets"]) == 7
    assert [len(found.unpacked(str(i))["output"]) for i in range(7)] == [20] * 7
    assert not re.search(r"""(src|href)=(?!"data:,")|https?://|@import|url\(""", text)


def test_nothing_that_a_sample_or_a_name_holds_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<script>{{data}}{{style}}<"
    rows = [{**row, "input": NASTY, "output": NASTY, NASTY: NASTY, f"reward_{NASTY}": 1.0} for row in samples(1, 2)]
    write_rows(folder / "iterations" / "0.jsonl", rows)
    cli.run([str(folder), "-o", str(tmp_path / "nasty.html")])
    cli.run([str(make_loop(tmp_path / "plain")), "-o", str(tmp_path / "plain.html")])
    nasty, plain = (Elements((tmp_path / name).read_text()) for name in ("nasty.html", "plain.html"))

    def drawn(elements: Elements) -> list[str]:
        return [tag for tag, given in elements.started if not str(given.get("id")).startswith("data-")]

    assert drawn(nasty) == drawn(plain)
    assert nasty.unpacked("0")["output"] == [NASTY] * 2


def test_several_runs_are_one_page_here_and_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_reinforce(tmp_path / "a" / "run")
    make_loop(tmp_path / "b" / "run")
    cli.run(["a/run", "b/run", "a/run"])
    head = Elements((tmp_path / "report.html").read_text()).unpacked("head")
    assert [run["name"] for run in head["runs"]] == ["a/run", "b/run"]
    assert {own["run"] for own in head["sets"]} == {0, 1}


def test_a_run_is_watched_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_loop(tmp_path, iterations=1)
    lock = tmp_path / "loop" / "loop.lock"
    write_json(lock, {"host": socket.gethostname(), "pid": os.getpid(), "started": "now"})
    seen = []

    def meanwhile(seconds: float) -> None:
        head = Elements((tmp_path / "report.html").read_text()).unpacked("head")
        seen.append((len(head["sets"]), len(head["runs"][0]["writers"]), head["every_s"]))
        if len(seen) == 2:
            make_loop(tmp_path, iterations=2)
        if len(seen) == 4:
            lock.unlink()
        assert len(seen) < 9, "it does not end"

    monkeypatch.setattr(cli.time, "sleep", meanwhile)
    cli.run([str(tmp_path), "--watch", "3"])
    assert seen == [(3, 1, 3.0), (3, 1, 3.0), (5, 1, 3.0), (5, 1, 3.0)]
    assert Elements((tmp_path / "report.html").read_text()).unpacked("head")["every_s"] is None


def test_what_a_stage_removes_meanwhile_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, gone = cli.read_run, [FileNotFoundError(2, "gone", "iter_0")] * 4

    def reading(*given: object) -> object:
        if gone:
            raise gone.pop()
        return read(*given)

    monkeypatch.setattr(cli, "read_run", reading)
    cli.run([str(make_loop(tmp_path))])
    assert (tmp_path / "report.html").exists()
    gone += [FileNotFoundError(2, "gone", "iter_0")] * 5
    with pytest.raises(DataError, match="such as iter_0"):
        cli.run([str(tmp_path)])


@pytest.mark.parametrize("given", [["--samples", "0"], ["--watch", "0.5"], ["--watch", "nan"]])
def test_a_number_that_makes_no_sense_is_refused(tmp_path: Path, given: list[str]) -> None:
    with pytest.raises(ConfigError, match=given[0]):
        cli.run([str(make_loop(tmp_path)), *given])
    assert not (tmp_path / "report.html").exists()


def test_a_fault_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path / "absent")])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: no such folder\n"


def test_a_folder_without_results_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results"):
        cli.run([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
