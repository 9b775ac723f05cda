"""Feature squeezing: the squeezers, the score and its two limits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgeguard.detection import squeezing
from edgeguard.detection.squeezing import SqueezeLimits
from edgeguard.errors import ConfigError, ModelError

Floats = npt.NDArray[np.float64]


@pytest.mark.parametrize(("bits", "expected"), [(1, [0, 0, 255, 255]), (2, [0, 85, 170, 255]), (8, [0, 100, 140, 255])])
def test_fewer_bits_leave_fewer_steps_from_black_to_white(bits: int, expected: list[int]) -> None:
    assert list(squeezing.bit_depth(bits)(np.array([0, 100, 140, 255], np.uint8))) == expected


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_median_filter_is_scipys(size: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    expected = ndimage.median_filter(image, size=(size, size, 1), mode="reflect")
    assert np.array_equal(squeezing.median(size)(image), expected)


def test_the_score_is_the_l1_distance_of_the_answers() -> None:
    image = np.full((4, 4, 1), 100, np.uint8)

    def answer(x: npt.NDArray[np.uint8]) -> Floats:
        share = float(x.mean()) / 255.0
        return np.array([share, 1.0 - share])

    found = squeezing.distances(image, answer, {"1-bit": squeezing.bit_depth(1), "8-bit": squeezing.bit_depth(8)})
    assert found == {"1-bit": pytest.approx(2 * 100 / 255), "8-bit": pytest.approx(0.0, abs=1e-9)}


def test_both_tails_are_suspicious_and_a_score_that_is_no_number_too() -> None:
    limits = squeezing.fit_limits(np.linspace(0.1, 0.9, 401), 0.05)
    assert [limits.flags(score) for score in (0.0, 0.5, 1.9, float("nan"))] == [True, False, True, True]
    assert SqueezeLimits(low=0.0, high=1.0).flags(1.0) is False


@pytest.mark.parametrize("bits", [0, 9])
def test_a_bit_depth_that_is_none_is_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="bit depth"):
        squeezing.bit_depth(bits)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ModelError, match="uint8 image"):
        squeezing.distances(np.zeros((4, 4), np.uint8), lambda x: np.ones(2), squeezing.SQUEEZERS)
    with pytest.raises(ConfigError, match="median window"):
        squeezing.median(1)


def test_too_few_clean_scores_for_the_tails_are_refused_with_a_number() -> None:
    with pytest.raises(ModelError, match="at least 200"):
        squeezing.fit_limits(np.zeros(100), 0.01)
