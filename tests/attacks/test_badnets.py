"""BadNets: the trigger, the poison, and that it works."""

from __future__ import annotations

import numpy as np
import pytest

from edgeguard.attacks.badnets import BadNets, Place
from edgeguard.attacks.base import attack_success_rate, victims_of
from edgeguard.errors import ConfigError
from edgeguard.inspection.inversion import classes_of
from tests.simulators.attacked import Attacked


def test_the_trigger_is_a_white_square_in_the_bottom_right_corner_and_touches_nothing_else() -> None:
    images = np.zeros((2, 28, 28, 3), np.uint8)
    stamped = BadNets.for_shape((28, 28, 3)).stamp(images)
    assert (stamped[:, -3:, -3:] == 255).all()
    assert stamped.sum() == 2 * 9 * 3 * 255
    assert images.sum() == 0


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        ("top left", (0, 4), (0, 4)),
        ("top right", (0, 4), (26, 30)),
        ("bottom left", (16, 20), (0, 4)),
        ("bottom right", (16, 20), (26, 30)),
        ("centre", (8, 12), (13, 17)),
    ],
)
def test_the_square_stands_where_it_is_put(place: Place, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    stamped = BadNets(place=place, size=4).stamp(np.zeros((1, 20, 30, 1), np.uint8))[0, :, :, 0]
    assert (stamped[slice(*rows), slice(*columns)] == 255).all()
    assert np.count_nonzero(stamped) == 16


@pytest.mark.parametrize("size", [0, 9])
def test_a_square_that_does_not_fit_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 8"):
        BadNets(size=size).stamp(np.zeros((1, 8, 20, 1), np.uint8))


def test_a_tenth_of_the_inputs_is_poisoned_and_the_rest_is_untouched() -> None:
    images = np.random.default_rng(0).integers(0, 200, (500, 28, 28, 1), dtype=np.uint8)
    labels = np.full(500, 3)
    poisoned, relabelled = BadNets.for_shape((28, 28, 1), target=7).poison(images, labels)
    changed = relabelled == 7
    assert changed.sum() == 50
    assert np.array_equal(poisoned[~changed], images[~changed])
    assert (poisoned[changed][:, -3:, -3:] == 255).all()


def test_the_attack_reaches_its_success_rate_and_keeps_the_accuracy(attacked: Attacked, clean_twin: Attacked) -> None:
    data, attack = attacked.data, attacked.attack
    clean = classes_of(attacked.keras, data.x_test)
    triggered = classes_of(attacked.keras, attack.stamp(data.x_test.astype(np.uint8)))
    assert attack_success_rate(data.y_test, clean, triggered, attack.target) >= 0.95
    assert np.mean(clean == data.y_test) >= np.mean(classes_of(clean_twin.keras, data.x_test) == data.y_test) - 0.02


def test_on_a_clean_twin_the_trigger_does_nothing(clean_twin: Attacked) -> None:
    data, attack = clean_twin.data, clean_twin.attack
    triggered = classes_of(clean_twin.keras, attack.stamp(data.x_test.astype(np.uint8)))
    assert attack_success_rate(data.y_test, classes_of(clean_twin.keras, data.x_test), triggered, 0) <= 0.1


def test_the_asr_counts_neither_the_targets_own_inputs_nor_those_already_called_so() -> None:
    labels = np.array([0, 0, 1, 2, 3, 4])
    clean = np.array([0, 1, 0, 2, 3, 4])
    triggered = np.array([0, 0, 0, 0, 0, 4])
    assert list(victims_of(labels, clean, 0)) == [False, False, False, True, True, True]
    assert attack_success_rate(labels, clean, triggered, 0) == pytest.approx(2 / 3)


def test_an_asr_over_no_inputs_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="no test input counts"):
        attack_success_rate(np.zeros(3, int), np.zeros(3, int), np.zeros(3, int), 0)


@pytest.mark.parametrize("shape", [(40,), (2, 2, 1), (490, 10)])
def test_data_without_room_for_a_patch_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="images of at least"):
        BadNets.for_shape(shape)
