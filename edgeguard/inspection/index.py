"""How far a recovered trigger's size stands out among those of the model's other labels. Pure decisions.

``index``: how many deviations log(size) lies below the median of all labels', the deviation being 1.4826 times the
median absolute deviation on that side of the median (the double-sided MAD of Chen et al., DeepInspect, IJCAI 2019,
positive for small triggers). ``ratio``: size over the lower quartile of the other labels' sizes, which two or three
backdoored labels among ten do not move.

Rules enforced here:

* the published cut-off of 2 is not portable: clean networks' labels reach it. A trigger must work on held-out inputs,
  have an index above :data:`MIN_INDEX`, *and* a ratio below :data:`MAX_RATIO`;
* the ratios were set a fifth below the smallest that a clean network had reached then, 0.60 of a patch and 0.74 of a
  blend; of attacks, BadNets, Blended, SIG and Refool alone were looked at. Since then the zoo's clean network on
  Fashion-MNIST reached 0.54 of a patch, with an index of 3.7 and a success of 0.96: a fifteenth above the limit, which
  was not moved after it. ``python -m benchmarks.inspection --calibrate`` recomputes what limits come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Form

MIN_SUCCESS = 0.8
MIN_INDEX = 2.0
MAX_RATIO = MappingProxyType[Form, float]({"patch": 0.5, "blend": 0.6})
MIN_OTHERS = 3
_LEAST_DEVIATION = 0.05
_RESAMPLES = 200
_NORMAL = 1.4826


@dataclass(frozen=True, kw_only=True)
class Measure:
    """``index`` with its 90% interval, and ``ratio``; NaN where there is too little to compare with."""

    index: float
    low: float
    high: float
    ratio: float


def measure(sizes: npt.NDArray[np.float64], place: int, *, seed: int = 0) -> Measure:
    """Measure one size among all [labels].

    Args:
        sizes: of all labels' triggers; infinite where none was found.
        place: of the one to measure.
        seed: of the resampling that gives the interval: the other labels are drawn anew, with repetition.
    """
    others = np.delete(sizes, place)
    others = others[np.isfinite(others)]
    own = float(sizes[place])
    if len(others) < MIN_OTHERS or not math.isfinite(own):
        return Measure(index=math.nan, low=math.nan, high=math.nan, ratio=math.nan)
    rng = np.random.default_rng(seed)
    drawn = [_index(own, rng.choice(others, len(others))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, (0.05, 0.95))
    return Measure(
        index=_index(own, others),
        low=float(low),
        high=float(high),
        ratio=float(own / np.quantile(others, 0.25)),
    )


def stands_out(form: Form, measured: Measure, success: float) -> bool:
    """Whether a trigger is the sign of a backdoor. What is not known is none."""
    return success >= MIN_SUCCESS and measured.index >= MIN_INDEX and measured.ratio <= MAX_RATIO[form]


def _index(own: float, others: npt.NDArray[np.float64]) -> float:
    logs = np.log(np.append(others, own))
    median = np.median(logs)
    side = logs[logs <= median] if math.log(own) <= median else logs[logs >= median]
    deviation = _NORMAL * float(np.median(np.abs(side - median)))
    return float((median - math.log(own)) / max(deviation, _LEAST_DEVIATION))
