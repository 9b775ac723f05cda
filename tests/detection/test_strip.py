"""STRIP: the formula, the sequential test, and that it works on an int8 model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgeguard.detection import strip
from edgeguard.detection.guarded import TfliteModel
from edgeguard.detection.strip import StripLimits, entropy, fit_limits, superimpose
from edgeguard.errors import ModelError
from tests.simulators.attacked import Attacked

Floats = npt.NDArray[np.float64]


@pytest.mark.parametrize(
    ("probabilities", "bits"),
    [([1.0, 0.0, 0.0, 0.0], 0.0), ([0.25] * 4, 2.0), ([0.5, 0.5, 0.0], 1.0), ([0.4, 0.4], 1.0)],
)
def test_the_entropy_is_over_classes_in_bits(probabilities: list[float], bits: float) -> None:
    assert entropy(np.array(probabilities)) == pytest.approx(bits)


def test_an_answer_without_probabilities_has_no_entropy() -> None:
    with pytest.raises(ModelError, match="no positive probability"):
        entropy(np.zeros(4))


def test_pixels_are_added_with_weight_one_and_saturate() -> None:
    x, overlay = np.array([0, 100, 200], np.uint8), np.array([7, 100, 100], np.uint8)
    assert list(superimpose(x, overlay)) == [7, 200, 255]


def test_numbers_are_added_and_kept_finite() -> None:
    largest = np.finfo(np.float32).max
    found = strip.superimpose(
        np.array([1.5, largest, -largest], np.float32), np.array([2.0, largest, -1.0], np.float32)
    )
    assert found.dtype == np.float32
    assert found.tolist() == [3.5, largest, -largest]


def test_a_clear_case_needs_few_overlays_and_an_unclear_one_all() -> None:
    overlays = np.zeros((32, 2, 2, 1), np.uint8)
    x, limits = np.zeros((2, 2, 1), np.uint8), StripLimits(threshold=0.5, spread=0.2)
    sure = strip.strip(x, overlays, lambda _: np.array([0.5, 0.5]), limits)
    torn = strip.strip(x, overlays, lambda _: np.array([0.89, 0.11]), limits)
    stuck = strip.strip(x, overlays, lambda _: np.array([1.0, 0.0]), limits)
    assert (sure.flagged, sure.forwards) == (False, strip.MIN_OVERLAYS)
    assert (stuck.flagged, stuck.forwards) == (True, strip.MIN_OVERLAYS)
    assert torn.forwards == 32


@pytest.mark.parametrize("overlays", [np.zeros((0, 2, 2, 1)), np.zeros((4, 3, 3, 1))])
def test_overlays_that_do_not_fit_are_refused(overlays: Floats) -> None:
    with pytest.raises(ModelError, match="overlays"):
        strip.strip(np.zeros((2, 2, 1)), overlays, lambda _: np.array([1.0]))


def test_strip_tells_triggered_from_clean_inputs_on_the_int8_model(attacked: Attacked) -> None:
    model = TfliteModel(attacked.conversion.bare)
    overlays, calibration = attacked.x_owner[:20], attacked.x_owner[20:150]

    def answer(x: npt.NDArray[np.uint8]) -> Floats:
        return model.predict(x[np.newaxis])[0].astype(np.float64)

    rows = [[entropy(answer(superimpose(x, overlay))) for overlay in overlays] for x in calibration]
    limits = fit_limits(np.array(rows), 0.05)
    clean = attacked.data.x_test[attacked.data.y_test != 0][:100].astype(np.uint8)
    on_clean = [strip.strip(x, overlays, answer, limits) for x in clean]
    on_triggered = [strip.strip(x, overlays, answer, limits) for x in attacked.attack.stamp(clean)]
    assert np.mean([r.flagged for r in on_triggered]) >= 0.8
    assert np.mean([r.flagged for r in on_clean]) <= 0.12
    assert np.mean([r.forwards for r in on_clean]) < len(overlays)
    whole = [[strip.strip(x, overlays, answer).entropy for x in xs] for xs in (clean, attacked.attack.stamp(clean))]
    assert np.mean(np.subtract.outer(whole[0], whole[1]) > 0) >= 0.95
