"""The search for triggers as devices reported them."""

from __future__ import annotations

import numpy as np
import pytest

from edgeguard.inspection.networks import norms_of
from edgeguard.repair.recover import FORMS, Form, Reported, Search
from tests.simulators.attacked import Attacked


@pytest.mark.parametrize("form", FORMS)
def test_pixels_that_never_change_do_not_break_a_search_with_shared_inputs(attacked: Attacked, form: Form) -> None:
    images = attacked.x_owner[:100].copy()
    images[:, 0] = 0
    taps = attacked.conversion.metadata.taps
    width = sum(tap.channels for tap in taps if tap.kind != "logit")
    ones = np.ones(width, np.float32)
    reported = Reported(flagged_mean=ones, std=ones, quarantined=attacked.attack.stamp(images[:50]))
    search = Search(norms_of(attacked.keras, taps), 0, form, reported=reported)
    found = search.run(images, steps=10)
    assert np.isfinite(found.size)
    assert np.isfinite(found.stamp(images)).all()


def test_a_search_that_is_run_again_begins_afresh(attacked: Attacked) -> None:
    search = Search(norms_of(attacked.keras, attacked.conversion.metadata.taps), 0, "patch")
    images = attacked.x_owner[:100]
    first, other, again = (search.run(images, steps=20, seed=seed) for seed in (0, 1, 0))
    assert all((one == two).all() for one, two in zip(first.parts, again.parts, strict=True))
    assert not (first.parts[0] == other.parts[0]).all()
