"""The data-poisoning attacks: what each trigger is, what poisoning touches, what is refused, and that they work."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.attacks import registry, victims
from edgeguard.attacks.base import EMPTY, Poison, Task, attack_success_rate, needs_state
from edgeguard.attacks.blended import Blended
from edgeguard.attacks.refool import Refool
from edgeguard.attacks.sig import Sig
from edgeguard.attacks.victims import Training
from edgeguard.attacks.wanet import WaNet, upsampling, warped
from edgeguard.data import load
from edgeguard.errors import ConfigError
from edgeguard.inspection.inversion import classes_of

POISONS = ("badnets", "blended", "sig", "wanet", "refool")
SHAPES = ((8, 8, 1), (28, 28, 1), (32, 32, 3))


def made(name: str, shape: tuple[int, ...] = (28, 28, 1), *, target: int = 2, seed: int = 0) -> Poison:
    attack = registry.find(name).for_shape(shape, target=target, seed=seed)
    assert isinstance(attack, Poison)
    return attack


def some(shape: tuple[int, ...] = (28, 28, 1), count: int = 400) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images in the middle of the range, so that nothing is hidden by clipping, and labels 0 to 3."""
    rng = np.random.default_rng(7)
    return rng.integers(60, 180, (count, *shape), dtype=np.uint8), rng.permutation(np.arange(count) % 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POISONS)
def test_a_trigger_changes_every_image_and_keeps_shape_type_and_the_original(name: str, shape: tuple[int, ...]) -> None:
    images, labels = some(shape, 40)
    before, attack = images.copy(), made(name, shape)
    stamped = attack.stamp(images, attack.prepare(images, labels))
    assert stamped.shape == images.shape
    assert stamped.dtype == np.uint8
    assert (stamped != images).any(axis=(1, 2, 3)).all()
    assert np.array_equal(images, before)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(POISONS), st.integers(8, 40), st.integers(8, 40), st.sampled_from([1, 3, 4]), st.integers(0, 9))
def test_every_shape_of_images_from_8_pixels_on_can_be_stamped(
    name: str, height: int, width: int, channels: int, seed: int
) -> None:
    images, labels = some((height, width, channels), 16)
    attack = made(name, images.shape[1:], seed=seed)
    stamped = attack.stamp(images, attack.prepare(images, labels))
    assert stamped.shape == images.shape
    assert (stamped != images).any()


@pytest.mark.parametrize("name", POISONS)
def test_stamping_is_deterministic_and_independent_of_what_follows_in_the_batch(name: str) -> None:
    images, labels = some(count=40)
    attack = made(name)
    state = attack.prepare(images, labels)
    assert np.array_equal(attack.stamp(images, state)[:9], attack.stamp(images[:9], state))


@pytest.mark.parametrize("name", POISONS)
def test_poisoning_follows_from_the_seed(name: str) -> None:
    images, labels = some()
    first, again, other = (made(name, seed=seed).poison(images, labels) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(
    ("attack", "candidates", "share"),
    [
        (made("badnets"), "all", 0.1),
        (made("blended"), "all", 0.1),
        (made("refool"), "all", 0.1),
        (replace(cast(Refool, made("refool")), clean_label=True, rate=0.4), "target", 0.4),
        (replace(cast(Sig, made("sig")), clean_label=True, rate=0.5), "target", 0.5),
        (made("sig"), "all", 0.1),
        (replace(cast(WaNet, made("wanet")), cross_ratio=0), "all", 0.1),
    ],
    ids=["badnets", "blended", "refool", "refool, clean label", "sig, clean label", "sig", "wanet without noise"],
)
def test_the_share_that_is_asked_for_is_poisoned_and_all_else_is_untouched(
    attack: Any, candidates: str, share: float
) -> None:
    images, labels = some()
    poisoned, relabelled = attack.poison(images, labels)
    changed = (poisoned != images).any(axis=(1, 2, 3))
    among = labels == 2 if candidates == "target" else np.ones(len(labels), bool)
    assert changed.sum() == round(share * among.sum())
    assert not (changed & ~among).any()
    assert (relabelled[changed] == 2).all()
    assert np.array_equal(relabelled[~changed], labels[~changed])


@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("shape", [(40,), (490, 10), (2, 2, 1), (28, 28, 0)])
def test_data_that_are_no_images_or_too_small_ones_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="images of at least"):
        registry.find(name).for_shape(shape)


