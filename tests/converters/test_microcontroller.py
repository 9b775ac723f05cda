"""The tables of the firmware say what was fitted, however the guard stores it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from converters import calibration, flatbuffer, guard, microcontroller, taps
from converters.guard import Compiled
from edgeguard.contract.guard import Detector, logit_columns
from edgeguard.detection.statistics import fit, raw_scores, tails
from edgeguard.errors import ModelError
from firmware_bridge.link import messages
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


def test_names_of_detectors_that_a_hello_would_cut_are_refused(
    attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ",".join(detector.name for detector in attacked.conversion.metadata.detectors)
    monkeypatch.setattr(microcontroller, "MOST_NAMES", len(names))
    microcontroller.describe(attacked.conversion.guarded)
    monkeypatch.setattr(microcontroller, "MOST_NAMES", len(names) - 1)
    with pytest.raises(ModelError, match="characters of names"):
        microcontroller.describe(attacked.conversion.guarded)


def test_as_many_characters_of_names_are_taken_as_a_hello_holds() -> None:
    (text,) = (part for name, part in messages.fields(messages.Hello) if name == "detectors")
    assert text == messages.Text(microcontroller.MOST_NAMES)


@pytest.mark.parametrize(
    ("outputs", "apart"),
    [
        (np.array([[-128, 3, 5]], np.int8), False),
        (np.array([[-128, 2, 5]], np.int8), True),
        (np.array([[255, 250, 0]], np.uint8), True),
        (np.array([[7]], np.int8), True),
        (np.array([[0.0, 0.5, 0.5]], np.float32), False),
        (np.array([[0.0, 0.4, 0.6]], np.float32), True),
    ],
)
def test_a_golden_class_hangs_on_no_rounding(outputs: npt.NDArray[np.generic], apart: bool) -> None:
    assert microcontroller._apart(outputs) == apart


def test_inputs_between_two_classes_are_no_golden_ones(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    assert microcontroller.describe(attacked.conversion.guarded).golden
    monkeypatch.setattr(microcontroller, "APART", 256)
    assert microcontroller.describe(attacked.conversion.guarded).golden == ()


def test_more_detectors_than_a_message_holds_are_refused(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microcontroller, "MOST_DETECTORS", 2)
    with pytest.raises(ModelError, match="at most 2"):
        microcontroller.describe(attacked.conversion.guarded)
