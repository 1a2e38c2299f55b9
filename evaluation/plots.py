"""The Pareto plot: quality against cost, marker area = memory, the front drawn, labels that do not
overlap; and curves."""

import itertools
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from lissom.evaluation.statistics import pareto_front

WIDTH, HEIGHT, DPI = 8.0, 5.4, 130
BLUE, GREY, DARK = "#2f6db5", "#8a8a8a", "#222222"
BEYOND = 30  # times the points' range: further off no level is drawn on a log axis
STYLES = ("o-", "s-", "^--", "D:")  # of curves
CROSSING, ASTRAY, PADDING = 60.0, 30.0, 4.0  # pixels
NAMED = 24  # points of a panel that all have labels
SMALLEST, LARGEST, UNSIZED = 30.0, 420.0, 60.0  # marker areas in square points


@dataclass(frozen=True)
class Point:
    """One line of the table, in the units of the axis labels; `size` in bytes; None is unknown."""

    label: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None
    size: float | None = None


@dataclass(frozen=True)
class Panel:
    """One task. `directions` say which way of x and y is better; `levels` are (name, y) of lines without an x; `most`
    is the largest y that there can be (100 of a percentage, and then 0 is the least): no interval is drawn beyond."""

    title: str
    subtitle: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    directions: tuple[str, str] = ("lower", "higher")
    size_name: str = ""
    levels: tuple[tuple[str, float], ...] = ()
    most: float | None = None


