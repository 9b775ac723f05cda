"""The search for triggers as devices reported them."""

from __future__ import annotations

import numpy as np
import pytest

from edgeguard.inspection.networks import norms_of
from edgeguard.repair.recover import FORMS, Form, Reported, recover
from tests.simulators.attacked import Attacked


@pytest.mark.parametrize("form", FORMS)
def test_pixels_that_never_change_do_not_break_a_search_with_shared_inputs(attacked: Attacked, form: Form) -> None:
    images = attacked.x_owner[:100].copy()
    images[:, 0] = 0
    taps = attacked.conversion.metadata.taps
    width = sum(tap.channels for tap in taps if tap.kind != "logit")
    ones = np.ones(width, np.float32)
    reported = Reported(flagged_mean=ones, std=ones, quarantined=attacked.attack.stamp(images[:50]))
    found = recover(norms_of(attacked.keras, taps), images, 0, form, reported=reported, steps=10)
    assert np.isfinite(found.size)
    assert np.isfinite(found.stamp(images)).all()