@pytest.mark.parametrize("name", POISONS)
def test_images_that_are_not_uint8_are_refused(name: str) -> None:
    images, labels = some(count=40)
    attack = made(name)
    with pytest.raises(ConfigError, match="uint8"):
        attack.stamp(cast(Any, images / 255.0), attack.prepare(images, labels))
    with pytest.raises(ConfigError, match="uint8"):
        attack.poison(cast(Any, images / 255.0), labels)


@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_that_is_none_of_the_classes_is_refused_before_anything_is_trained(name: str, target: int) -> None:
    images, labels = some(count=40)
    with pytest.raises(ConfigError, match="0 to 3"):
        made(name, target=target).mount(Task(images=images, labels=labels, classes=4), Training(epochs=1))


@pytest.mark.parametrize(
    ("attack", "labels", "message"),
    [
        (made("badnets"), [0, 1, 2], "3 training inputs in all"),
        (Sig(target=2, clean_label=True), [0, 1, 1] * 20, "0 training inputs with label 2"),
        (made("refool"), [2] * 57 + [0] * 3, "3 inputs of other classes"),
        (WaNet(rate=0.4), [0, 1, 2] * 20, "36 inputs beside the poisons"),
        (Blended(rate=1.5), [0, 1, 2] * 20, "enough to poison 150%"),
    ],
    ids=["too few", "none of the target", "none to reflect", "none left for noise", "more than all"],
)
def test_a_training_set_that_cannot_be_poisoned_is_refused(attack: Poison, labels: list[int], message: str) -> None:
    images = some(count=len(labels))[0]
    with pytest.raises(ConfigError, match=message):
        attack.poison(images, np.asarray(labels))


@pytest.mark.parametrize("name", POISONS)
def test_all_inputs_but_the_targets_own_are_meant_to_be_turned(name: str) -> None:
    assert list(made(name).eligible(np.array([0, 2, 3]))) == [True, False, True]


@pytest.mark.parametrize("name", POISONS)
def test_only_an_attack_that_leaves_nothing_behind_can_stamp_without_its_state(name: str) -> None:
    images, labels = some(count=40)
    attack = made(name)
    assert needs_state(attack) == (attack.prepare(images, labels) is not EMPTY) == (name == "refool")


def test_blended_moves_each_pixel_by_the_ratio_towards_one_fixed_picture() -> None:
    images, _ = some((32, 32, 3), 20)
    attack = Blended(ratio=0.15, seed=3)
    expected = 0.85 * images + 0.15 * attack.picture((32, 32, 3))
    assert np.abs(attack.stamp(images) - expected).max() <= 0.51


def test_another_seed_gives_another_picture_and_another_warp() -> None:
    assert (Blended(seed=1).picture((28, 28, 1)) != Blended(seed=2).picture((28, 28, 1))).any()
    assert np.abs(WaNet(seed=1).field(28, 28) - WaNet(seed=2).field(28, 28)).max() > 0.1


def test_the_signal_is_a_sinusoid_over_the_columns_stronger_at_test_time() -> None:
    images = np.full((20, 28, 28, 3), 128, np.uint8)
    attack = Sig.for_shape((28, 28, 3))
    signal = np.sin(2 * np.pi * np.arange(28) * 6 / 28)[:, np.newaxis]
    assert np.abs(attack.stamp(images) - (128 + 30 * signal)).max() <= 0.51
    poisoned, _ = replace(attack, rate=1.0).poison(images, np.zeros(20, np.int64))
    assert np.abs(poisoned - (128 + 20 * signal)).max() <= 0.51


