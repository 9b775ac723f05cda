"""The report's pictures: a record in, PNG bytes out. Matplotlib without a display; no files, no global state kept.

Rules enforced here:

* colours mean the same everywhere and stay apart for colour-blind readers: blue is clean or repaired, orange is
  triggered or attacked; hatching or words say it a second time;
* a value that is not a finite number draws nothing and is written as "not available";
* texts come from outside: they are never read as formulas, and no label covers another.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from PIL import Image

from edgeguard.contract.scores import THRESHOLD
from edgeguard.demo.record import Event, Record

MISSING = "not available"

_LOWEST, _HIGHEST = 1e-3, 1e5
_ROW = 0.21
"""Height of one row of the timeline in inches."""
_GAP = 0.09
"""Distance in inches between a marker and its text, and between a text and the next marker."""
_PADDING = 0.6
"""Height of the space between two lanes of the timeline in rows."""
_SMALL = 8.5
"""Font size of the timeline's texts in points."""
_MAX_LANES = 12
_ROLES = ("demo", "attacker", "hub")
"""Actors whose lanes come first; those of the devices follow."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one appearance. ``blue`` and ``orange`` carry meaning, ``grey`` is neutral."""

    ink: str
    muted: str
    paper: str
    grid: str
    blue: str
    orange: str
    grey: str


