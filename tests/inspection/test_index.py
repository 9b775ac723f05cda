"""How far a trigger's size stands out, and when that is the sign of a backdoor."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeguard.inspection import index
from edgeguard.inspection.index import Measure, measure, stands_out

ALIKE = np.array([40.0, 42.0, 38.0, 45.0, 36.0, 41.0, 39.0, 43.0, 37.0])


def test_a_size_among_its_like_has_a_small_index() -> None:
    assert abs(measure(np.append(ALIKE, 40.0), 9).index) < 1.0


def test_a_much_smaller_size_has_a_large_index_and_a_small_ratio() -> None:
    found = measure(np.append(ALIKE, 4.0), 9)
    assert found.index > 10.0
    assert found.ratio == pytest.approx(4.0 / np.quantile(ALIKE, 0.25))
    assert found.low <= found.index <= found.high


def test_a_large_size_has_a_negative_index() -> None:
    assert measure(np.append(ALIKE, 400.0), 9).index < -10.0


def test_a_second_backdoored_label_does_not_hide_the_first() -> None:
    assert measure(np.append(ALIKE, [4.0, 5.0]), 9).ratio < 0.2


def test_the_unit_of_size_does_not_matter() -> None:
    sizes = np.append(ALIKE, 12.0)
    assert measure(sizes, 9) == measure(sizes / 784.0, 9) or math.isclose(
        measure(sizes, 9).index, measure(sizes / 784.0, 9).index
    )


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ([4.0, 40.0, 41.0], "two others"),
        ([4.0, math.inf, math.inf, math.inf, 40.0], "triggers of others were not found"),
        ([math.inf, 40.0, 41.0, 42.0, 43.0], "its own was not found"),
    ],
)
def test_too_little_to_compare_with_is_not_known(sizes: list[float], why: str) -> None:
    assert math.isnan(measure(np.asarray(sizes), 0).ratio), why


@pytest.mark.parametrize(
    ("ratio", "found_index", "success", "sign"),
    [
        (0.1, 6.0, 0.95, True),
        (0.1, 6.0, 0.5, False),
        (0.1, 6.0, math.nan, False),
        (0.9, 6.0, 0.95, False),
        (0.1, 1.0, 0.95, False),
        (math.nan, math.nan, 0.95, False),
    ],
)
def test_a_sign_is_small_works_and_stands_out(ratio: float, found_index: float, success: float, sign: bool) -> None:
    found = Measure(index=found_index, low=found_index, high=found_index, ratio=ratio)
    assert stands_out("patch", found, success) is sign


def test_limits_ask_for_less_than_other_labels_need() -> None:
    assert all(0.0 < limit < 1.0 for limit in index.MAX_RATIO.values())
