"""The detection page's pictures: measured rows in, PNG bytes out.

Rules enforced here:

* a curve stands for all cells that a detector was measured on and that count: the mean of the TPR at each FPR;
* one colour a detector, the same in each picture; ours are drawn last and thickest;
* scores are shown as they are, in units of the threshold: above 1 is flagged.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = {
    "one-pass": "#0072B2",
    "cascade": "#D55E00",
    "linf": "#009E73",
    "strip-100": "#CC79A7",
    "squeezing": "#E69F00",
    "scale-up": "#56B4E9",
    "beatrix": "#6b6b6b",
    "ibd-psc": "#b8a800",
}
_OURS = ("one-pass", "cascade")
_SIZE = (7.2, 4.0)


def _png(draw: Callable[[Axes], None], size: tuple[float, float] = _SIZE) -> bytes:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    draw(axes)
    out = io.BytesIO()
    # No date or version: the same rows give the same bytes.
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _names(rows: Sequence[Row]) -> list[str]:
    """Published detectors first, so that ours lie on top."""
    found = {name for row in rows for name in row["detectors"]}
    return [*sorted(found - set(_OURS)), *(name for name in _OURS if name in found)]


def roc(rows: Sequence[Row], grid: Sequence[float]) -> bytes:
    """Mean TPR at each FPR of ``grid``, which the rows' curves were measured at; the FPR is on a logarithmic axis."""

    def draw(axes: Axes) -> None:
        for name in _names(rows):
            curves = [row["detectors"][name]["curve"] for row in rows if "curve" in row["detectors"].get(name, {})]
            if curves:
                mean = np.mean(curves, axis=0)
                axes.plot(
                    grid[1:],
                    mean[1:],
                    color=_COLOURS.get(name, "black"),
                    linewidth=2.4 if name in _OURS else 1.3,
                    label=f"{name} ({len(curves)})",
                )
        axes.plot(grid[1:], grid[1:], color="black", linewidth=0.8, linestyle=":", label="chance")
        axes.set_xscale("log")
        axes.set_xlabel("false-positive rate (log scale)")
        axes.set_ylabel("mean true-positive rate, all triggered inputs")
        axes.legend(
            fontsize="small",
            title="detector (cells)",
            title_fontsize="small",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )

    return _png(draw)


def cost(rows: Sequence[Row], which: str = "successful") -> bytes:
    """Mean TPR at 1% FPR against the mean number of inferences that a clean input takes."""

    def draw(axes: Axes) -> None:
        for name in _names(rows):
            found = [row["detectors"][name] for row in rows if which in row["detectors"].get(name, {})]
            if not found:
                continue
            forwards = float(np.mean([f["forwards_clean"] for f in found]))
            rate = float(np.mean([f[which]["tpr_0.01"][0] for f in found]))
            axes.scatter(forwards, rate, s=90 if name in _OURS else 45, color=_COLOURS.get(name, "black"), zorder=3)
            offset = (7, -14) if name == _OURS[0] else (7, 0)  # these two lie close together
            axes.annotate(name, (forwards, rate), xytext=offset, textcoords="offset points", fontsize="small")
        axes.set_xscale("log")
        axes.set_xlim(0.8, 300)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("inferences for a clean input (log scale)")
        axes.set_ylabel("mean TPR at 1% FPR")

    return _png(draw)


def histogram(row: Row, edges: Sequence[float]) -> bytes:
    """One-pass scores of one cell's clean and triggered inputs, counted in the bins that ``edges`` [bins + 1] bound."""
    counts = row["detectors"]["one-pass"]["histogram"]

    def draw(axes: Axes) -> None:
        for side, colour, hatch in (("clean", "#0072B2", ""), ("triggered", "#D55E00", "////")):
            shares = np.asarray(counts[side], dtype=float)
            shares /= max(shares.sum(), 1.0)
            axes.stairs(shares, edges, fill=True, facecolor=(colour, 0.35), edgecolor=colour, hatch=hatch, label=side)
        axes.axvline(1.0, color="black", linewidth=1.2, linestyle="--", label="threshold: above 1 is flagged")
        axes.set_xscale("log")
        axes.set_xlabel("one-pass score (log scale)")
        axes.set_ylabel("share of its inputs")
        axes.set_title(f"{row['data']}, {row['network']}, {row['attack']}", fontsize="medium")
        axes.legend(fontsize="small")

    return _png(draw)
