"""The decision rule and the score histogram that device and hub share.

A score is a raw detector score divided by its threshold: an input is flagged when the largest exceeds 1.
NaN means "not checked", which is never "clean": such an input is counted apart and lands in no bin.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

THRESHOLD = 1.0

EDGES: tuple[float, ...] = (
    0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0, 64.0,
)  # fmt: skip
"""Upper edges of the histogram's bins; a last, open bin follows. A score of exactly an edge belongs below it,
so that the bins above 1 hold exactly the flagged inputs."""

BINS = len(EDGES) + 1


def joint(scores: Iterable[float]) -> float:
    """The largest score, or NaN when any score is NaN or there is none (not checked)."""
    largest = -math.inf
    for score in scores:
        if math.isnan(score):
            return math.nan
        largest = max(largest, score)
    return largest if largest > -math.inf else math.nan


def is_flagged(score: float) -> bool:
    """True when a joint score exceeds the threshold. NaN is not flagged: it was not checked."""
    return score > THRESHOLD


def bin_of(score: float) -> int:
    """Index of the bin that holds a joint score, 0 to BINS - 1.

    Raises:
        ValueError: the score is NaN; it was not checked and belongs in no bin.
    """
    if math.isnan(score):
        raise ValueError("a score that is NaN was not checked and belongs in no bin")
    index = bisect_right(EDGES, score)
    return index - 1 if index and EDGES[index - 1] == score else index
