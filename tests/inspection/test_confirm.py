"""When a suspicion is confirmed, when it is not, and when nothing can be said."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from edgeguard.inspection import confirm

CONTROLS = (40.0, 50.0, 60.0)


@pytest.mark.parametrize(
    ("success", "l1", "controls", "agreement", "outcome"),
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
def test_outcomes(success: float, l1: float, controls: tuple[float, ...], agreement: float, outcome: str) -> None:
    found = confirm.decide(label=0, success=success, l1=l1, controls=controls, agreement=agreement)
    assert found.outcome == outcome
    assert found.reason


SHIFT: npt.NDArray[np.float64] = np.array([1.0, -2.0, 3.0])
STD: npt.NDArray[np.float64] = np.array([1.0, 2.0, 0.5])
NONE: npt.NDArray[np.float64] = np.zeros(3)


@pytest.mark.parametrize(("factor", "agreement"), [(4.0, 1.0), (-1.0, -1.0)])
def test_agreement_is_one_for_the_same_shift_and_minus_one_for_its_opposite(factor: float, agreement: float) -> None:
    reproduced: npt.NDArray[np.float64] = SHIFT * factor
    assert confirm.agreement_of(SHIFT, reproduced, STD) == pytest.approx(agreement)


def test_agreement_with_no_shift_at_all_is_unknown() -> None:
    assert math.isnan(confirm.agreement_of(NONE, SHIFT, STD))
