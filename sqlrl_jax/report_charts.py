"""Curves of the report page: numbers in, inline SVG out.

Drawn by matplotlib with text left as text and placeholder colours, which are then replaced by the page's own CSS
variables, so one drawing serves light and dark. Ids are hashed and prefixed by the chart's name: the same numbers give the
same bytes, and several charts live in one document. Left out: anything interactive, which would need a script.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sqlrl_jax.metrics import OWN

WIDE, SMALL = (430, 232), (360, 210)  # user units of the drawing; the page scales it to its column
_INK, _GRID = "#000001", "#000002"
# CSS variables of the page that a chart may use, by the placeholder that stands for each while drawing.
_VARIABLES = (
    *("training", "after", "one-turn", "rollout", "update", "push", "rest"),
    *("correct", "wrong", "malformed", "sql_error", "timeout", "overflow", "infrastructure", "prompt_too_long"),
)
_PLACEHOLDERS = {name: f"#0000{16 + i:02x}" for i, name in enumerate(_VARIABLES)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sqlrl-jax",
    "font.size": 11,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the layout is the same everywhere
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}
_OWN_CHARTS = 5
_MAX_POINTS = 150  # more steps than this are averaged in bins, or areas and bars would grow without end

Entry = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One named row of numbers over steps. `color` is one of the page's variables; NaN is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashed: bool = False
    markers: bool = False
    smooth: int = 0  # above 1: also draw the mean over this many steps, and the numbers themselves faintly


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, what it shows, and its legend as (label, CSS variable, dashed)."""

    title: str
    caption: str
    svg: Markup | None  # None: nothing was recorded
    legend: list[tuple[str, str, bool]] = field(default_factory=list)


def curve(entries: Sequence[Entry], key: str, label: str, color: str, **options: Any) -> Series:
    """One metric over the steps of metrics.jsonl's entries."""
    return Series(label, [e["step"] for e in entries], [value_of(e, key) for e in entries], color, **options)


def value_of(entry: Entry, key: str, default: float = math.nan) -> float:
    value = entry.get(key)
    return float(value) if isinstance(value, (int, float)) else default


def own_charts(train: Sequence[Entry], evals: Sequence[Entry]) -> list[Chart]:
    """The first few metrics that an environment of one's own measured."""
    names = sorted({key for entry in train for key in entry if key.startswith(OWN)})[:_OWN_CHARTS]
    charts = []
    for place, key in enumerate(names):
        title = key.removeprefix(OWN)
        lines = [
            curve(train, key, "training", "training"),
            curve(evals, f"eval/{key}", "held-out", "after", markers=True),
        ]
        charts.append(line_chart(f"own-{place}", title, "Mean over the episodes.", title, lines, zoom=True))
    return charts


def line_chart(
    name: str,
    title: str,
    caption: str,
    unit: str,
    series: Sequence[Series],
    size: tuple[int, int] = SMALL,
    zoom: bool = False,
) -> Chart:
    """Lines over training steps. A `unit` that starts with "%" shows fractions as per cent, from 0 to 100 unless `zoom`."""
    series = [s for s in series if any(math.isfinite(v) for v in s.y)]
    if not series:
        return Chart(title, caption, None)
    percent = unit.startswith("%")
    with _axes(unit, size) as (figure, axes):
        for s in series:
            _draw_line(axes, s)
        if percent and not zoom:
            axes.set_ylim(0, 1.04)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        else:
            _fit_height(axes, [v for s in series for v in s.y if math.isfinite(v)])
        _axis_formats(axes, percent)
        spoken = "; ".join(f"{s.label}: {_ends(s, percent)}" for s in series)
        svg = _svg(figure, name, f"{title}. {spoken}")
    legend = [(s.label, s.color, s.dashed) for s in series] if len(series) > 1 else []
    return Chart(title, caption, svg, legend)


