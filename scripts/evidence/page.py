"""The table, the figure and the page of a comparison."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_aligner.files import write_atomically
from scripts.evidence.estimates import Interval, Point, Reference
from scripts.evidence.methods import Method
from scripts.evidence.scores import REWARDS
from scripts.evidence.words import shown
from scripts.quickstart.report import save

COLORS = {"rs": "tab:blue", "rest": "tab:green", "dt": "tab:purple", "reinforce": "tab:red"}
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^v"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } img { max-width: 100% }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
p { margin: .2rem 0 } .wide { overflow-x: auto }
"""


def table_rows(
    methods: Sequence[Method], points: Sequence[Point], reference: Reference, seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a method, at the end of its training; `seconds` are those of a CPU core, the mean over seeds."""
    titles = {method.name: method.title for method in methods}
    rows: list[dict[str, Any]] = []
    for point in {point.method: point for point in points}.values():
        line = reference.at("reward", point.kl.mean)
        gain, spent = point.gains["reward"], seconds[point.method]
        rows.append(
            {
                "method": titles[point.method],
                "responses": round(point.responses),
                "generated tokens": round(point.generated_tokens),
                "KL": point.kl.mean,
                **{name: point.gains[name] for name in REWARDS},
                "best-of-n at this KL": line,
                "CPU seconds": round(spent),
                "CPU seconds a unit of reward": round(spent / gain.mean) if gain.sign > 0 else None,
            }
        )
    return rows


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Interval):
        return shown(value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[Mapping[str, Any]], said: Sequence[tuple[str, list[str]]]) -> str:
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell(row[name]) for name in head)} |" for row in rows]
    for heading, sentences in said:
        lines += ["", f"**{heading}**", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"


def banded(panel: Any, x: Sequence[float], values: Sequence[Interval], *, alpha: float, **style: Any) -> None:
    """A line through the means, in a band between the ends."""
    [line] = panel.plot(x, [value.mean for value in values], **style)
    low, high = ([getattr(value, end) for value in values] for end in ("low", "high"))
    panel.fill_between(x, low, high, color=line.get_color(), alpha=alpha, linewidth=0)


def figure(methods: Sequence[Method], points: Sequence[Point], reference: Reference, path: Path) -> None:
    """Gain of each reward against KL and against generated tokens; bands are intervals, the black line best-of-n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(len(REWARDS), 2, figsize=(13, 4.2 * len(REWARDS)), sharey="row", sharex="col")
    count: dict[str, int] = {}
    for method in methods:
        own = [point for point in points if point.method == method.name]
        if not own:
            continue
        number = count[method.family] = count.get(method.family, -1) + 1
        style = {
            "color": COLORS[method.family],
            "linestyle": STYLES[number % len(STYLES)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
        }
        at = ([0.0, *(p.kl.mean for p in own)], [0.0, *(p.generated_tokens for p in own)])
        for row, name in enumerate(REWARDS):
            bounds = [Interval(0.0, 0.0, 0.0), *(point.gains[name] for point in own)]
            for column, x in enumerate(at):
                banded(axes[row][column], x, bounds, alpha=0.07, label=method.title, **style)
    for row, (name, called) in enumerate(REWARDS.items()):
        axes[row][0].plot(reference.kl, reference.gains[name], color="black", label="best-of-n of the start model")
        axes[row][0].set_ylabel(f"gain in {name}\n({called})", fontsize=8)
        for panel in axes[row]:
            panel.axhline(0, color="gray", linewidth=0.5)
            panel.grid(alpha=0.3)
    axes[-1][0].set_xlabel("KL to the start model (nats a response)")
    axes[-1][1].set_xlabel("tokens generated in training")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncols=4, fontsize=8)
    drawn.tight_layout(rect=(0, 0.06, 1, 1))
    save(drawn, path)


def page(rows: Sequence[Mapping[str, Any]], said: Sequence[tuple[str, list[str]]], image: Path) -> str:
    """One HTML file that needs no network."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell(v))}</td>' for v in row.values())}</tr>" for row in rows)
    text = "".join(
        f"<h2>{html.escape(heading)}</h2>{''.join(f'<p>{html.escape(sentence)}</p>' for sentence in sentences)}"
        for heading, sentences in said
    )
    meaning = "; ".join(f"{name}: {called}" for name, called in REWARDS.items())
    picture = base64.b64encode(image.read_bytes()).decode()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>The methods compared</title>'
        f"<style>{STYLE}</style></head><body><h1>The methods compared</h1>"
        "<p>All rewards are gains over the start model on held-out prompts, "
        f"with their 95 % intervals. {html.escape(meaning)}.</p>"
        f'<img alt="Gain of each reward against KL and against generated tokens" src="data:image/png;base64,{picture}">'
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{text}</body></html>\n'
    )


def write(folder: Path, rows: Sequence[Mapping[str, Any]], said: Sequence[tuple[str, list[str]]]) -> None:
    """summary.md and report.html, which holds figure.png."""
    write_atomically(folder / "summary.md", [markdown(rows, said)])
    write_atomically(folder / "report.html", [page(rows, said, folder / "figure.png")])
