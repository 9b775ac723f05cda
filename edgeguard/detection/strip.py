"""STRIP: superimpose clean inputs on an input; an answer that does not waver is a trigger's.

Gao et al.: STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019. Perturbed inputs are x + x_n,
saturating, weights 1 and 1; the entropy is taken over the classes of each answer and averaged over the overlays:

    H(x) = 1/N sum_n -sum_c y_nc log2 y_nc

A low H is suspicious. The paper takes the threshold from a normal fit to clean inputs' H at a false-rejection rate.

Here a sequential test may stop before all N overlays were tried: as soon as the mean of the entropies seen so far is
further from the threshold than their spread allows for chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.errors import ModelError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Answer = Callable[[Array], Floats]
"""Probabilities [C] of one input, in the owner's own type."""

MIN_OVERLAYS = 4
CERTAINTY = 0.995


@dataclass(frozen=True, kw_only=True)
class StripResult:
    """``entropy`` in bits, averaged over the ``forwards`` overlays that were tried."""

    entropy: float
    forwards: int
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class StripLimits:
    """``threshold`` in bits: at or below is flagged. ``spread``: standard deviation of one overlay's entropy."""

    threshold: float
    spread: float


def superimpose(x: Array, overlay: Array) -> Array:
    """Both added, kept within the type: 0 to 255 for pixels."""
    if np.issubdtype(x.dtype, np.integer):
        limits = np.iinfo(x.dtype)
        total = x.astype(np.int64) + overlay
        return np.asarray(np.clip(total, limits.min, limits.max).astype(x.dtype))
    with np.errstate(over="ignore"):
        both = x + overlay
    largest = np.finfo(x.dtype).max
    return np.asarray(np.clip(both, -largest, largest).astype(x.dtype))


def entropy(probabilities: Floats) -> float:
    """Shannon entropy in bits over the classes [C] of one answer. An int8 softmax need not sum to 1: it is made to."""
    positive = probabilities[probabilities > 0].astype(np.float64)
    if not len(positive):
        raise ModelError("model output", got="no positive probability", expected="a softmax")
    shares = positive / positive.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def strip(x: Array, overlays: Array, answer: Answer, limits: StripLimits | None = None) -> StripResult:
    """Run STRIP on one input.

    Args:
        x: one input, in the owner's own type.
        overlays: clean inputs [N, ...] of that type.
        answer: the model.
        limits: with them, stop as soon as the decision is clear; without, try every overlay and flag nothing.

    Raises:
        ModelError: no overlay, or an overlay of another shape.
    """
    if not len(overlays) or overlays.shape[1:] != x.shape:
        raise ModelError(
            "STRIP overlays", got=f"shape {list(overlays.shape)}", expected=f"[N, *{list(x.shape)}], N > 0"
        )
    mean, count = _until_clear((entropy(answer(superimpose(x, overlay))) for overlay in overlays), limits)
    return StripResult(entropy=mean, forwards=count, flagged=limits is not None and mean <= limits.threshold)


def _until_clear(entropies: Iterable[float], limits: StripLimits | None) -> tuple[float, int]:
    """Mean and number of the entropies up to where the decision is clear; of all of them without limits."""
    total, count = 0.0, 0
    for count, value in enumerate(entropies, start=1):
        total += value
        if limits is not None and _clear(total / count, count, limits):
            break
    return total / count, count


def _clear(mean: float, count: int, limits: StripLimits) -> bool:
    if count < MIN_OVERLAYS:
        return False
    margin = NormalDist().inv_cdf(CERTAINTY) * limits.spread / math.sqrt(count)
    return abs(mean - limits.threshold) > margin


def fit_limits(entropies: Floats, fpr: float) -> StripLimits:
    """Limits from clean inputs' entropies [inputs, overlays], each row in the order of the overlays.

    The threshold is the paper's: the quantile ``fpr`` of a normal fit to the clean means.

    Raises:
        ModelError: fewer than two inputs or overlays.
    """
    if entropies.ndim != 2 or min(entropies.shape) < 2:
        raise ModelError("STRIP calibration", got=f"shape {list(entropies.shape)}", expected="two inputs and overlays")
    means = entropies.mean(axis=1)
    spread = float(entropies.std(axis=1, ddof=1).mean())
    fitted = NormalDist(float(means.mean()), max(float(means.std(ddof=1)), 1e-9))
    return StripLimits(threshold=fitted.inv_cdf(fpr), spread=spread)