def stacked_chart(
    name: str,
    title: str,
    caption: str,
    unit: str,
    series: Sequence[Series],
    bars: bool,
    size: tuple[int, int] = SMALL,
) -> Chart:
    """Series on top of each other, the first at the bottom: as areas, or as bars."""
    series = [s for s in series if any(v > 0 for v in s.y)]
    if not series:
        return Chart(title, caption, None)
    percent = unit.startswith("%")
    steps = np.asarray(series[0].x, dtype=float)
    values = np.nan_to_num(np.array([s.y for s in series], dtype=float), posinf=0.0, neginf=0.0)
    if percent:
        values = values / np.maximum(values.sum(axis=0), 1e-12)
    steps, values = _binned(steps, values)
    colors = [_PLACEHOLDERS[s.color] for s in series]
    with _axes(unit, size) as (figure, axes):
        if bars or len(steps) == 1:
            width = 0.82 * (float(np.diff(steps).min()) if len(steps) > 1 else 1.0)
            lower = np.zeros(len(steps))
            for row, color in zip(values, colors, strict=True):
                axes.bar(steps, row, width, lower, color=color)
                lower = lower + row
        else:
            axes.stackplot(steps, values, colors=colors)
            axes.margins(x=0)
        if percent:
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        else:
            _fit_height(axes, values.sum(axis=0))
        _axis_formats(axes, percent)
        shares = values.sum(axis=1) / max(values.sum(), 1e-12)
        spoken = ", ".join(f"{s.label} {share:.0%}" for s, share in zip(series, shares, strict=True))
        svg = _svg(figure, name, f"{title}. Over all steps: {spoken}")
    return Chart(title, caption, svg, [(s.label, s.color, False) for s in reversed(series)])


def _draw_line(axes: Any, s: Series) -> None:
    x, y = np.asarray(s.x, dtype=float), np.asarray(s.y, dtype=float)
    color, style = _PLACEHOLDERS[s.color], "--" if s.dashed else "-"
    mark = {"marker": "o", "markersize": 4.5} if s.markers or len(x) == 1 else {}
    if s.smooth > 1 and len(y) > s.smooth:
        axes.plot(*_binned(x, y), color=color, linewidth=1, alpha=0.35)
        y = running_mean(y, s.smooth)
    axes.plot(*_binned(x, y), style, color=color, **mark)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and up to `window - 1` before it, leaving NaN out. [N] → [N]."""
    rows = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in rows])


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal runs of steps when there are too many. steps [N], values [..., N] → [M], [..., M]."""
    size = math.ceil(len(steps) / _MAX_POINTS)
    if size <= 1:
        return steps, values
    starts = np.arange(0, len(steps), size)
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts, axis=-1) / counts


def _ends(s: Series, percent: bool) -> str:
    points = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
    first, last = ((f"{y:.0%}" if percent else f"{y:.3g}") + f" at step {x:g}" for x, y in (points[0], points[-1]))
    return first if len(points) == 1 else f"{first}, {last}"


@contextmanager
def _axes(unit: str, size: tuple[int, int]) -> Iterator[tuple[Figure, Any]]:
    with matplotlib.style.context(["default", _STYLE]):  # not the user's own matplotlibrc
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(unit, loc="left", fontsize=10.5, pad=8)
        axes.set_xlabel("training step", loc="right", fontsize=10.5)
        axes.grid(axis="y")
        axes.spines[["top", "left", "right"]].set_visible(False)
        yield figure, axes


def _fit_height(axes: Any, values: Any) -> None:
    """Round ticks from zero (or the lowest value below it) to just above the highest value."""
    low, high = min(0.0, float(np.min(values))), max(0.0, float(np.max(values)))
    ticks = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high if high > low else low + 1)
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yticks(ticks)


def _axis_formats(axes: Any, percent: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    scale = 100 if percent else 1
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{scale * value:,.6g}"))


def _svg(figure: Figure, name: str, spoken: str) -> Markup:
    """The figure as one <svg> element: page colours, no fixed size, no fonts, no metadata, ids of its own."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1", body).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for placeholder, variable in [(_INK, "chart-ink"), (_GRID, "grid"), *((v, k) for k, v in _PLACEHOLDERS.items())]:
        body = body.replace(placeholder, f"var(--{variable.replace('_', '-')})")
    body = re.sub(r">\s+<", "><", body).replace(" \n", " ")
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(spoken)}"><title>{escape(spoken)}</title>'
    return Markup(head + body.strip())
