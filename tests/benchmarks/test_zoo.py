"""The attack zoo: its matrix, and how data sets are prepared and divided."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import zoo
from edgeguard.attacks import registry
from edgeguard.attacks.networks import MOBILENET_LIKE, RESNET8_LIKE, SMALL_CNN


def test_every_attack_is_in_the_matrix_with_a_clean_twin_before_it() -> None:
    cells = zoo.matrix()
    assert len(cells) == len(set(cells))
    for data, network, seeds in (("digits", SMALL_CNN, 3), ("fashion_mnist", SMALL_CNN, 1), ("gtsrb", SMALL_CNN, 1)):
        for seed in range(seeds):
            row = [c.attack for c in cells if (c.data, c.network, c.seed) == (data, network, seed)]
            assert row == ["clean", *registry.ATTACKS]
    for network in (MOBILENET_LIKE, RESNET8_LIKE):
        assert [c.attack for c in cells if (c.data, c.network) == ("gtsrb", network)] == ["clean", *zoo.ALL_NETWORKS]


def padded(height: int, width: int) -> np.ndarray:
    """A picture of stripes whose content fills the upper left of 32x32 pixels, the rest black."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:height, :width] = np.where(np.arange(width) * 4 // width % 2, 60, 100)[:, np.newaxis]
    return image


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (12, 20), (8, 32)])
def test_a_padded_picture_is_cut_to_its_content_and_brought_to_full_contrast(height: int, width: int) -> None:
    found = zoo.recut(padded(height, width)[np.newaxis])[0]
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    assert found.min() == 0
    assert found.max() == 255
    middles = found[:, [3, 12, 20, 28]].mean(axis=(0, 2))
    assert (middles > 127).tolist() == [True, False, True, False]


def test_a_black_picture_stays_black() -> None:
    assert not zoo.recut(np.zeros((1, 32, 32, 3), np.uint8)).any()


def test_an_owner_gets_whole_tracks_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [90, 150, 60])
    tracks = zoo._tracks(labels, 30)
    assert np.bincount(tracks).tolist() == [30] * 10
    held = zoo._whole_tracks(labels, tracks, 150)
    assert {int(n) for n in np.bincount(tracks[held])} <= {0, 30}
    assert not set(tracks[held]) & set(tracks[~held])
    assert [len(set(tracks[held & (labels == label)])) for label in range(3)] == [2, 2, 2]
