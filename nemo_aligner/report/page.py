"""The page: one HTML file with its script, its charting library and its data inside, that needs no network.

Data and library are gzip in base64, whose alphabet cannot end a script element, and the browser unpacks them; each set
of samples is an element of its own, unpacked when it is looked at.
"""

from __future__ import annotations

import base64
import gzip
import html
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from nemo_aligner.algorithms.best_of import best_of_kl_bound
from nemo_aligner.data.jsonl import dump_row
from nemo_aligner.report.figures import histograms
from nemo_aligner.report.runs import Run, head_of

_SCRIPTS = (
    "data.js",
    "charts.js",
    "curves.js",
    "diff.js",
    "choose.js",
    "table.js",
    "tables.js",
    "evaluation.js",
    "main.js",
)


def page(runs: Sequence[Run], *, every_s: float | None = None) -> Iterator[str]:
    """The pieces of the page; with `every_s` it loads itself again so often, as a run that goes on is looked at."""
    title = ", ".join(run.name for run in runs)
    head = {
        "title": title,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "every_s": every_s,
        "runs": [head_of(run) for run in runs],
        **_sets(runs),
    }
    before, _, rest = _asset("page.html").partition("{{style}}")
    between, _, rest = rest.partition("{{data}}")
    titled = [piece.replace("{{title}}", html.escape(title)) for piece in (before, between)]
    yield from (titled[0], _asset("report.css"), titled[1], _element("data-head", head))
    every = (sample_set for run in runs for sample_set in run.sets)
    for number, sample_set in enumerate(every):
        yield _element(f"data-{number}", vars(sample_set.columns))
    yield f'<script type="text/plain" id="data-plotly">{_plotly()}</script>\n'
    between, _, after = rest.partition("{{script}}")
    yield from (between, "\n".join(map(_asset, _SCRIPTS)), after)


def _sets(runs: Sequence[Run]) -> dict[str, Any]:
    """Figures of all sets, by their number in the page; the histograms of a series share their bins."""
    own = [(number, sample_set) for number, run in enumerate(runs) for sample_set in run.sets]
    bins: dict[int, list[Any]] = {}
    for series in {sample_set.series for _, sample_set in own}:
        members = [sample_set for _, sample_set in own if sample_set.series == series]
        found = histograms([member.columns.reward for member in members])
        bins |= {id(member): [found["edges"], shares] for member, shares in zip(members, found["shares"], strict=True)}
    figures = []
    for run, sample_set in own:
        figures.append({"run": run, "histogram": bins[id(sample_set)], **sample_set.figures()})
        figures[-1]["best_of"] = [[n, best_of_kl_bound(n), reward] for n, reward in figures[-1]["best_of"]]
    return {"sets": figures}


def _element(identity: str, value: Mapping[str, Any]) -> str:
    return f'<script type="text/plain" id="{identity}">{_packed(dump_row(value))}</script>\n'


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs())


def _asset(name: str) -> str:
    return files("nemo_aligner.report").joinpath("assets", name).read_text(encoding="utf-8")
