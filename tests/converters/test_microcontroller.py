"""The tables of the firmware say what was fitted, however the guard stores it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from converters import calibration, flatbuffer, guard, microcontroller, taps
from converters.guard import Compiled
from edgeguard.contract.guard import Detector, logit_columns
from edgeguard.detection.statistics import fit, raw_scores, tails
from edgeguard.errors import ModelError
from tests.simulators.attacked import Attacked


def refitted(attacked: Attacked, *, compact: bool, by_class: bool) -> tuple[bytes, Compiled]:
    """The attacked model with a guard that stores its matrices so, and expects the same of every class or not."""
    bare = attacked.conversion.bare
    plan = taps.plan_taps(flatbuffer.parse(bare))
    plan = plan if by_class else replace(plan, logits=None)
    features = calibration.measure(guard.bake_features(bare, plan), plan, attacked.x_owner).features
    layout = guard.layout(plan)
    statistics = fit(features, guard.blocks(layout), logit_columns(layout))
    thresholds = tuple(float(n) for n in tails(raw_scores(statistics, features), 0.01))
    detectors = tuple(Detector(name=n, threshold=t) for n, t in zip(statistics.detectors, thresholds, strict=True))
    metadata = msgspec.structs.replace(attacked.conversion.metadata, taps=layout, detectors=detectors)
    compiled = Compiled(statistics, thresholds, compact)
    return guard.bake(bare, plan, compiled, metadata)[0], compiled


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("compact", [True, False])
def test_the_tables_hold_what_was_fitted(attacked: Attacked, compact: bool, by_class: bool) -> None:
    content, compiled = refitted(attacked, compact=compact, by_class=by_class)
    described = microcontroller.describe(content)
    fitted = compiled.statistics
    weights = fitted.weights[:, : len(fitted.unit)] / np.asarray(compiled.thresholds)[:, np.newaxis]
    steps = microcontroller.UNIT * np.sqrt(weights.max(axis=0))
    factors = np.array([scale.factor * 2.0 ** (142 - scale.exponent) for scale in described.scales])
    assert np.allclose(factors, steps / fitted.unit, rtol=2.0**-14)
    usual = fitted.centre if by_class else fitted.centre + fitted.table[0]
    assert np.allclose([scale.mean for scale in described.scales], usual * steps, atol=1.0, rtol=1e-5)
    if by_class:
        assert described.expected is not None
        assert np.allclose(described.expected, fitted.table * steps, atol=1.0, rtol=1e-5)
    else:
        assert described.expected is None


def test_more_detectors_than_a_message_holds_are_refused(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microcontroller, "MOST_DETECTORS", 2)
    with pytest.raises(ModelError, match="at most 2"):
        microcontroller.describe(attacked.conversion.guarded)