LIGHT = Theme(
    ink="#1b1f24", muted="#57606a", paper="#ffffff", grid="#d8dee4", blue="#0b62a8", orange="#d35400", grey="#8c959f"
)
DARK = Theme(
    ink="#e6edf3", muted="#9aa4ae", paper="#161b21", grid="#353c44", blue="#58a6ff", orange="#f5923e", grey="#7d8590"
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How large a plot is drawn: ``width`` in inches, ``font`` in points. A narrow one is for telephones."""

    theme: Theme
    width: float
    dpi: int
    font: float = 10

    @property
    def narrow(self) -> bool:
        """True below six inches."""
        return self.width < 6


WIDE = Form(theme=LIGHT, width=10.0, dpi=150)
HALF = Form(theme=LIGHT, width=6.0, dpi=150, font=11.5)
NARROW = Form(theme=LIGHT, width=3.5, dpi=200)


def plain(text: str, longest: int = 10_000) -> str:
    """``text`` on one line, printable characters only, cut to ``longest`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def percent(value: float) -> str:
    """A share as a percentage with one digit, or "not available"."""
    return f"{value:.1%}" if math.isfinite(value) else MISSING


def picture(pixels: npt.NDArray[np.uint8]) -> bytes:
    """One image ``[H, W, C]`` as PNG, pixel by pixel."""
    buffer = io.BytesIO()
    Image.fromarray(_visible(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def scores(record: Record, form: Form) -> bytes:
    """Histogram of the joint scores of clean and triggered inputs on a log axis, the threshold marked."""
    with _figure(form, 4.0 if form.narrow else 3.7) as figure:
        _draw_scores(figure.add_subplot(), record, form.theme)
        return _png(figure, form)


def before_after(record: Record, form: Form) -> bytes:
    """Bars: clean accuracy and attack success rate of the int8 files, before and after the repair."""
    with _figure(form, 2.3) as figure:
        _draw_before_after(figure.add_subplot(), record, form.theme)
        return _png(figure, form)


def latency(record: Record, form: Form) -> bytes:
    """Bars: median latency of the bare and of the guarded model."""
    with _figure(form, 1.5) as figure:
        _draw_latency(figure.add_subplot(), record, form.theme)
        return _png(figure, form)


def timeline(record: Record, form: Form) -> bytes:
    """One lane per actor over time. Events bear their number in the record; a wide plot also writes what happened."""
    with _settings(form):
        left = min(
            1.6, 0.2 + max((_text_width(lane, form.font) for lane in _lanes(record.timeline).values()), default=0.5)
        )
        span = form.width - left - 0.25
        lanes = _arrange(record.timeline, span, size=_SMALL, words=0 if form.narrow else 56, most_rows=10)
        height = _ROW * _rows(lanes) + 0.6
    with _figure(form, max(1.2, height), constrained=False) as figure:
        axes = figure.add_axes((left / form.width, 0.5 / height, span / form.width, 1 - 0.55 / height))
        _draw_timeline(axes, record.timeline, lanes, form.theme, _SMALL)
        return _png(figure, form)


def overview(record: Record) -> bytes:
    """The whole run in one picture of 1600 x 900: samples, scores, before and after, timeline."""
    form = Form(theme=LIGHT, width=16.0, dpi=100, font=12.5)
    m = record.metrics
    with _figure(form, 9.0, constrained=False) as figure:
        figure.text(0.02, 0.945, f"EdgeGuard demo on {plain(m.data, 40)}", size=22, weight="bold")
        about = f"{plain(record.attack, 40)}, target label {plain(record.target, 24)}, {m.devices} devices"
        figure.text(0.98, 0.948, about, size=14, ha="right", color=LIGHT.muted)
        for x, y, title in (
            (0.02, 0.885, "Inputs, and what the model calls them"),
            (0.375, 0.885, f"Scores: AUROC {_number(m.auroc)}, TPR {percent(m.tpr)}, FPR {percent(m.fpr)}"),
            (0.72, 0.885, "The int8 model, before and after"),
            (0.02, 0.455, "The loop"),
        ):
            figure.text(x, y, title, size=14, weight="bold")
        _draw_samples(figure, record, (0.085, 0.58, 0.25, 0.28))
        _draw_scores(figure.add_axes((0.415, 0.565, 0.265, 0.225)), record, LIGHT)
        _draw_before_after(figure.add_axes((0.80, 0.565, 0.18, 0.295)), record, LIGHT)
        left, span = 0.085, 0.895
        for rows in (6, 5, 4, 3, 2, 1):  # as many as there is height for; six lanes of one row always fit
            lanes = _arrange(
                record.timeline, form.width * span, size=11.5, words=60, numbers=False, most_rows=rows, most_lanes=6
            )
            if _rows(lanes) <= 19:
                break
        _draw_timeline(figure.add_axes((left, 0.075, span, 0.365)), record.timeline, lanes, LIGHT, size=11.5)
        return _png(figure, form)


@dataclass(frozen=True)
class Label:
    """Where one event stands: seconds, its number, its text, and on which side of the marker the text is.

    ``row`` is None for an event whose text found no room: a tick at the lane's upper edge stands for it.
    """

    at_s: float
    number: int
    text: str
    row: int | None
    leftwards: bool


@dataclass(frozen=True)
class Lane:
    """One actor's events and the number of rows that they need."""

    actor: str
    labels: tuple[Label, ...]
    rows: int


def pack(intervals: Sequence[tuple[float, float]], gap: float) -> list[int]:
    """The lowest row for each interval (start, end) in which it keeps ``gap`` from those placed before it."""
    rows: list[list[tuple[float, float]]] = []
    chosen = []
    for start, end in intervals:
        free = (i for i, row in enumerate(rows) if all(start >= e + gap or end + gap <= s for s, e in row))
        index = next(free, len(rows))
        if index == len(rows):
            rows.append([])
        rows[index].append((start, end))
        chosen.append(index)
    return chosen


@contextmanager
def _settings(form: Form) -> Iterator[None]:
    theme = form.theme
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "font.size": form.font,
        "text.color": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.paper,
        "axes.labelcolor": theme.muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.facecolor": theme.paper,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
    }
    with rc_context(settings), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box; the page beside the picture has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@contextmanager
def _figure(form: Form, height: float, *, constrained: bool = True) -> Iterator[Figure]:
    """A figure with its own canvas: pyplot would keep it, and would look for a display."""
    with _settings(form):
        figure = Figure(figsize=(form.width, height), layout="constrained" if constrained else None)
        FigureCanvasAgg(figure)
        yield figure


def _png(figure: Figure, form: Form) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=form.dpi, metadata={"Software": None})
    return buffer.getvalue()


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else MISSING


def _visible(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """``[H, W, C]`` as grey ``[H, W]`` or colour ``[H, W, 3]``."""
    return np.ascontiguousarray(pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0])


def _say(axes: Axes, text: str, theme: Theme) -> None:
    """Words in the place of a plot."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=theme.muted)


def _draw_scores(axes: Axes, record: Record, theme: Theme) -> None:
    groups = (
        ("clean", record.clean_scores, theme.blue, ""),
        ("triggered", record.triggered_scores, theme.orange, "////"),
    )
    checked = [np.clip(values[~np.isnan(values)], _LOWEST, _HIGHEST) for _, values, _, _ in groups]
    if not sum(map(len, checked)):
        _say(axes, MISSING, theme)
        return
    every = np.concatenate([*checked, [0.5 * THRESHOLD, 2.0 * THRESHOLD]])
    steps = 20  # a decade; the threshold of 1 is an edge, so no bar stands on both sides of it
    first, last = math.floor(math.log10(every.min()) * steps), math.floor(math.log10(every.max()) * steps) + 1
    edges = 10.0 ** (np.arange(first, last + 1) / steps)
    for (name, values, colour, hatch), known in zip(groups, checked, strict=True):
        unchecked = len(values) - len(known)
        above = int(np.count_nonzero(known > THRESHOLD))
        label = f"{name}: n = {len(values)}, {above} above 1" + (f", {unchecked} not checked" if unchecked else "")
        axes.hist(
            known,
            edges.tolist(),
            weights=np.full(len(known), 1.0 / max(1, len(known))),
            histtype="stepfilled",
            facecolor=(colour, 0.35),
            edgecolor=colour,
            linewidth=1.3,
            hatch=hatch,
            label=label,
        )
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    if last - first <= 3 * steps:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y")
    axes.axvline(THRESHOLD, color=theme.ink, linewidth=1.4, linestyle="--", label="threshold: above 1 is flagged")
    axes.set_xlabel("joint score (log scale)")
    axes.set_ylabel("share of its inputs")
    # Above the axes, so that it covers neither a bar nor the threshold.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small", borderaxespad=0.2, labelspacing=0.3)


def _draw_before_after(axes: Axes, record: Record, theme: Theme) -> None:
    m = record.metrics
    bars = (
        (1.21, m.clean_accuracy_before, "before", theme.orange, "////"),
        (0.83, m.clean_accuracy_after, "after", theme.blue, ""),
        (0.21, m.asr_before, "before", theme.orange, "////"),
        (-0.17, m.asr_after, "after", theme.blue, ""),
    )
    for y, value, name, colour, hatch in bars:
        known = value if math.isfinite(value) else 0.0
        axes.barh(y, known, 0.34, facecolor=(colour, 0.45), edgecolor=colour, hatch=hatch)
        axes.text(known + 0.015, y, f"{percent(value)} {name}", va="center")
    axes.set_xlim(0, 1.6)
    axes.set_xticks([0, 0.5, 1.0], ["0%", "50%", "100%"])
    axes.set_yticks([1.02, 0.02], ["clean\naccuracy", "attack\nsuccess rate"], color=theme.ink)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _draw_latency(axes: Axes, record: Record, theme: Theme) -> None:
    m = record.metrics
    bars = ((1, m.latency_bare_us, theme.grey), (0, m.latency_guarded_us, theme.blue))
    known = [value for _, value, _ in bars if math.isfinite(value) and value >= 0]
    longest = max(known, default=0.0) or 1.0
    for y, value, colour in bars:
        length = value if math.isfinite(value) and value >= 0 else 0.0
        axes.barh(y, length, 0.6, facecolor=(colour, 0.55), edgecolor=colour)
        text = f"{value:.1f} µs" if math.isfinite(value) else MISSING
        axes.text(length + longest * 0.015, y, text, va="center")
    axes.set_xlim(0, longest * 1.35)
    axes.set_yticks([1, 0], ["bare", "guarded"], color=theme.ink)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("median latency, µs")
    axes.grid(axis="x")


def _draw_samples(figure: Figure, record: Record, box: tuple[float, float, float, float]) -> None:
    """Two rows of inputs, clean above triggered, each with what the model called it; orange is the target label."""
    shown = record.samples
    left, bottom, width, height = box
    count = min(4, len(shown.clean), len(shown.triggered))
    if not count:
        figure.text(left, bottom + height / 2, MISSING, color=LIGHT.muted)
    cell = width / max(count, 1)
    lines = (
        (0.51, "before", shown.clean_before),
        (-0.08, "before", shown.triggered_before),
        (-0.18, "after", shown.triggered_after),
    )
    for row, name, images in ((0.6, "clean", shown.clean), (0.01, "triggered", shown.triggered)):
        figure.text(0.02, bottom + height * (row + 0.2), name, va="center")
        for i in range(count):
            axes = figure.add_axes((left + i * cell, bottom + height * row, cell * 0.92, height * 0.4))
            axes.imshow(_visible(images[i]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
    for y, stage, names in lines:
        figure.text(0.02, bottom + height * y, stage, va="baseline", color=LIGHT.muted)
        for i, name in enumerate(names[:count]):
            hit = name == record.target
            figure.text(
                left + (i + 0.46) * cell,
                bottom + height * y,
                plain(name, 9),
                ha="center",
                va="baseline",
                color=LIGHT.orange if hit else LIGHT.ink,
                weight="bold" if hit else "normal",
            )


@lru_cache(maxsize=4096)
def _text_width(text: str, size: float) -> float:
    """Width in inches of a printable text at a font size in points. Needs the caller's settings."""
    # The outline's control points bound it, and cost far less than its exact extents.
    points = TextPath((0, 0), text, size=size).vertices if text.strip() else np.zeros((1, 2))
    return float(np.max(points, initial=0.0, axis=0)[0]) / 72


def _lanes(events: Sequence[Event], most: int = _MAX_LANES) -> dict[str, str]:
    """The lane of each actor: roles first, then devices by appearance; those beyond ``most`` share the last."""
    seen = dict.fromkeys(event.actor for event in events)
    actors = [*(role for role in _ROLES if role in seen), *(actor for actor in seen if actor not in _ROLES)]
    spare = actors[most - 1 :] if len(actors) > most else []
    names = {actor: plain(actor, 16) or "?" for actor in actors if actor not in spare}
    return {**names, **dict.fromkeys(spare, f"{len(spare)} others")}


def _arrange(
    events: Sequence[Event],
    span: float,
    *,
    size: float,
    words: int,
    numbers: bool = True,
    most_rows: int,
    most_lanes: int = _MAX_LANES,
) -> tuple[Lane, ...]:
    """Lay the events out on an axis of ``span`` inches, with their number, their first ``words`` characters, or both.

    Texts in a font of ``size`` points that find no row within ``most_rows`` are left away.
    """
    numbered = [(i, e) for i, e in enumerate(events, start=1) if math.isfinite(e.at_s)]
    numbered.sort(key=lambda pair: pair[1].at_s)
    low, high = _range(events)
    names = _lanes(events, most_lanes)
    lanes = []
    for name in dict.fromkeys(names.values()):
        mine = [(i, e) for i, e in numbered if names[e.actor] == name]
        drafts, intervals = [], []
        for number, event in mine:
            x = (event.at_s - low) / (high - low) * span
            text = " ".join([str(number)] * numbers + [plain(event.text, words)] * bool(words))
            width = _text_width(text, size) + _GAP
            leftwards = x + width > span
            intervals.append((x - width, x + _GAP / 2) if leftwards else (x - _GAP / 2, x + width))
            drafts.append((event.at_s, number, text, leftwards))
        rows = pack(intervals, _GAP)
        labels = tuple(
            Label(at_s, number, text if row < most_rows else "", row if row < most_rows else None, leftwards)
            for (at_s, number, text, leftwards), row in zip(drafts, rows, strict=True)
        )
        lanes.append(Lane(name, labels, max((label.row or 0 for label in labels), default=0) + 1))
    return tuple(lanes)


def _rows(lanes: Sequence[Lane]) -> float:
    return sum(lane.rows + _PADDING for lane in lanes)


def _range(events: Sequence[Event]) -> tuple[float, float]:
    times = [event.at_s for event in events if math.isfinite(event.at_s)]
    low, high = min([0.0, *times]), max([0.0, *times])
    return low, high if high > low else low + 1.0


def _draw_timeline(axes: Axes, events: Sequence[Event], lanes: Sequence[Lane], theme: Theme, size: float) -> None:
    if not lanes:
        _say(axes, MISSING, theme)
        return
    colours = {"attacker": theme.orange, "hub": theme.blue}
    axes.set_xlim(*_range(events))
    axes.set_ylim(max(_rows(lanes), 1.0), 0)
    axes.set_xlabel("seconds since the demo began")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_yticks([])
    top, ticks = 0.0, []
    for index, lane in enumerate(lanes):
        if index % 2:
            axes.axhspan(top, top + lane.rows + _PADDING, color=theme.grid, alpha=0.35, linewidth=0, zorder=0)
        colour = colours.get(lane.actor, theme.muted)
        for label in lane.labels:
            if label.row is None:
                axes.plot(label.at_s, top + 0.15, "|", color=colour, markersize=5, clip_on=False)
                continue
            y = top + 0.8 + label.row
            axes.plot(label.at_s, y, "o", color=colour, markersize=5.5, clip_on=False, zorder=3)
            axes.annotate(
                label.text,
                (label.at_s, y),
                (-72 * _GAP if label.leftwards else 72 * _GAP, 0),
                textcoords="offset points",
                ha="right" if label.leftwards else "left",
                va="center_baseline",
                size=size,
                color=theme.ink,
                zorder=4,
            )
        ticks.append((top + (lane.rows + _PADDING) / 2, lane.actor))
        top += lane.rows + _PADDING
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], color=theme.ink)
    axes.tick_params(axis="y", length=0)


__all__ = [
    "DARK", "HALF", "LIGHT", "MISSING", "NARROW", "WIDE", "Form", "Lane", "Theme",
    "before_after", "latency", "overview", "pack", "percent", "picture", "plain", "scores", "timeline",
]  # fmt: skip
