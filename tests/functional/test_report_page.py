"""The page of a report in a browser: what a person opens, sorts, filters, unfolds and compares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_aligner.report import cli
from tests.browser import Page, browser
from tests.results import NASTY, make_loop, make_reinforce, samples, write_rows

pytestmark = pytest.mark.processes

ENTRIES = "[...document.querySelectorAll('.entry')].sort((a, b) => a.offsetTop - b.offsetTop)"
PROMPTS = f"{ENTRIES}.map(own => own.querySelector('.prompt').textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as own:
        yield own


@pytest.fixture(autouse=True)
def neither_faults_nor_requests(page: Page) -> Iterator[None]:
    page.faults.clear()
    page.requests.clear()
    yield
    assert page.faults == []
    assert [own for own in page.requests if not own.startswith(("file:", "data:", "about:", "blob:"))] == []


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    cli.run([str(make_loop(folder))])
    return folder / "report.html"


def first_prompt(page: Page) -> str:
    return page.do(PROMPTS)[0]


def test_the_overview_shows_what_a_run_came_to(page: Page, loop: Path) -> None:
    page.open(loop)
    tile = page.on(".tile", "own => own.textContent")
    assert tile.startswith("Mean reward1.700 → 3.200+")
    charts = page.do("[...document.querySelectorAll('#reward-charts figcaption b')].map(own => own.textContent)")
    assert charts == ["Reward", "Reward before and after", "First and last", "Reward against KL", "Length of responses"]
    page.wait("document.querySelectorAll('#reward-charts .plot[data-drawn] .main-svg').length >= 5")
    # best of n of the first policy lies at ln n − (n−1)/n
    bound = "own => own.data.find(one => one.name.startsWith('best of n')).x"
    plot = "[...document.querySelectorAll('.plot')].find(own => own.layout.xaxis.title?.text.startsWith('KL'))"
    at = page.do(f"({bound})({plot})")
    assert at == pytest.approx([0.0, 0.1931, 0.4319, 0.6363], abs=1e-3)


def test_an_evaluation_shows_how_its_policies_compare(page: Page, loop: Path) -> None:
    page.open(loop)
    page.on("#figure-tables .charts", "own => own.scrollIntoView()")
    page.wait("document.querySelectorAll('#figure-tables .plot[data-drawn]').length === 4")
    charts = page.do("[...document.querySelectorAll('#figure-tables .charts figcaption')].map(own => own.textContent)")
    assert charts == [
        "Win rateover policy_0.nemo, 95 % interval", "Best of kunbiased, from all samples",
        "pass@kunbiased, from all samples", "Distinct n-grams",
    ]  # fmt: skip
    plots = "[...document.querySelectorAll('#figure-tables .plot')].map(own => own.data.map(one => [one.x, one.y]))"
    wins, best, passed, distinct = page.do(plots)
    compared = [f"policy_{i}.nemo" for i in (1, 2, 3)]
    assert wins == [[compared, pytest.approx([60, 70, 80])], [compared, pytest.approx([55, 65, 75])]]
    ends = page.do(
        "['arrayminus', 'array'].map(end => document.querySelector('#figure-tables .plot').data[0].error_y[end])"
    )
    assert ends == [pytest.approx([20] * 3), pytest.approx([10] * 3)]
    assert best == [[[1, 2, 4], [1.7, 2.5, 3 + i]] for i in range(4)]
    assert passed == [[[1, 2, 4], [0.25, 0.5, 0.75]]] * 4
    assert [values for _, values in distinct] == [[75] * 4, [None] * 4]
    cells = page.do("[...document.querySelectorAll('#figure-tables td')].map(own => own.textContent)")
    assert "0.400 to 0.700" in cells


def test_prompts_are_sorted_best_and_worst_first_and_by_column(page: Page, loop: Path) -> None:
    page.open(loop, "samples")
    assert page.do(f"{PROMPTS}.length") == 5
    page.click("[data-key=mean][data-down=yes]")
    assert first_prompt(page) == "prompt 4: the film was"
    page.click("[data-key=mean][data-down=no]")
    assert first_prompt(page) == "prompt 0: the film was"
    page.click("#head [title='best sample']")
    assert first_prompt(page) == "prompt 4: the film was"


def test_search_and_limits_leave_what_they_say(page: Page, loop: Path) -> None:
    page.open(loop, "samples")
    page.type("#query", "PROMPT 3")
    page.wait("document.querySelector('#count').textContent === '1 of 5 prompts'")
    assert page.do(PROMPTS) == ["prompt 3: the film was"]
    page.type("#query", "/prompt [12]:/")
    page.wait("document.querySelector('#count').textContent === '2 of 5 prompts'")
    page.type("#query", "/(/")
    page.wait("document.querySelector('#query').classList.contains('wrong')")
    page.type("#query", "")
    page.click("#by-sample")
    page.wait("document.querySelector('#count').textContent === '20 samples'")
    page.type("#low", "4.5")  # rewards of the last policy are i/10 + j + 1.5
    page.wait("document.querySelector('#count').textContent === '5 of 20 samples'")
    page.type("#high", "4.6")
    page.wait("document.querySelector('#count').textContent === '2 of 20 samples'")
    page.choose("#after", "iteration 1")
    page.type("#low", "")
    page.type("#high", "")
    page.choose("#kept", "yes")
    page.wait("document.querySelector('#count').textContent === '5 of 20 samples'")


def test_a_prompt_unfolds_to_two_policies_side_by_side_with_what_differs_marked(page: Page, loop: Path) -> None:
    page.open(loop, "samples")
    page.click(".entry .line")
    page.wait("document.querySelector('.sides.two')")
    names = page.do("[...document.querySelectorAll('.side h4')].map(own => own.textContent)")
    assert names == ["policy 0", "policy 3"]
    rewards = page.do("[...document.querySelectorAll('.side .chip.reward')].map(own => own.textContent)")
    assert rewards == ["3", "2", "1", "0", "4.500", "3.500", "2.500", "1.500"]
    sides = "[...document.querySelectorAll('.side')]"
    first, last = samples(5, 4, seed=100)[3]["output"], samples(5, 4, seed=103)[3]["output"]
    assert page.do(f"{sides}.map(own => own.querySelector('.text').textContent)") == [first, last]
    kept = [word for word in first.split() if word in last.split()]
    plain = "[...own.querySelector('.text').childNodes].filter(one => one.nodeType === 3).map(one => one.data).join('')"
    unmarked = page.do(f"{sides}.map(own => {plain})")
    assert unmarked[0] == unmarked[1]
    assert set(unmarked[0].split()) <= set(kept)
    for mark, marks in (("del", [True, False]), ("ins", [False, True])):
        assert page.do(f"{sides}.map(own => own.querySelector('{mark}') !== null)") == marks
    page.wait(f"(([a, b]) => b.offsetTop >= a.offsetTop + a.offsetHeight)({ENTRIES})")  # the rows below make room
    page.click(".entry .line")
    assert not page.do("document.querySelector('.details')")


def test_each_reward_function_has_its_column_and_its_curve(page: Page, tmp_path: Path) -> None:
    cli.run([str(make_reinforce(tmp_path))])
    page.open(tmp_path / "report.html", "samples")
    names = page.do("[...document.querySelectorAll('#head button')].map(own => own.textContent)")
    assert names[-3:] == ["exact", "short", "n"]
    page.click("#head [title='mean of exact']")
    assert first_prompt(page) == "prompt 5: the film was"
    page.click("[data-view=overview]")
    assert "Each reward function" in page.do("document.querySelector('#reward-charts').textContent")
    page.click("[data-view=training]")
    assert page.do("document.querySelector('#curve-count').textContent") == "4 curves"
    page.click("[data-view=setup]")
    page.type("#setup-query", "api_key")
    page.wait("document.querySelectorAll('#setup-tables tr').length === 1")
    assert "(not shown)" in page.do("document.querySelector('#setup-tables').textContent")


def test_two_runs_are_compared_on_the_same_prompts(page: Page, loop: Path, tmp_path: Path) -> None:
    make_loop(tmp_path, iterations=2)
    cli.run([str(loop.parent), str(tmp_path), "-o", str(tmp_path / "both.html")])
    page.open(tmp_path / "both.html", "samples")
    changes = page.do("[...document.querySelectorAll('.cell.down')].map(own => own.textContent)")
    assert changes == ["-0.500"] * 5  # from policy 3 of the first to policy 2 of the second
    page.click("[data-view=setup]")
    page.click("#differences")
    assert page.do("document.querySelectorAll('#setup-tables tr.differs').length") > 0
    assert page.do("document.querySelectorAll('#setup-tables tbody tr:not(.differs)').length") == 0


def test_a_page_of_a_run_that_goes_on_loads_itself_again_and_stays_as_it_was(page: Page, tmp_path: Path) -> None:
    make_loop(tmp_path)
    cli.write([tmp_path], tmp_path / "page.html", samples=1000, every_s=5)
    page.open(tmp_path / "page.html", "samples")
    page.click("[data-key=mean][data-down=yes]")
    page.click(".entry .line")
    unfolded = page.on(".entry.open .prompt", "own => own.textContent")
    page.do("document.activeElement.blur()")
    page.do("window.wasHere = true")
    page.wait("window.wasHere === undefined && document.documentElement?.dataset.ready === 'yes'")
    assert page.on(".entry.open .prompt", "own => own.textContent") == unfolded
    assert page.on("[data-key=mean][data-down=yes]", "own => own.getAttribute('aria-pressed')") == "true"
    assert not page.do("document.querySelector('#samples').hidden")


def test_what_a_sample_holds_is_shown_as_text_and_runs_nothing(page: Page, tmp_path: Path) -> None:
    rows = [{**row, "input": NASTY, "output": NASTY, NASTY: NASTY, f"reward_{NASTY}": 1.0} for row in samples(1, 2)]
    write_rows(tmp_path / "iterations" / "0.jsonl", rows)
    cli.run([str(tmp_path)])
    page.open(tmp_path / "report.html", "samples")
    page.click(".entry .line")
    page.wait("document.querySelector('.details')")
    assert page.on(".details .text", "own => own.textContent") == NASTY
    assert page.on(".whole-prompt", "own => own.textContent") == NASTY
    page.click("[data-view=overview]")
    page.wait("document.querySelector('.plot[data-drawn]')")
    assert page.do("[typeof hurt, document.querySelectorAll('main img').length]") == ["undefined", 0]


@pytest.mark.parametrize("view", ["overview", "samples", "training", "setup"])
def test_a_phone_needs_no_sideways_scrolling(page: Page, loop: Path, view: str) -> None:
    page.open(loop, view, width=390, height=844)
    if view == "samples":
        page.click(".entry .line")
        page.wait("document.querySelector('.sides.two')")
    assert page.do("document.documentElement.scrollWidth") <= 390


def test_the_colours_are_those_that_the_reader_prefers(page: Page, loop: Path) -> None:
    shades = []
    for dark in (False, True):
        page.open(loop, dark=dark)
        page.wait("document.querySelector('.plot[data-drawn]')")
        ink = page.on(".plot", "own => own.layout.font.color")
        shades.append((page.on("body", "own => getComputedStyle(own).backgroundColor"), ink))
    (page_light, ink_light), (page_dark, ink_dark) = shades
    assert (page_light, ink_light) == ("rgb(246, 247, 249)", "#1b2330")
    assert (page_dark, ink_dark) == ("rgb(14, 18, 24)", "#e6e9ef")


def test_a_hundred_thousand_samples_are_sorted_searched_and_scrolled_at_once(page: Page, tmp_path: Path) -> None:
    write_rows(tmp_path / "iterations" / "0.jsonl", samples(25_000, 4))
    cli.run([str(tmp_path)])
    begin = time.monotonic()
    page.open(tmp_path / "report.html", "samples")
    opened = time.monotonic() - begin
    page.click("#by-sample")
    page.wait("document.querySelector('#count').textContent === '100,000 samples'")
    sort = "(() => {{ const begin = performance.now(); {}; return performance.now() - begin }})()"
    sorting = page.do(sort.format("sortBy('mean', true)"))
    assert first_prompt(page) == "prompt 24999: the film was"
    searching = page.do(sort.format("choice.query = 'prompt 12345'; filterAndShow()"))
    assert page.do("document.querySelector('#count').textContent") == "4 of 100,000 samples"
    page.do(sort.format("choice.query = ''; filterAndShow()"))
    scrolling = page.do(sort.format("scrollTo(0, document.documentElement.scrollHeight); show()"))
    assert page.do(f"{PROMPTS}.at(-1)") == "prompt 0: the film was"
    assert page.do("document.querySelectorAll('.entry').length") < 100
    print(
        f"opened in {opened:.2f} s, sorted {sorting:.0f} ms, searched {searching:.0f} ms, scrolled {scrolling:.0f} ms"
    )
    assert (opened < 20, sorting < 3000, searching < 3000, scrolling < 2000) == (True,) * 4  # ten times an idle core's