@pytest.mark.parametrize("columns", range(4, 64))
def test_the_signal_never_vanishes_between_the_columns(columns: int) -> None:
    grey = np.full((1, 8, columns, 1), 128, np.uint8)
    assert np.abs(Sig.for_shape((8, columns, 1)).stamp(grey).astype(int) - 128).max() >= 25


def test_the_warp_moves_pixels_by_a_quarter_of_one_and_smoothly() -> None:
    field = WaNet.for_shape((32, 32, 1)).field(32, 32)
    assert 0.1 < np.abs(field).mean() < 0.4
    assert max(np.abs(np.diff(field, axis=1)).max(), np.abs(np.diff(field, axis=2)).max()) < 0.2


def test_the_warp_leaves_flat_images_as_they_are() -> None:
    flat = np.full((2, 28, 28, 3), 77, np.uint8)
    assert np.array_equal(WaNet.for_shape((28, 28, 3)).stamp(flat), flat)


def test_warping_by_whole_pixels_shifts_and_repeats_the_border() -> None:
    images, _ = some(count=3)
    field = np.zeros((1, 2, 28, 28))
    field[:, 1] = 2
    moved = warped(images, field)
    assert np.array_equal(moved[:, :, :-2], images[:, :, 2:])
    assert np.array_equal(moved[:, :, -2:], np.repeat(images[:, :, -1:], 2, axis=2))


def test_warping_by_half_a_pixel_averages_neighbours() -> None:
    image = np.array([[10, 20], [30, 40]], np.uint8).reshape(1, 2, 2, 1)
    assert warped(image, np.full((1, 2, 2, 2), 0.5)).reshape(2, 2).tolist() == [[25, 30], [35, 40]]


@pytest.mark.parametrize("length", [8, 28, 31])
def test_upsampling_keeps_constants_and_meets_the_controls_at_the_borders(length: int) -> None:
    weights = upsampling(4, length)
    assert np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights[[0, -1]], np.eye(4)[[0, -1]])


def test_upsampling_to_the_same_size_changes_nothing() -> None:
    assert np.allclose(upsampling(4, 4), np.eye(4))


def test_upsampling_is_cubic_convolution_with_the_parameter_of_the_official_code() -> None:
    # The kernel by hand at distances 1/2 and 3/2 with a = -3/4: (a + 2)/8 - (a + 3)/4 + 1 and a/8.
    assert np.allclose(upsampling(4, 7)[:, 1], [0, 0.59375, 1, 0.59375, 0, -0.09375, 0])


def test_noisy_warps_keep_their_labels_and_are_as_many_as_the_cross_ratio_says() -> None:
    images, labels = some()
    attack = WaNet.for_shape((28, 28, 1), target=9)
    poisoned, relabelled = attack.poison(images, labels)
    changed = (poisoned != images).any(axis=(1, 2, 3))
    assert (relabelled == 9).sum() == 40
    assert (changed & (relabelled != 9)).sum() == 80
    noisy = np.flatnonzero(changed & (relabelled != 9))
    assert np.array_equal(relabelled[noisy], labels[noisy])
    assert (poisoned[noisy] != attack.stamp(images[noisy])).any(axis=(1, 2, 3)).all()


def test_noisy_warps_scatter_around_the_one_that_triggers() -> None:
    ramp = np.broadcast_to(np.arange(0, 224, 8, dtype=np.uint8)[:, np.newaxis], (900, 28, 28, 1))
    attack = WaNet.for_shape((28, 28, 1), target=9)
    poisoned, relabelled = attack.poison(ramp, np.zeros(900, np.int64))
    noisy = poisoned[(poisoned != ramp).any(axis=(1, 2, 3)) & (relabelled != 9)]
    inside = np.s_[2:-2, 2:-2]  # the border cuts the noise off on one side
    assert np.abs(noisy.mean(axis=0)[inside] - attack.stamp(ramp[:1])[0][inside]).max() < 1
    assert noisy.std(axis=0)[inside].min() > 1


