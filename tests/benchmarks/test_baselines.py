"""The published detectors: their formulas, what they are fitted with, and what they tell apart on the int8 model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import baselines, zoo
from benchmarks.baselines import (
    NAMES,
    Baseline,
    IbdPsc,
    Scored,
    batch_norms,
    class_moments,
    clean_deviation,
    deviation,
    gram_matrices,
    scaled,
    scaled_consistency,
    start_depth,
    usual,
    with_activation,
)
from converters import calibration
from edgeguard.attacks.networks import small_cnn
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ConfigError, ModelError
from tests.simulators.attacked import Attacked

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

INPUTS = 60
FORWARDS = {"linf": 1, "strip-100": 100, "squeezing": 3, "scale-up": 6, "beatrix": 1}
DETECTING = ("linf", "strip-100", "beatrix")
"""Those that tell BadNets on digits, by far: each had an AUROC of 1.000 when it was measured."""
RANGES = {
    "linf": (0.0, np.inf),
    "strip-100": (-np.log2(10), 0.0),
    "squeezing": (0.0, 2.1),
    "scale-up": (0.0, 1.0),
    "beatrix": (0.0, np.inf),
    "ibd-psc": (0.0, 1.0),
}


@pytest.fixture(scope="module")
def member(attacked: Attacked, tmp_path_factory: pytest.TempPathFactory) -> zoo.Member:
    """The attacked digits model as a member of a zoo."""
    folder = tmp_path_factory.mktemp("member")
    (folder / "int8.tflite").write_bytes(attacked.conversion.bare)
    attacked.keras.save(folder / "model.keras")
    cell = zoo.Cell(data="digits", network="small-cnn-1", attack="badnets", seed=0)
    return zoo.Member(cell=cell, attack=attacked.attack, state={}, folder=folder, row={})


@pytest.fixture(scope="module")
def part(attacked: Attacked) -> zoo.Split:
    return zoo.Split(
        data=attacked.data, owner_x=attacked.x_owner, owner_y=attacked.y_owner, owner_groups=None, digest=""
    )


@pytest.fixture(scope="module")
def clean(attacked: Attacked) -> Pixels:
    return attacked.data.x_test[attacked.data.y_test != attacked.attack.target][:INPUTS].astype(np.uint8)


@pytest.fixture(scope="module")
def triggered(attacked: Attacked, clean: Pixels) -> Pixels:
    return attacked.attack.stamp(clean)


@pytest.fixture(scope="module")
def ibd_psc(member: zoo.Member, part: zoo.Split) -> IbdPsc:
    (made,) = baselines.baselines(member, part, names=["ibd-psc"])
    assert isinstance(made, IbdPsc)
    return made


def one(member: zoo.Member, part: zoo.Split, name: str) -> Baseline:
    (made,) = baselines.baselines(member, part, names=[name])
    return made


def auroc(low: Floats, high: Floats) -> float:
    """The probability that one of ``high`` is above one of ``low``, ties counted half."""
    difference = np.subtract.outer(high, low)
    return float(np.mean(difference > 0) + np.mean(difference == 0) / 2)


@pytest.mark.parametrize("name", DETECTING)
def test_badnets_inputs_are_told_from_clean_ones(
    name: str, member: zoo.Member, part: zoo.Split, clean: Pixels, triggered: Pixels
) -> None:
    detector = one(member, part, name)
    assert auroc(detector.scores(clean).suspicion, detector.scores(triggered).suspicion) >= 0.97


def test_squeezing_has_the_wrong_tail_for_badnets(
    member: zoo.Member, part: zoo.Split, clean: Pixels, triggered: Pixels
) -> None:
    detector = one(member, part, "squeezing")
    assert auroc(detector.scores(clean).suspicion, detector.scores(triggered).suspicion) <= 0.4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ibd-psc"])
def test_scores_are_repeatable_in_range_and_counted(
    name: str, member: zoo.Member, part: zoo.Split, clean: Pixels, triggered: Pixels
) -> None:
    both = np.concatenate([clean[:10], triggered[:10]])
    found = one(member, part, name).scores(both)
    again = one(member, part, name).scores(both)
    assert_in_range(name, found)
    assert np.array_equal(found.suspicion, again.suspicion)
    assert np.all(found.forwards == FORWARDS[name])


def test_ibd_psc_scores_are_repeatable_in_range_and_counted(ibd_psc: IbdPsc, clean: Pixels, triggered: Pixels) -> None:
    both = np.concatenate([clean[:10], triggered[:10]])
    found = ibd_psc.scores(both)
    assert_in_range("ibd-psc", found)
    assert np.array_equal(found.suspicion, ibd_psc.scores(both).suspicion)
    assert np.all(found.forwards == 1 + len(ibd_psc.depths))


def assert_in_range(name: str, found: Scored) -> None:
    low, high = RANGES[name]
    assert found.suspicion.dtype == found.forwards.dtype == np.float64
    assert np.isfinite(found.suspicion).all()
    assert low <= found.suspicion.min()
    assert found.suspicion.max() <= high


@pytest.mark.parametrize("name", DETECTING)
def test_what_thresholds_are_set_with_has_no_part_in_the_fit(
    name: str, member: zoo.Member, part: zoo.Split, clean: Pixels
) -> None:
    images = part.owner_x.copy()
    images[calibration.halves(len(images)).threshold] = 128
    changed = one(member, replace(part, owner_x=images), name).scores(clean[:5])
    assert np.array_equal(changed.suspicion, one(member, part, name).scores(clean[:5]).suspicion)


def test_detectors_come_in_the_order_asked_for(member: zoo.Member, part: zoo.Split) -> None:
    made = baselines.baselines(member, part, names=["scale-up", "linf"])
    assert [detector.name for detector in made] == ["scale-up", "linf"]
    assert all(detector.paper for detector in made)


def test_an_unknown_name_is_refused(member: zoo.Member, part: zoo.Split) -> None:
    with pytest.raises(ConfigError, match="magic"):
        baselines.baselines(member, part, names=["linf", "magic"])


def test_strip_needs_as_many_clean_inputs_as_overlays(member: zoo.Member, part: zoo.Split) -> None:
    few = replace(part, owner_x=part.owner_x[:199], owner_y=part.owner_y[:199])
    with pytest.raises(ConfigError, match="99 clean inputs"):
        baselines.baselines(member, few, names=["strip-100"])


@pytest.mark.parametrize("images", [np.zeros((8, 8, 1), np.uint8), np.zeros((2, 8, 8, 1), np.float32)])
@pytest.mark.parametrize("name", ["linf", "scale-up"])
def test_images_of_another_type_or_without_a_batch_axis_are_refused(
    images: npt.NDArray, name: str, member: zoo.Member, part: zoo.Split
) -> None:
    with pytest.raises(ModelError, match="uint8"):
        one(member, part, name).scores(images)


def test_moments_are_of_the_predicted_class_or_of_all_where_it_has_few_inputs() -> None:
    features = np.repeat([[0.0], [2.0], [10.0], [14.0]], [4, 4, 1, 1], axis=0)
    predicted = np.repeat([0, 1], [8, 2]).astype(np.int64)
    mean, std = class_moments(features, predicted, 2)
    assert mean[:, 0] == pytest.approx([1.0, features.mean()])
    assert std[:, 0] == pytest.approx([1.0, features.std()])


def test_a_channel_that_is_silent_on_clean_inputs_has_a_spread_above_zero() -> None:
    features = np.stack([np.zeros(10), np.arange(10.0)], axis=1)
    _, std = class_moments(features, np.zeros(10, np.int64), 1)
    assert 0 < std[0, 0] < std[0, 1]


@pytest.mark.parametrize(
    ("pixel", "edge", "share"),
    [
        (20, 255, 1.0),
        (20, 100, 0.4),  # of 60, 100, 140, 180 and 220 the first two
        (20, 20, 0.0),
        (100, 90, 1.0),  # 255 each: pixels saturate and do not wrap round
    ],
)
def test_scale_up_is_the_share_of_brightened_copies_that_keep_the_label(pixel: int, edge: int, share: float) -> None:
    image = np.full((2, 2, 1), pixel, np.uint8)
    assert scaled_consistency(image, lambda x: int(x.max() > edge)) == pytest.approx(share)


def test_gram_matrices_of_order_one_are_inner_products_of_channels() -> None:
    activation = np.array([[1.0, 2.0, 0.0], [3.0, -1.0, 1.0]])
    (entries,) = gram_matrices(activation, orders=[1])
    assert entries == pytest.approx([10.0, -1.0, 3.0, 5.0, -1.0, 1.0])


def test_a_gram_matrix_of_high_order_is_ruled_by_the_largest_activation() -> None:
    activation = np.array([[2.0], [1.0], [1.0]])
    entries = gram_matrices(activation, orders=[1, 2, 8])[:, 0]
    assert entries == pytest.approx([6.0, 18**0.5, (2.0**16 + 2) ** (1 / 8)])
    assert entries[-1] == pytest.approx(activation.max() ** 2, rel=1e-4)


def test_a_gram_entry_within_ten_mads_of_the_median_is_no_deviation() -> None:
    grams = np.array([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(5, 1, 1)
    bounds = usual(grams)
    assert (bounds.low.item(), bounds.high.item()) == (-7.0, 13.0)
    assert deviation(np.array([[13.0]]), bounds) == 0.0
    assert deviation(np.array([[26.0]]), bounds) == pytest.approx(1.0)
    assert deviation(np.array([[-10.5]]), bounds) == pytest.approx(0.5)


def test_an_entry_that_is_silent_on_clean_inputs_deviates_relative_to_the_others() -> None:
    grams = np.tile([[0.0, 4.0]], (5, 1)).reshape(5, 1, 2)
    assert deviation(np.array([[2.0, 4.0]]), usual(grams)) == pytest.approx(2.0 / 4.0 / 2)


def test_clean_deviations_are_from_bounds_that_the_input_had_no_part_in() -> None:
    grams = np.array([2.0, 2.0, 4.0, 4.0]).reshape(4, 1, 1)
    assert [deviation(gram, usual(grams)) for gram in grams] == [0.0] * 4
    # Without one of its two, a value is all that the bounds of the other leave out: 2 of 4, twice, and 2 of 2, twice.
    assert clean_deviation(grams) == pytest.approx((0.5 + 1.0) / 2)


def test_the_activation_comes_out_of_the_file_and_its_own_output_stays(member: zoo.Member, clean: Pixels) -> None:
    bare, tapped = TfliteModel(member.int8), TfliteModel(with_activation(member.int8))
    own, activation = tapped.invoke(tapped.quantise(clean[0]))
    assert np.array_equal(own, bare.invoke(bare.quantise(clean[0]))[0])
    assert activation.ndim == 4
    assert len(np.unique(activation)) > 10


@pytest.mark.parametrize(
    ("errors", "start"),
    [
        ([0.0, 0.61, 0.9], 2),
        ([0.7, 0.1, 0.9], 1),
        ([0.1, 0.6, 0.6], 3),  # at the limit is not above it, and nothing else is: all layers
        ([0.1, 0.2, 0.7], 3),
    ],
)
def test_amplification_starts_at_the_first_depth_where_most_clean_inputs_err(errors: list[float], start: int) -> None:
    assert start_depth(lambda depth: errors[depth - 1], len(errors)) == start


def test_depths_beyond_the_first_collapse_are_not_measured() -> None:
    measured: list[int] = []

    def error(depth: int) -> float:
        measured.append(depth)
        return 0.4 * depth

    assert start_depth(error, 20) == 2
    assert measured == [1, 2]


def test_the_depths_are_consecutive_and_end_with_the_last_batch_norm(ibd_psc: IbdPsc) -> None:
    layers = len(ibd_psc.errors)
    assert ibd_psc.depths == tuple(range(ibd_psc.depths[0], layers + 1))[: baselines.AMPLIFIED_MODELS]
    assert np.isfinite(ibd_psc.errors[: ibd_psc.depths[0]]).all()


def test_the_last_batch_norms_are_amplified_first(attacked: Attacked, part: zoo.Split, tmp_path: Path) -> None:
    """Behind the last one is nothing but ReLU and a dense layer without bias: amplified alone it changes no label."""
    network = small_cnn((8, 8, 1), 10)
    norms, rng = batch_norms(network), np.random.default_rng(0)
    for norm in norms:
        norm.beta.assign(rng.normal(size=norm.beta.shape))
    images = part.owner_x.astype(np.float32)
    labels = network.predict(images, verbose=0).argmax(axis=1)
    with scaled(norms[:1], baselines.OMEGA):
        assert np.mean(network.predict(images, verbose=0).argmax(axis=1) != labels) > 0.01
    network.save(tmp_path / "model.keras")
    (tmp_path / "int8.tflite").write_bytes(attacked.conversion.bare)
    cell = zoo.Cell(data="digits", network="small-cnn-1", attack="clean", seed=0)
    member = zoo.Member(cell=cell, attack=None, state={}, folder=tmp_path, row={})
    made = one(member, replace(part, owner_y=labels), "ibd-psc")
    assert isinstance(made, IbdPsc)
    assert made.errors[0] == 0.0
    assert made.errors[-1] > 0.01


def test_amplifying_multiplies_gamma_and_beta_and_leaves_no_trace(attacked: Attacked) -> None:
    norms = batch_norms(attacked.keras)
    before = [(norm.gamma.numpy(), norm.beta.numpy()) for norm in norms]
    with pytest.raises(RuntimeError), scaled(norms[-1:], 1.5):
        assert np.allclose(norms[-1].gamma.numpy(), 1.5 * before[-1][0])
        assert np.allclose(norms[-1].beta.numpy(), 1.5 * before[-1][1])
        assert np.array_equal(norms[0].gamma.numpy(), before[0][0])
        raise RuntimeError
    for norm, (gamma, beta) in zip(norms, before, strict=True):
        assert np.array_equal(norm.gamma.numpy(), gamma)
        assert np.array_equal(norm.beta.numpy(), beta)


def test_batch_norms_of_nested_models_count_and_those_without_gamma_do_not() -> None:
    import keras

    inner = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="inner")])
    outer = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(name="first"),
            inner,
            keras.layers.BatchNormalization(scale=False, name="plain"),
            keras.layers.BatchNormalization(name="last"),
        ]
    )
    assert [norm.name for norm in batch_norms(outer)] == ["first", "inner", "last"]


def test_ibd_psc_refuses_a_network_without_batch_norm(part: zoo.Split, tmp_path: Path) -> None:
    import keras

    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")]
    network = keras.Sequential(layers)
    network.save(tmp_path / "model.keras")
    cell = zoo.Cell(data="digits", network="dense", attack="clean", seed=0)
    member = zoo.Member(cell=cell, attack=None, state={}, folder=tmp_path, row={})
    with pytest.raises(ConfigError, match="without batch-norm"):
        baselines.baselines(member, part, names=["ibd-psc"])


def test_amplified_models_answer_otherwise_than_the_model(ibd_psc: IbdPsc, clean: Pixels) -> None:
    usual_answers = ibd_psc.model.predict(clean[:20])
    assert all(not np.array_equal(model.predict(clean[:20]), usual_answers) for model in ibd_psc.amplified)
