"""Judges by a device's own reports whether it fares worse with a release than before. Pure.

Four things are compared, each by a test that holds for any number of readings:

* **flags**: the share of flagged inputs, by exact binomial bounds (Clopper and Pearson, Biometrika 1934). Worse is more
  than ``FLAGS`` times what it was, or what the new guard's calibration promises, where that is more;
* **classes**: the predicted classes of unflagged inputs, by the total variation distance of their shares, less what
  chance may add to it (Weissman et al., "Inequalities for the L1 Deviation of the Empirical Distribution", 2003). Worse
  is more than ``CLASSES``: scenes change, and a repair moves some answers;
* **latency**: medians that the device told before and since, by the largest of them together (Rosenbaum, Annals of
  Mathematical Statistics 1954). Worse is more than ``LATENCY`` times the time before;
* **starts**: how often its process began anew, by exact Poisson bounds (Garwood, Biometrika 1936). Worse is more than
  ``STARTS`` times the rate before, or ``STARTS_PER_DAY``, where that is more.

Rules enforced here:

* a device that is no worse than these tolerances is called worse with at most the probability asked for, over all
  looks together: each of the four tests gets a quarter of it, and look number k a share of 1 / (k (k + 1)), which add
  up to 1. It holds for inputs and readings that are independent; the tolerances stand for what they are not;
* looks are taken when the time since the update has doubled, so that a crash is seen at once and a slow harm later;
  :mod:`edgeguard.hub.rollout` adds one at the inputs that make a device count as healthy;
* what a device did not tell is not compared, and never taken for good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from scipy.special import betaincinv, gammaincinv

FLAGS = 2.0
CLASSES = 0.25
LATENCY = 1.5
STARTS = 2.0
STARTS_PER_DAY = 4.0
FIRST_LOOKS = 4
"""The last of so many looks falls on the end of the soak; the first on an eighth of it."""
_DAY_S = 86_400.0
_FEWEST = 3
"""Latencies on either side, and starts, at least: somebody may restart a device once or twice."""

Counts = Mapping[int, tuple[int, int]]
"""By predicted label: checked inputs, and how many of them were flagged."""


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """What a device told over some time.

    Attributes:
        counts: its inputs; empty where it told none.
        starts: how often its process began anew.
        seconds: how long that was counted; 0 where it was not.
        latencies: medians in microseconds.
    """

    counts: Counts = field(default_factory=dict)
    starts: int = 0
    seconds: float = 0.0
    latencies: tuple[float, ...] = ()

    @property
    def inputs(self) -> int:
        """How many inputs a guard looked at."""
        return sum(inputs for inputs, _ in self.counts.values())

    @property
    def flagged(self) -> int:
        """How many of them it flagged."""
        return sum(flagged for _, flagged in self.counts.values())


def looks(elapsed_s: float, soak_s: float) -> int:
    """How many looks are due so long after an update: 1 at an eighth of the soak, 4 at its end, one more each time
    that it has doubled. Without a soak none is."""
    if soak_s <= 0 or elapsed_s <= 0:
        return 0
    return max(0, math.floor(math.log2(elapsed_s / soak_s)) + FIRST_LOOKS)


def worse(before: Vitals, after: Vitals, *, promised: float, level: float, look: int) -> tuple[str, ...]:
    """What is worse than before, in words; empty where nothing is.

    Args:
        before: until the update.
        after: since.
        promised: the share of clean inputs that the new guard flags at most, as its calibration says.
        level: the probability of calling a device worse that is not, over all looks.
        look: the number of this look, from 1.
    """
    each = level / 4 / (look * (look + 1))
    found = (
        _flags(before, after, promised, each),
        _classes(before, after, each),
        _latency(before, after, each),
        _starts(before, after, each),
    )
    return tuple(filter(None, found))


def _flags(before: Vitals, after: Vitals, promised: float, level: float) -> str:
    n, k = after.inputs, after.flagged
    if not k:
        return ""
    m, j = before.inputs, before.flagged
    usual = 1.0 if 0 < m == j else float(betaincinv(j + 1, m - j, 1 - level / 2)) if m else 0.0
    lower = float(betaincinv(k, n - k + 1, level / 2))
    if lower <= FLAGS * max(usual, promised):
        return ""
    return f"flags {k / n:.1%} of {n} inputs, " + (f"before {j / m:.1%} of {m}" if m else f"promised {promised:.1%}")


def _classes(before: Vitals, after: Vitals, level: float) -> str:
    old, new = _unflagged(before), _unflagged(after)
    m, n = sum(old.values()), sum(new.values())
    if not (m and n):
        return ""
    labels = old.keys() | new.keys()
    shares = {label: (old.get(label, 0) / m, new.get(label, 0) / n) for label in labels}
    distance = sum(abs(p - q) for p, q in shares.values())
    chance = sum(math.sqrt(2 * (len(labels) * math.log(2) + math.log(2 / level)) / count) for count in (m, n))
    if (distance - chance) / 2 <= CLASSES:
        return ""
    most = max(sorted(labels), key=lambda label: abs(shares[label][1] - shares[label][0]))
    return f"calls {shares[most][1]:.0%} of its inputs {most}, before {shares[most][0]:.0%}"


def _unflagged(vitals: Vitals) -> dict[int, int]:
    """A trigger's inputs are flagged, and change their class by a repair: they are left out."""
    return {label: inputs - flagged for label, (inputs, flagged) in vitals.counts.items() if inputs > flagged}


def _latency(before: Vitals, after: Vitals, level: float) -> str:
    n, m = len(after.latencies), len(before.latencies)
    if min(n, m) < _FEWEST:
        return ""
    slowest = LATENCY * max(before.latencies)
    beyond = sum(reading > slowest for reading in after.latencies)
    # Were all of one law, the largest ``beyond`` of them all would all be among the later ones so rarely:
    if math.comb(n, beyond) / math.comb(n + m, beyond) > level:
        return ""
    return f"takes {sorted(after.latencies)[n // 2]:.0f} us, before {sorted(before.latencies)[m // 2]:.0f} us"


def _starts(before: Vitals, after: Vitals, level: float) -> str:
    if after.starts < _FEWEST or after.seconds <= 0:
        return ""
    usual = float(gammaincinv(before.starts + 1, 1 - level / 2)) / before.seconds if before.seconds > 0 else 0.0
    allowed = max(STARTS * usual, STARTS_PER_DAY / _DAY_S)
    if float(gammaincinv(after.starts, level / 2)) <= allowed * after.seconds:
        return ""
    return f"started {after.starts} times in {after.seconds:.0f} s, before {before.starts} in {before.seconds:.0f} s"