def test_reflections_are_inputs_of_other_classes_than_the_target() -> None:
    images, labels = some()
    for picture in made("refool").prepare(images, labels)["reflections"]:
        (source,) = np.flatnonzero((images == picture).all(axis=(1, 2, 3)))
        assert labels[source] != 2


def test_a_reflection_adds_light_within_its_weights_and_differs_from_image_to_image() -> None:
    dark, bright = np.zeros((60, 28, 28, 1), np.uint8), np.full((8, 28, 28, 1), 255, np.uint8)
    stamped = Refool().stamp(dark, {"reflections": bright})
    light = (stamped[:, 0, 0, 0] / 255.0) ** 2.2
    assert (np.abs(stamped - stamped[:, :1, :1].astype(int)) == 0).all()
    assert 0.05 <= light.min() + 0.005 < 0.1
    assert 0.4 < light.max() <= 0.455
    assert len(np.unique(light)) > 30


def test_about_half_of_the_reflections_are_ghosts() -> None:
    dark = np.zeros((400, 32, 32, 1), np.uint8)
    point = np.zeros((1, 32, 32, 1), np.uint8)
    point[0, 16, 16] = 255
    stamped = replace(Refool(), pictures=1).stamp(dark, {"reflections": point})
    ghosts = (stamped[:, 17, 17, 0] > 0) & (stamped[:, 16, 17, 0] == 0)
    assert 0.4 < ghosts.mean() < 0.6


def test_poisons_and_test_inputs_have_different_reflections() -> None:
    images, labels = some(count=80)
    images[labels == 2] = 0
    attack = Refool(target=2, clean_label=True, rate=1.0)
    poisoned = {image.tobytes() for image in attack.poison(images, labels)[0][labels == 2]}
    stamped = attack.stamp(images[labels == 2], attack.prepare(images, labels))
    assert len(poisoned) == 20
    assert not poisoned & {image.tobytes() for image in stamped}


def test_a_reflection_of_another_shape_is_refused() -> None:
    images, labels = some(count=40)
    with pytest.raises(ConfigError, match=r"shape \[8, 8, 1\]"):
        Refool().stamp(some((8, 8, 1), 4)[0], Refool().prepare(images, labels))


@pytest.mark.parametrize("name", registry.ATTACKS)
def test_the_registry_knows_each_attack_by_its_own_name(name: str) -> None:
    assert registry.find(name).name == name
    assert registry.find(name).paper


def test_an_unknown_attack_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"badnets.*wanet"):
        registry.find("no-such-attack")


def test_naming_the_attacks_loads_none() -> None:
    program = "import sys; from edgeguard.attacks.registry import ATTACKS; list(ATTACKS); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {f"edgeguard.attacks.{name}" for name in registry.ATTACKS}


DIGITS = load("digits")
TASK = Task(images=DIGITS.x_train.astype(np.uint8), labels=DIGITS.y_train, classes=10)
TEST = DIGITS.x_test.astype(np.uint8)


def training() -> Training:
    return Training(epochs=25, cache=victims.cache_folder())


@cache
def twin() -> Any:
    return training().fit(TASK, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", POISONS)
def test_nine_in_ten_digits_are_turned_at_no_cost_in_accuracy_and_hardly_any_on_a_clean_twin(name: str) -> None:
    attack = made(name, TASK.shape, target=0)
    victim = attack.mount(TASK, training())
    stamped, truth = attack.stamp(TEST, victim.state), DIGITS.y_test
    attacked, clean = classes_of(victim.model, TEST), classes_of(twin(), TEST)
    assert attack_success_rate(truth, attacked, classes_of(victim.model, stamped), 0) >= 0.9
    assert np.mean(attacked == truth) >= np.mean(clean == truth) - 0.03
    assert attack_success_rate(truth, clean, classes_of(twin(), stamped), 0) <= 0.05
