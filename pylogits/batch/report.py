"""The report of a job: one HTML file that holds all it shows, for a screen of any width."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from pylogits.batch.metrics import BINS, LOSS_BINS, LOSS_STEP, Metrics

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --bar: #3b6ea8; --gap: #d9822b; --line: #8884; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin: 0 0 .5rem; }}
.numbers {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .5rem; padding: 0; }}
.numbers div {{ border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .75rem; }}
.numbers dt {{ font-size: .8rem; opacity: .8; }} .numbers dd {{ margin: 0; font-size: 1.15rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 2rem 1.5rem; }}
.charts {{ margin: 2rem 0; }}
figure {{ margin: 0; }} figcaption {{ font-size: .85rem; opacity: .8; }}
svg {{ width: 100%; height: auto; display: block; }} svg text {{ font-size: 11px; fill: currentColor; }}
.bar {{ fill: var(--bar); }} .gap {{ fill: none; stroke: var(--gap); stroke-width: 2; }}
.axis {{ stroke: currentColor; opacity: .5; }}
.table {{ overflow-x: auto; margin: 0 0 2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
</style>
<h1>{title}</h1>
<dl class="numbers">{numbers}</dl>
{sections}
</html>
"""

# Of a chart, in the units of its own picture.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 220, 60, 34, 12

# Classes in the table of classes.
CLASSES = 30


def to_html(title: str, numbers: dict[str, str], metrics: Metrics) -> str:
    """Return the report as HTML: numbers by name, then what the metrics hold."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers.items())
    charts = [confidence_chart(metrics)]
    tables = []
    if metrics.labelled_rows:
        charts = [reliability_chart(metrics), *charts, loss_chart(metrics)]
        tables = [confusion_table(metrics), worst_table(metrics)]
    tables.append(class_table(metrics))
    sections = f'<div class="charts">{"".join(charts)}</div>{"".join(tables)}'
    return PAGE.format(title=escape(title), numbers=cells, sections=sections)


# ---- charts ----


def bar_chart(
    title: str, caption: str, heights: Sequence[float], end: float, axes: tuple[str, str], marks: Sequence[float] = ()
) -> str:
    """Draw bars of equal widths from 0 to `end`; a mark at another height, unless it is 0, goes with each."""
    top = max([*heights, *marks, 0.0]) or 1.0
    right = WIDTH - 8
    base = HEIGHT - BOTTOM
    step = (right - LEFT) / max(len(heights), 1)
    shapes = []
    for i, height in enumerate(heights):
        tall = (base - TOP) * height / top
        x = LEFT + i * step
        shapes.append(f'<rect class="bar" x="{x + 0.5:.1f}" y="{base - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"/>')
    for i, mark in enumerate(marks):
        if not mark:
            continue
        y = base - (base - TOP) * mark / top
        shapes.append(f'<path class="gap" d="M{LEFT + i * step:.1f} {y:.1f}h{step:.1f}"/>')
    for share in (0.0, 0.5, 1.0):
        y = base - (base - TOP) * share
        shapes.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{top * share:.3g}</text>')
        x = LEFT + (right - LEFT) * share
        shapes.append(f'<text x="{x:.1f}" y="{base + 14}" text-anchor="middle">{end * share:.3g}</text>')
    shapes.append(f'<path class="axis" d="M{LEFT} {TOP}V{base}H{right}" fill="none"/>')
    shapes.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{axes[0]}</text>')
    shapes.append(f'<text transform="translate(10 {base / 2:.0f}) rotate(-90)" text-anchor="middle">{axes[1]}</text>')
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(shapes)}</svg>'
    return f"<figure><h2>{title}</h2>{picture}<figcaption>{caption}</figcaption></figure>"


def reliability_chart(metrics: Metrics) -> str:
    """Draw accuracy over confidence, with the mean confidence as marks."""
    rows = np.maximum(metrics.bin_rows, 1)
    return bar_chart(
        "Reliability",
        "Bars: the accuracy of the rows whose confidence lies in each range. Lines: their mean confidence, where the bars of a "
        "calibrated model end.",
        (metrics.bin_correct / rows).tolist(),
        1,
        ("confidence", "accuracy"),
        (metrics.bin_confidence / rows).tolist(),
    )


def confidence_chart(metrics: Metrics) -> str:
    """Draw the numbers of rows over confidence."""
    shares = (metrics.bin_rows / max(metrics.rows, 1)).tolist()
    return bar_chart(
        "Confidence", f"The share of rows in each of {BINS} ranges of confidence.", shares, 1, ("confidence", "share of rows")
    )


def loss_chart(metrics: Metrics) -> str:
    """Draw the numbers of rows over the loss, as far as there are any."""
    last = int(np.flatnonzero(metrics.loss_rows)[-1]) + 1 if metrics.loss_rows.any() else 1
    shares = (metrics.loss_rows[:last] / metrics.labelled_rows).tolist()
    return bar_chart(
        "Loss",
        f"The share of rows in each step of {LOSS_STEP} nats; all beyond {(LOSS_BINS - 1) * LOSS_STEP:g} is in the last.",
        shares,
        last * LOSS_STEP,
        ("loss", "share of rows"),
    )


# ---- tables ----


def html_table(title: str, head: Iterable[str], rows: Iterable[Iterable[object]], caption: str = "") -> str:
    """Return a table, which scrolls on its own where the screen is narrower."""
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<div class="table"><h2>{title}</h2><table><tr>{top}</tr>{body}</table>{note}</div>'


def confusion_table(metrics: Metrics) -> str:
    """List the commonest mistakes."""
    rows = [(target, prediction, count) for count, target, prediction in metrics.confusions(20)]
    error = metrics.pairs.error
    caption = f"Counted in bounded memory: each may be too low by up to {error}." if error else ""
    return html_table("Commonest confusions", ("target", "prediction", "rows"), rows, caption)


def worst_table(metrics: Metrics) -> str:
    """List the rows of the largest losses."""
    rows = [
        (name, row, target, prediction, f"{confidence:.4g}", f"{loss:.4g}")
        for loss, name, row, target, prediction, confidence in metrics.worst
    ]
    return html_table("Rows of the largest losses", ("file", "row", "target", "prediction", "confidence", "loss"), rows)


def class_table(metrics: Metrics) -> str:
    """List the commonest classes."""
    counts = metrics.target_rows if metrics.labelled_rows else metrics.prediction_rows
    order = np.argsort(-counts, kind="stable")[:CLASSES]
    if not metrics.labelled_rows:
        return html_table("Classes", ("class", "predictions"), ((c, metrics.prediction_rows[c]) for c in order))
    rows = ((c, counts[c], metrics.prediction_rows[c], f"{metrics.correct_rows[c] / max(counts[c], 1):.4g}") for c in order)
    more = f"The {CLASSES} commonest of {metrics.classes}." if metrics.classes > CLASSES else ""
    return html_table("Classes", ("class", "rows", "predictions", "recall"), rows, more)
