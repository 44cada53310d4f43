"""The site builds without a warning, its links lead somewhere, and every key is on its page."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.commands.cli import CONFIGURED
from nemo_aligner.config.folders import CONF
from nemo_aligner.config.keys import keys_of
from scripts.docs_site import PAGES, relinked
from tests.browser import browser
from tests.functional.conftest import ROOT

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_key_of_every_command_is_on_its_page(site: Path) -> None:
    page = html.unescape((site / "keys.html").read_text())
    for command in CONFIGURED:
        assert f"aligner {command}" in page
    for path in (*(CONF / "gpt").glob("*.yaml"), *(CONF / "offline").glob("*.yaml")):
        keys = (key.name for key in keys_of(path.parent, path.stem) if key.default is not None)
        assert [key for key in keys if f"<code>{key}</code>" not in page] == []


@pytest.mark.parametrize(
    ("page", "texts"),
    [
        ("errors", ["data.n: 0 is below 1", "another run writes here: …", "A number out of its range"]),
        ("migration_keys", ["trainer.reinforce.num_rollouts_per_prompt", "model.ppo.num_rollout_per_prompt"]),
        ("migration_keys", ["model.use_flash_attention: no such key", "the fastest attention that there is"]),
    ],
)
def test_pages_made_of_the_code_say_what_it_says(site: Path, page: str, texts: list[str]) -> None:
    shown = html.unescape((site / f"{page}.html").read_text())
    assert [text for text in texts if text not in shown] == []


def test_the_search_of_the_site_finds_an_error_by_its_words(site: Path) -> None:
    sections = json.loads((site / "search/search_index.json").read_text())["docs"]
    found = {section["title"] for section in sections if "data.n: 0 is below 1" in html.unescape(section["text"])}
    assert found == {"A number out of its range"}


def test_the_search_works_in_a_site_that_is_opened_from_a_folder(site: Path, tmp_path: Path) -> None:
    field, found = "[data-md-component=search-query]", ".md-search-result__item a"
    with browser(tmp_path) as page:
        page.send("Page.navigate", url=(site / "offline.html").as_uri())
        page.wait(f"document.readyState === 'complete' && document.querySelector('{field}')")
        page.click(field)
        page.type(field, "threshold leaves no sample")
        page.wait(f"document.querySelector('{found}')")
        page.click(found)
        page.wait("location.pathname.endsWith('/errors.html') && document.querySelector('h1')")
        assert page.faults == []
        assert {address.partition(":")[0] for address in page.requests} <= {"file", "data", "about", "blob"}


def test_every_file_beside_the_guides_is_a_page(site: Path) -> None:
    for name, page in PAGES.items():
        title = (ROOT / name).read_text().partition("\n")[0].removeprefix("# ")
        assert title in html.unescape((site / page.replace(".md", ".html")).read_text())


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\">\s]+)", page.read_text())
        assert fetched == [], page.name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a](docs/offline.md#loop)", "[a](offline.md#loop)"),
        ("[a](../SECURITY.md)", "[a](security.md)"),
        ("[a](../README.md#the-commands)", "[a](index.md#the-commands)"),
        ('<img src="docs/report.png">', '<img src="report.png">'),
        ("[a](https://x.org/docs/y.md)", "[a](https://x.org/docs/y.md)"),
        ("`docs/offline.md`", "`docs/offline.md`"),
    ],
)
def test_links_between_files_are_links_between_pages(before: str, after: str) -> None:
    assert relinked(before) == after