def pareto_plot(panels: Sequence[Panel], path: str | os.PathLike) -> list[list[Bbox]]:
    """Writes the PNG; returns the label boxes of each panel in pixels, which do not overlap. Of a panel of more than
    `NAMED` points those of the front alone have labels."""
    if not panels:
        raise ValueError("nothing to plot")
    most = max(len(_named(panel)) for panel in panels)
    # Twelve labels fit well at the plain height; beyond, and when placement fails, the picture grows.
    for growth in (1.0, 1.3, 1.7, 2.2):
        height = (HEIGHT + 0.12 * max(most - 12, 0)) * growth
        figure = Figure(figsize=(WIDTH, height * len(panels)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        with matplotlib.rc_context({"font.size": 10}):
            for axis, panel in zip(axes, panels):
                _draw(axis, panel)
            figure.draw_without_rendering()  # settles the layout, so that extents in pixels are final
            figure.set_layout_engine("none")
            boxes = [_place_labels(figure, axis, panel) for axis, panel in zip(axes, panels)]
        if all(found is not None for found in boxes):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="png")
            return boxes
    raise ValueError(f"{most} labels do not fit into one plot: shorten the variant labels, or plot fewer rows")


def _named(panel: Panel) -> list[int]:
    """Which points have labels."""
    if len(panel.points) <= NAMED:
        return list(range(len(panel.points)))
    return pareto_front([(p.x, p.y) for p in panel.points], panel.directions)


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in order, each with its spread (x_error, y_error), 0 where it has none; of one point a marker."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]


def curve_plot(
    panels: Mapping[str, Sequence[Curve]],
    path: str | os.PathLike,
    *,
    x_label: str,
    y_label: str,
    x_scale: str = "linear",
) -> None:
    """Writes the PNG: under each title its curves, side by side in panels of one y axis; curves of one label look alike
    in all of them. x_scale: "linear" or "log"."""
    if not panels or not all(panels.values()):
        raise ValueError("nothing to plot")
    looks, shown = curve_looks(panels), {}
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 3.4 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis, (title, curves) in itertools.zip_longest(axes, panels.items(), fillvalue=(None, ())):
        if title is None:
            axis.set_axis_off()
            continue
        for curve in curves:
            x, y, x_error, y_error = zip(*curve.points, strict=True)
            color, style = looks[curve.label]
            fmt, size = (style, 4) if len(x) > 1 else ("*", 9)
            shown[curve.label] = axis.errorbar(x, y, y_error, x_error, fmt=fmt, color=color, ms=size, lw=1.3)
        axis.set_title(title, fontsize=9, loc="left", wrap=True)
        axis.set_xlabel(x_label)
        axis.set_xscale(x_scale)
        axis.grid(True, color="#e4e4e4", lw=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel(y_label)
    figure.legend([shown[label] for label in looks], looks, loc="outside right upper", frameon=False, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def curve_looks(panels: Mapping[str, Sequence[Curve]]) -> dict[str, tuple[str, str]]:
    """{label: (color, style)}, in the order in which the panel of most curves has them."""
    labels = dict.fromkeys(curve.label for curves in sorted(panels.values(), key=len, reverse=True) for curve in curves)
    return {label: (f"C{n % 10}", style) for n, (label, style) in enumerate(zip(labels, itertools.cycle(STYLES)))}


def marker_area(size: float | None, largest: float) -> float:
    """Area in square points, proportional to the size, but never too small to see."""
    return UNSIZED if size is None else max(LARGEST * size / largest, SMALLEST)


def _draw(axis, panel: Panel) -> None:
    points = panel.points
    largest = max((p.size for p in points if p.size), default=1.0)
    front = pareto_front([(p.x, p.y) for p in points], panel.directions)
    axis.set_xscale("log")
    low, high = min(p.y for p in points), max(p.y for p in points)
    # Errors and losses may span decades; a share of correct answers is read on a linear axis.
    decades = panel.directions[1] == "lower" and low > 0 and high / low > 20
    if decades:
        axis.set_yscale("log")
    axis.plot([points[i].x for i in front], [points[i].y for i in front], color=BLUE, alpha=0.5, lw=1.5, zorder=1)
    for index, p in enumerate(points):
        color = BLUE if index in front else GREY
        # What reaches below 0 cannot be drawn on a log axis: it ends just above.
        least, most = (-math.inf, math.inf) if panel.most is None else (0.0, panel.most)
        x_error = _interval(p.x, p.x_error, 0.1 * p.x, math.inf)
        y_error = _interval(p.y, p.y_error, 0.1 * p.y if decades else least, most)
        axis.errorbar(p.x, p.y, xerr=x_error, yerr=y_error, fmt="none", ecolor=color, elinewidth=1, alpha=0.7)
        face = color if p.size is not None else "white"
        area = marker_area(p.size, largest)
        axis.scatter(
            p.x, p.y, s=area, color=face, edgecolors=DARK if p.size else color, linewidths=0.8, alpha=0.8, zorder=3
        )
    for (name, y), style in zip(panel.levels, itertools.cycle([":", "--", "-.", (0, (4, 1, 1, 1, 1, 1))])):
        if decades and not low / BEYOND <= y <= high * BEYOND:  # an exact solution's error would flatten all others
            axis.plot([], [], color=GREY, ls=style, lw=1.2, label=f"{name}: {y:.1g}, off the axis")
        else:
            axis.axhline(y, color=GREY, ls=style, lw=1.2, zorder=0, label=name)
    axis.set_xlabel(textwrap.fill(panel.x_label, 44))  # a longer line is cut off at the left
    axis.set_ylabel(panel.y_label)
    if panel.directions[1] == "lower":
        axis.invert_yaxis()
        axis.set_ylabel(f"{panel.y_label} (better is up)")
    _limits(axis, points)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(_sparse(axis))
    axis.tick_params(axis="x", which="both", length=4, pad=4)
    axis.grid(True, which="major", color="#e4e4e4", lw=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{panel.title}\n{panel.subtitle}", fontsize=11, loc="left", wrap=True)
    _legend(axis, panel, largest)


def _interval(value: float, error: float | None, least: float, most: float) -> list[list[float]] | None:
    """Lengths below and above, of which neither leaves least .. most."""
    return None if error is None else [[min(error, value - least)], [min(error, most - value)]]


def _limits(axis, points: Sequence[Point]) -> None:
    """Room around the points for their labels; at least a factor of 2 along x, so that noise is not blown
    up."""
    low, high = min(p.x for p in points), max(p.x for p in points)
    margin = max((high / low) ** 0.15, (2 * low / high) ** 0.5, 1.15)
    axis.set_xlim(low / margin, high * margin)
    axis.margins(y=0.15)


def _sparse(axis):
    """Labels 2 and 5 between the powers of ten, and 3, 4, 6, ... only where less than a decade is seen."""

    def text(value: float, _) -> str:
        low, high = axis.get_xlim()
        first = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
        return f"{value:g}" if first in (2, 5) or (high / low < 5 and first in (3, 4, 6, 8)) else ""

    return text


def _legend(axis, panel: Panel, largest: float) -> None:
    alone = "" if len(_named(panel)) == len(panel.points) else "\n(alone named)"
    handles = [Line2D([], [], color=BLUE, alpha=0.5, lw=1.5, label=f"Pareto front{alone}")]
    handles += axis.get_legend_handles_labels()[0]
    if any(p.size is not None for p in panel.points):
        # A heading inside the list: a legend title would seem to speak of the front and the levels too.
        handles.append(Line2D([], [], ls="", label="\n" + panel.size_name.replace(", ", ",\n")))
        sizes = dict.fromkeys(_round(largest * share) for share in (0.1, 0.5, 1.0))
        for size in sizes:
            side = math.sqrt(marker_area(size, largest))
            handles.append(
                Line2D([], [], ls="", marker="o", ms=side, mfc=GREY, mec=DARK, alpha=0.8, label=_bytes(size))
            )
    if any(p.size is None for p in panel.points):
        handles.append(
            Line2D([], [], ls="", marker="o", ms=math.sqrt(UNSIZED), mfc="white", mec=GREY, label="memory unknown")
        )
    # Beside the axes: inside, it would cover points or take the labels' room.
    axis.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, labelspacing=1.1
    )


def _round(size: float) -> float:
    """Two significant digits."""
    digits = math.floor(math.log10(size)) - 1
    return round(size / 10**digits) * 10**digits


def _bytes(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.3g} B"


# ---- labels
# --------------------------------------------------------------------------------------------------


def _place_labels(figure, axis, panel: Panel) -> list[Bbox] | None:
    """Puts each label at the nearest free place around its point; None when one of them finds none.

    Free means: inside the axes, touching no label placed before and no marker. Leader lines avoid labels where they
    can. Crowded points go first.
    """
    renderer = figure.canvas.get_renderer()
    pixels = [tuple(axis.transData.transform((p.x, p.y))) for p in panel.points]
    largest = max((p.size for p in panel.points if p.size), default=1.0)
    radii = [math.sqrt(marker_area(p.size, largest)) / 2 * DPI / 72 + 1 for p in panel.points]
    markers = [Bbox.from_extents(x - r, y - r, x + r, y + r) for (x, y), r in zip(pixels, radii)]
    crowding = [sum(math.dist(a, b) < 80 for b in pixels) for a in pixels]
    frame, boxes, leaders = axis.get_window_extent(renderer), {}, []
    named = _named(panel)
    for index in sorted(named, key=lambda i: -crowding[i]):
        label = panel.points[index].label
        text = axis.text(0, 0, label, fontsize=9, color=DARK, transform=None, va="bottom", ha="left", zorder=5)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable across front and error bars
        extent = text.get_window_extent(renderer).padded(PADDING, 0)
        others = [(pixels[i], radii[i]) for i in range(len(pixels)) if i != index]
        found = _best_place(pixels[index], radii[index], extent, frame, markers, list(boxes.values()), leaders, others)
        if found is None:
            return None
        box, leader = found
        text.set_position((box.x0 - extent.x0, box.y0 - extent.y0))  # the text was measured at 0, 0
        boxes[index] = box
        if leader:
            leaders += leader
            xs, ys = zip(leader[0], leader[-1])
            axis.add_line(Line2D(xs, ys, transform=None, color=DARK, lw=0.6, marker="o", ms=2, markevery=[0], zorder=4))
    return [boxes[index] for index in named]


def _best_place(center, radius: float, extent: Bbox, frame: Bbox, markers, placed, leaders, others):
    """(box, leader line) of the nearest free place, where a crossing costs as much as CROSSING pixels of distance,
    and standing as near to one of the `others` (center, radius) as to its own marker as much as ASTRAY.

    Leader lines are given as points along them. None when no place inside the axes is free.
    """
    best, lowest = None, math.inf
    lines, extents = np.reshape(leaders, (-1, 2)), np.reshape([other.extents for other in placed], (-1, 4))
    for distance, box in _free_places(center, radius, extent.width, extent.height, frame, [*markers, *placed]):
        if distance >= lowest:  # places come in order of distance, and crossings only add to it
            break
        own = _gap(center, radius, box) + PADDING
        astray = any(_gap(*other, box) <= own for other in others)
        leader = _leader(center, radius, box, astray)
        # In arrays: with thirty labels this is where the time goes.
        crossed = int(_inside(lines, box.extents).any()) + int(_inside(leader, extents).any(1).sum())
        cost = distance + CROSSING * crossed + ASTRAY * astray
        if cost < lowest:
            best, lowest = (box, leader), cost
    return best


def _inside(points, extents) -> np.ndarray:
    """Whether points [P, 2] lie in boxes [..., 4] of (x0, y0, x1, y1): bool [..., P]."""
    x, y = np.reshape(points, (-1, 2)).T
    x0, y0, x1, y1 = np.moveaxis(np.asarray(extents)[..., None], -2, 0)
    return (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)


def _gap(center, radius: float, box: Bbox) -> float:
    """Pixels between the rim of a marker and a box."""
    x, y = center
    return math.dist((x, y), (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))) - radius


def _free_places(
    center, radius: float, width: float, height: float, frame: Bbox, taken
) -> Iterator[tuple[float, Bbox]]:
    """(distance, box) of the free boxes of this size around the point, near ones first, right before left and above."""
    x, y = center
    beside = radius + 4
    near = [(x + beside, y - height / 2), (x - beside - width, y - height / 2)]
    near += [(x - width / 2, y + beside), (x - width / 2, y - beside - height)]
    columns = np.arange(frame.x0, frame.x1 - width, 9.0)
    levels = np.arange(frame.y0, frame.y1 - height, 5.0)
    grid = np.stack(np.meshgrid(columns, levels), -1).reshape(-1, 2)
    corners = np.concatenate([np.asarray(near), grid])
    x0, y0, x1, y1 = corners[:, 0], corners[:, 1], corners[:, 0] + width, corners[:, 1] + height
    free = (x0 >= frame.x0) & (x1 <= frame.x1) & (y0 >= frame.y0) & (y1 <= frame.y1)
    for other in taken:
        free &= ~((x0 < other.x1) & (other.x0 < x1) & (y0 < other.y1) & (other.y0 < y1))
    distance = np.hypot(np.clip(x, x0, x1) - x, np.clip(y, y0, y1) - y)
    distance[4:] += 6  # beside its marker a label needs no leader line
    for index in np.argsort(distance, kind="stable"):
        if free[index]:
            yield float(distance[index]), Bbox.from_extents(x0[index], y0[index], x1[index], y1[index])


def overlap(a: Bbox, b: Bbox) -> bool:
    """Whether two boxes share more than an edge."""
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def _leader(center, radius: float, box: Bbox, astray: bool) -> list[tuple[float, float]]:
    """Points from the marker's centre to the label; none where the label stands right beside its marker, unless it
    could be taken for that of another one.

    It starts at the centre, since at the rim of one of several markers that cover each other it would belong to none.
    """
    x, y = center
    near_x, near_y = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
    distance = math.dist((x, y), (near_x, near_y))
    if distance <= radius + 6 and not astray:
        return []
    count = max(round(distance / 2), 2)
    return [(x + (near_x - x) * i / count, y + (near_y - y) * i / count) for i in range(count + 1)]
