"""When a suspicion is confirmed, when it is not, and when nothing can be said."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from edgeguard.inspection import confirm
from edgeguard.inspection.inversion import Form

CONTROLS = (40.0, 50.0, 60.0)


@pytest.mark.parametrize(
    ("success", "size", "controls", "agreement", "outcome"),
    [
        (0.97, 4.0, CONTROLS, 0.9, "confirmed"),
        (0.97, 4.0, CONTROLS, math.nan, "confirmed"),
        (0.97, 26.0, CONTROLS, 0.9, "not_confirmed"),
        (0.60, 4.0, CONTROLS, 0.9, "not_confirmed"),
        (0.97, 4.0, CONTROLS, 0.1, "not_confirmed"),
        (0.97, 4.0, (50.0,), 0.9, "could_not_check"),
        (0.97, 4.0, (), 0.9, "could_not_check"),
        (math.nan, 4.0, CONTROLS, 0.9, "could_not_check"),
        (0.97, math.nan, CONTROLS, 0.9, "could_not_check"),
    ],
)
@pytest.mark.parametrize("form", ["patch", "blend"])
def test_outcomes(
    form: Form, success: float, size: float, controls: tuple[float, ...], agreement: float, outcome: str
) -> None:
    found = confirm.decide(label=0, form=form, success=success, size=size, controls=controls, agreement=agreement)
    assert (found.outcome, found.form) == (outcome, form)
    assert found.reason


def finding(success: float, size: float, controls: tuple[float, ...] = CONTROLS) -> confirm.Finding:
    return confirm.decide(label=0, form="patch", success=success, size=size, controls=controls)


@pytest.mark.parametrize(
    ("findings", "told"),
    [
        ([finding(0.97, 48.0), finding(0.97, 4.0)], 1),
        ([finding(0.97, 4.0), finding(0.97, 4.0, ())], 0),
        ([finding(0.97, 48.0), finding(0.97, 4.0, ())], 1),
        ([finding(0.97, 48.0), finding(0.97, 40.0)], 1),
        ([finding(0.60, 4.0), finding(0.97, 48.0)], 1),
        ([finding(math.nan, 4.0), finding(0.97, 48.0)], 0),
    ],
    ids=["a sign", "a sign beside an open question", "an open question", "the nearest", "what works", "not measured"],
)
def test_of_several_triggers_one_answers(findings: list[confirm.Finding], told: int) -> None:
    assert confirm.telling(findings) == told


SHIFT: npt.NDArray[np.float64] = np.array([1.0, -2.0, 3.0])
STD: npt.NDArray[np.float64] = np.array([1.0, 2.0, 0.5])
NONE: npt.NDArray[np.float64] = np.zeros(3)


@pytest.mark.parametrize(("factor", "agreement"), [(4.0, 1.0), (-1.0, -1.0)])
def test_agreement_is_one_for_the_same_shift_and_minus_one_for_its_opposite(factor: float, agreement: float) -> None:
    reproduced: npt.NDArray[np.float64] = SHIFT * factor
    assert confirm.agreement_of(SHIFT, reproduced, STD) == pytest.approx(agreement)


def test_agreement_with_no_shift_at_all_is_unknown() -> None:
    assert math.isnan(confirm.agreement_of(NONE, SHIFT, STD))
