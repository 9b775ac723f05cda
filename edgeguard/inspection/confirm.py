"""Confirms a suspicion: does the suspected label have a trigger that the other labels have not? Pure decisions.

Rules enforced here:

* an index that is compared with a fixed cut-off is not portable between models, so a recovered trigger is judged by
  what it does: it must work on inputs that it was not recovered on, and be much smaller than the triggers of its form
  that were recovered, with the same effort, for labels that nobody suspects;
* it must move the features as the fleet reported that they moved;
* where there is too little to compare with, the answer is "could not check", never "clean": for one trigger as for all
  of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Form

Outcome = Literal["confirmed", "not_confirmed", "could_not_check"]

MIN_SUCCESS = 0.85
MAX_SIZE_RATIO = 0.5
MIN_AGREEMENT = 0.5
MIN_CONTROLS = 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found for the suspected label, and the decision with its reason.

    ``success`` on held-out inputs; ``size`` of the suspect's trigger and ``control_size`` the median of the controls',
    in units of the form: pixels of a patch, amplitude (0 to 1) of a blend; ``agreement`` the cosine between the
    reported and the reproduced shift of the features, NaN without evidence.
    """

    outcome: Outcome
    reason: str
    label: int
    form: Form
    success: float
    size: float
    control_size: float
    agreement: float

    @property
    def ratio(self) -> float:
        """Its size over that of the controls; NaN where there are none."""
        return self.size / self.control_size if self.control_size else math.inf


def decide(
    *,
    label: int,
    form: Form,
    success: float,
    size: float,
    controls: Sequence[float],
    agreement: float = math.nan,
) -> Finding:
    """Judge a recovered trigger.

    Args:
        label: the suspected label.
        form: of the trigger.
        success: of the trigger on held-out inputs.
        size: of the trigger.
        controls: sizes of the triggers of the same form that were recovered, and succeeded, for other labels.
        agreement: see :func:`agreement_of`; NaN where the fleet reported nothing.
    """
    median = float(np.median(controls)) if len(controls) else math.nan

    def finding(outcome: Outcome, reason: str) -> Finding:
        return Finding(
            outcome=outcome,
            reason=reason,
            label=label,
            form=form,
            success=success,
            size=size,
            control_size=median,
            agreement=agreement,
        )

    if math.isnan(success) or math.isnan(size):
        return finding("could_not_check", "the recovered trigger could not be measured")
    if len(controls) < MIN_CONTROLS:
        return finding("could_not_check", f"a {form} of {len(controls)} other labels, {MIN_CONTROLS} are needed")
    if success < MIN_SUCCESS:
        return finding("not_confirmed", f"the best trigger works on {success:.0%} of held-out inputs only")
    if size > MAX_SIZE_RATIO * median:
        return finding(
            "not_confirmed",
            f"its smallest trigger is {_sized(form, size)}, those of other labels {_number(form, median)}: no outlier",
        )
    if not math.isnan(agreement) and agreement < MIN_AGREEMENT:
        return finding("not_confirmed", f"the trigger moves other channels than devices reported ({agreement:.2f})")
    return finding(
        "confirmed",
        f"{_sized(form, size)} turns {success:.0%} of held-out inputs; other labels need {_number(form, median)}",
    )


def telling(findings: Sequence[Finding]) -> int:
    """Which of several triggers' findings, at least one, answers for the label: its place."""
    outcomes: tuple[Outcome, ...] = ("confirmed", "could_not_check", "not_confirmed")

    def order(place: int) -> tuple[int, bool, float]:
        found = findings[place]
        return outcomes.index(found.outcome), not found.success >= MIN_SUCCESS, found.ratio

    return min(range(len(findings)), key=order)


def _sized(form: Form, size: float) -> str:
    number = _number(form, size)
    return f"a patch of {number} pixels" if form == "patch" else f"a blend of amplitude {number}"


def _number(form: Form, size: float) -> str:
    return f"{size:.1f}" if form == "patch" else f"{size:.3f}"


def agreement_of(
    reported: npt.NDArray[np.float64], reproduced: npt.NDArray[np.float64], std: npt.NDArray[np.float64]
) -> float:
    """Cosine between two shifts of the features [D], each in clean standard deviations. NaN when one is zero.

    Deviations are compressed by a square root, so that one dead channel does not decide alone.
    """
    one, other = (np.sign(s) * np.sqrt(np.abs(s)) for s in (reported / std, reproduced / std))
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length else math.nan
