"""Plots as SVG for the page, in its colours, light and dark.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; matrices use cividis. A plot is drawn
with placeholder colours, which become variables of the page's style (see report.html.jinja).
"""

import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

STAND_INS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "paper": "#040404",
    "blue": "#0072b2",
    "red": "#d55e00",
    "green": "#009e73",
    "pink": "#cc79a7",
    "amber": "#e69f00",
    "sky": "#56b4e9",
}
INK, MUTED, LINE, PAPER, *SERIES = STAND_INS.values()
MARKERS = "oDs^vP"
WIDTH = 5.0  # inches; 360 units of the page, so text is not scaled on a phone
STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.borderaxespad": 0.2,
}


@contextmanager
def drawing(
    name: str, width: float = WIDTH, height: float = 3.2, margins: dict | None = None, **subplots: Any
) -> Iterator[tuple[Any, list[Markup]]]:
    """Yield axes and a list; on exit the list contains the SVG.

    name : unique on a page, since parts of the SVG refer to each other; sizes in inches
    margins : fixed ones, which take half the time of margins fitted to the labels
    """
    made: list[Markup] = []
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
        yield figure.subplots(**subplots, gridspec_kw=margins), made
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    made.append(page_svg(buffer.getvalue()))


def page_svg(text: str) -> Markup:
    """Convert matplotlib's SVG for a page: no header, fixed size or names; the page's font and colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|legend|matplotlib\.axis|xtick|ytick|PathCollection|LineCollection|'
        r'QuadMesh|FillBetweenPolyCollection)_\d+"',
        "",
        text,
    )
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(-?\d+\.\d\d)\d+", r"\1", tag[0]), text)  # coordinates, not text
    for name, colour in STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(re.sub(r"\s*\n\s*", "\n", text))


def plain(value: float, _: object = None) -> str:
    """Format a tick plainly: 0.001, 20, 1,000, 1e-05."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def logarithmic(axis: XAxis | YAxis) -> None:
    """Make an axis logarithmic, with plain numbers, also between the powers of ten if there is room."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 50 * low else (1, 3) if high < 500 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, columns: int = 3) -> None:
    """Put the legend above the plot, where it covers nothing."""
    axes.figure.legend(loc="outside upper left", ncols=columns, handletextpad=0.4, columnspacing=1.2)


# --- kinds of plots ----------------------------------------------------------------------------------------


def mark(k: int, is_filled: bool) -> dict[str, Any]:
    """Return the style of series `k`'s marks."""
    colour = SERIES[0] if is_filled else SERIES[1 + k % (len(SERIES) - 1)]
    return {
        "marker": MARKERS[k % len(MARKERS)],
        "color": colour,
        "zorder": 4 + k,
        "linestyle": "none",
        "markersize": 5.5 if is_filled else 5,
        "markerfacecolor": colour if is_filled else PAPER,
        "markeredgewidth": 1.3,
    }


def dots(
    name: str,
    rows: list[str],
    series: dict[str, np.ndarray],
    xlabel: str,
    log: bool = False,
    intervals: ArrayLike | None = None,
    reference: float | None = None,
    filled: bool = True,
    **limits: Any,
) -> Markup:
    """Draw a line per row (a class), with a hollow mark for each series; the last one's is filled.

    rows : from top to bottom; series : label -> values, (n_rows,), NaN = none; intervals : (n_rows, 2) of the last
        series
    limits : of the axes, for example xlim
    """
    place = np.arange(len(rows))
    with drawing(name, height=0.75 + 0.205 * len(rows)) as (axes, made):
        values = np.array(list(series.values()), dtype=float)
        if len(values) > 1:
            axes.hlines(place, np.fmin.reduce(values), np.fmax.reduce(values), color=LINE, linewidth=2, zorder=1)
        if intervals is not None:
            axes.hlines(place, *np.transpose(intervals), color=SERIES[0], linewidth=2, zorder=2)
        for k, (label, row) in enumerate(zip(series, values, strict=True)):
            axes.plot(row, place, label=label, **mark(k, filled and k == len(series) - 1))
        if reference is not None:
            axes.axvline(reference, color=MUTED, linewidth=1, linestyle="--")
        axes.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6), **limits)
        axes.set_yticks(place, rows)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        if log and np.nanmax(values) > 5 * np.nanmin(values):
            logarithmic(axes.xaxis)
            axes.set_xlabel(f"{xlabel}, log scale")
        if len(series) > 1:
            legend(axes)
    return made[0]


def bars(
    name: str, labels: list[str], values: Sequence[float] | np.ndarray, xlabel: str, ylabel: str, height: float = 2.4
) -> Markup:
    """Draw one bar per label, with its value above it."""
    with drawing(name, height=height) as (axes, made):
        drawn = axes.bar(labels, values, color=SERIES[0], width=0.65)
        axes.bar_label(drawn, [plain(value) for value in values], padding=2, fontsize=8.5)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(y=0.15)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
    return made[0]


