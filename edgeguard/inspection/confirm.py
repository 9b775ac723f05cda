"""Confirms a suspicion: does the suspected label have a trigger that the other labels have not? Pure decisions.

Rules enforced here:

* an index that is compared with a fixed cut-off is not portable between models, so a recovered trigger is judged by
  what it does: it must work on inputs that it was not recovered on, and be much smaller than the triggers that were
  recovered, with the same effort, for labels that nobody suspects;
* it must move the features as the fleet reported that they moved;
* where there is too little to compare with, the answer is "could not check", never "clean".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Outcome = Literal["confirmed", "not_confirmed", "could_not_check"]

MIN_SUCCESS = 0.85
MAX_SIZE_RATIO = 0.5
MIN_AGREEMENT = 0.5
MIN_CONTROLS = 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found for the suspected label, and the decision with its reason.

    ``success`` on held-out inputs; ``l1`` of the suspect's mask and ``control_l1`` the median of the controls', in
    pixels; ``agreement`` the cosine between the reported and the reproduced shift of the features, NaN without
    evidence.
    """

    outcome: Outcome
    reason: str
    label: int
    success: float
    l1: float
    control_l1: float
    agreement: float


def decide(*, label: int, success: float, l1: float, controls: Sequence[float], agreement: float = math.nan) -> Finding:
    """Judge a recovered trigger.

    Args:
        label: the suspected label.
        success: of the trigger on held-out inputs.
        l1: size of its mask.
        controls: sizes of the masks that were recovered, and succeeded, for other labels.
        agreement: see :func:`agreement_of`; NaN where the fleet reported nothing.
    """
    median = float(np.median(controls)) if len(controls) else math.nan

    def finding(outcome: Outcome, reason: str) -> Finding:
        return Finding(
            outcome=outcome,
            reason=reason,
            label=label,
            success=success,
            l1=l1,
            control_l1=median,
            agreement=agreement,
        )

    if math.isnan(success) or math.isnan(l1):
        return finding("could_not_check", "the recovered trigger could not be measured")
    if len(controls) < MIN_CONTROLS:
        return finding("could_not_check", f"{len(controls)} other labels to compare with, {MIN_CONTROLS} needed")
    if success < MIN_SUCCESS:
        return finding("not_confirmed", f"the best trigger works on {success:.0%} of held-out inputs only")
    if l1 > MAX_SIZE_RATIO * median:
        return finding(
            "not_confirmed",
            f"its trigger covers {l1:.1f} pixels, those of other labels {median:.1f}: no outlier",
        )
    if not math.isnan(agreement) and agreement < MIN_AGREEMENT:
        return finding("not_confirmed", f"the trigger moves other channels than devices reported ({agreement:.2f})")
    return finding(
        "confirmed",
        f"a trigger of {l1:.1f} pixels turns {success:.0%} of held-out inputs; other labels need {median:.1f}",
    )


def agreement_of(
    reported: npt.NDArray[np.float64], reproduced: npt.NDArray[np.float64], std: npt.NDArray[np.float64]
) -> float:
    """Cosine between two shifts of the features [D], each in clean standard deviations. NaN when one is zero.

    Deviations are compressed by a square root, so that one dead channel does not decide alone.
    """
    one, other = (np.sign(s) * np.sqrt(np.abs(s)) for s in (reported / std, reproduced / std))
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length else math.nan