def lines(
    name: str,
    series: dict[str, tuple],
    xlabel: str,
    ylabel: str,
    height: float = 2.9,
    logx: bool = False,
    marks: dict | None = None,
    verticals: Iterable[float] = (),
    dashed: Collection[str] = (),
    **limits: Any,
) -> Markup:
    """Draw curves: label -> (x, y), or (x, y, number of the colour).

    dashed : labels drawn with dashes, not in the legend; marks : label -> (x, y) of a marked point
    verticals : places of thin lines; limits : of the axes, for example xlim
    """
    with drawing(name, height=height) as (axes, made):
        for x in verticals:
            axes.axvline(x, color=MUTED, linewidth=1, linestyle=":")
        for k, (label, (x, y, *colour)) in enumerate(series.items()):
            axes.plot(
                x,
                y,
                color=SERIES[(colour or [k])[0] % len(SERIES)],
                label=None if label in dashed else label,
                linestyle="--" if label in dashed else "-",
                marker="o" if len(x) == 1 else None,
                markersize=4,
            )
        for k, (label, (x, y)) in enumerate((marks or {}).items()):
            axes.plot([x], [y], MARKERS[k % len(MARKERS)], color=INK, markersize=6, label=label, linestyle="none")
        axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=xlabel == "epoch"))
        if logx:
            logarithmic(axes.xaxis)
        legend(axes)
    return made[0]


def matrix(name: str, values: np.ndarray, rows: list[str], label: str) -> Markup:
    """Draw a square matrix of shares from 0 to 1 in cividis, with the same names for rows and columns."""
    with drawing(name, width=8.6, height=8.0) as (axes, made):
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="cividis", vmin=0, edgecolors=PAPER, linewidth=0.8)
        axes.set_xticks(np.arange(len(rows)) + 0.5, rows, rotation=90)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.set(ylim=(len(rows), 0), aspect="equal")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(mesh, ax=axes, shrink=0.5, label=label)
        bar.outline.set_visible(False)
    return made[0]


def boxes(name: str, groups: list[str], series: dict[str, list[np.ndarray]], ylabel: str) -> Markup:
    """Draw for each group a box of each series: median, quartiles, and whiskers to the 5th and 95th percentile."""
    with drawing(name, height=3.0) as (axes, made):
        width = 0.8 / len(series)
        for k, (label, samples) in enumerate(series.items()):
            place = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * width
            drawn = axes.boxplot(
                samples,
                positions=place,
                widths=width * 0.75,
                whis=(5, 95),
                showfliers=False,
                manage_ticks=False,
                patch_artist=True,
                medianprops={"color": INK, "linewidth": 1.4},
                boxprops={"facecolor": SERIES[k], "edgecolor": "none"},
                whiskerprops={"color": MUTED},
                capprops={"color": MUTED},
            )
            drawn["boxes"][0].set_label(label)
        axes.set(ylabel=ylabel, ylim=(0, None))
        axes.set_xticks(range(len(groups)), groups)
        axes.grid(axis="x", visible=False)
        legend(axes)
    return made[0]


def class_panel(
    name: str,
    recall: np.ndarray,
    precision: np.ndarray,
    grid: np.ndarray,
    curves: dict[str, np.ndarray],
    threshold: float | None,
    base: float,
) -> Markup:
    """Draw one class's precision against recall, and beside it precision, recall and F1 against the threshold.

    grid : thresholds; curves : label -> values at them; base : share of samples that have the class
    """
    margins = {"left": 0.1, "right": 0.985, "bottom": 0.2, "top": 0.86, "wspace": 0.3}
    with drawing(name, height=2.35, margins=margins, ncols=2) as ((left, right), made):
        left.plot(recall, precision, color=SERIES[0])
        left.axhline(base, color=MUTED, linewidth=1, linestyle=":")
        left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        for k, (label, values) in enumerate(curves.items()):
            right.plot(grid, values, color=SERIES[k], label=label, linestyle=("-", "--", "-.")[k])
        if threshold is not None:
            right.axvline(threshold, color=INK, linewidth=1)
        right.set(xlabel="threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.02))
        right.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
            ncols=3,
            handlelength=1.4,
            columnspacing=0.8,
            handletextpad=0.3,
            fontsize=8,
        )
        for axes in (left, right):
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    return made[0]


def scatter(
    name: str,
    points: np.ndarray,
    kinds: Sequence[int],
    labels: Sequence[str],
    behind: np.ndarray,
    behind_kinds: Sequence[int],
) -> Markup:
    """Draw points (n, 2) in the colour and mark of their kinds, over other points (m, 2), small and pale.

    kinds, behind_kinds : of each point, places in `labels`; the last label is drawn in grey
    """
    with drawing(name, width=8.6, height=5.6) as (axes, made):
        for k, label in enumerate(labels):
            grey = k == len(labels) - 1
            colour, marker = (
                (MUTED, "o") if grey else (SERIES[k % len(SERIES)], MARKERS[k // len(SERIES) % len(MARKERS)])
            )
            own, far = points[np.asarray(kinds) == k], behind[np.asarray(behind_kinds) == k]
            axes.scatter(*far.T, s=11, color=colour, marker=marker, alpha=0.35, linewidths=0)
            axes.scatter(*own.T, s=26, color=colour, marker=marker, label=label, edgecolors=PAPER, linewidths=0.6)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        legend(axes, 4)
    return made[0]
