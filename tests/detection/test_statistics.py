"""The statistics behind the scores: what they promise of false alarms, and what they find."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from edgeguard.detection import statistics
from edgeguard.detection.statistics import Block
from edgeguard.errors import ModelError


def gaussian(count: int, width: int = 24, factors: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loadings = np.random.default_rng(99).normal(size=(width, factors))
    return rng.normal(size=(count, factors)) @ loadings.T + rng.normal(scale=0.5, size=(count, width))


def test_the_factor_form_gives_the_mahalanobis_distance_of_its_own_covariance() -> None:
    sample = gaussian(4000)
    covariance = sample.T @ sample / len(sample)
    psi, whitened = statistics.factor_analysis(covariance, 3)
    # Rebuild L L^T from M and psi (Woodbury backwards) and invert it the plain way.
    precision = np.diag(1 / psi) - whitened.T @ whitened
    assert np.all(np.linalg.eigvalsh(precision) > 0)
    implied = np.linalg.inv(precision)
    assert np.allclose(np.diag(implied), np.diag(covariance), rtol=0.05)
    assert np.abs(implied - covariance).max() < 0.1 * np.abs(covariance).max()


def answered(features: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Features [N, D] with the logits behind them of a model that gives these shares [N, C] to its classes."""
    return np.concatenate([features, np.log(shares)], axis=1)


def between(shares: np.ndarray, seed: int) -> np.ndarray:
    """Features that lie between those of two classes, by the share of the second."""
    return gaussian(len(shares), seed=seed) + 5.0 * shares[:, 1:]


def test_raw_scores_are_squared_mahalanobis_distances_within_the_class_of_the_answer() -> None:
    sure = np.repeat([[0.999, 0.001], [0.001, 0.999]], 1000, axis=0)
    features = between(np.round(sure), 0)
    fitted = statistics.fit(answered(features, sure), [Block(detector="all", parts=(tuple(range(24)),))], (24, 25))
    raw = statistics.raw_scores(fitted, answered(features, sure))[:, 0]
    assert abs(raw.mean() - 24) < 3  # chi-squared with 24 degrees of freedom
    swapped = statistics.raw_scores(fitted, answered(features, 1 - sure))[:, 0]
    assert swapped.min() > raw.mean()


def test_an_input_that_the_model_is_in_two_minds_about_is_expected_between_the_classes() -> None:
    first = np.random.default_rng(0).uniform(0.001, 0.999, size=(2000, 1))
    shares = np.concatenate([first, 1 - first], axis=1)
    fitted = statistics.fit(
        answered(between(shares, 0), shares), [Block(detector="all", parts=(tuple(range(24)),))], (24, 25)
    )
    halves = np.full((500, 2), 0.5)
    doubtful = statistics.raw_scores(fitted, answered(between(halves, 1), halves))
    assert abs(doubtful.mean() - 24) < 3
    sure = np.repeat([[0.001, 0.999]], 500, axis=0)
    assert np.all(statistics.raw_scores(fitted, answered(between(halves, 1), sure)).mean() > 2 * doubtful.mean())


def test_logits_that_the_activations_do_not_explain_raise_the_score() -> None:
    rng = np.random.default_rng(0)
    features = gaussian(2000)
    logits = features[:, :3] + rng.normal(scale=0.1, size=(2000, 3))
    block = Block(detector="all", parts=(tuple(range(24)), (24, 25, 26)))
    clean = np.concatenate([features, logits], axis=1)
    fitted = statistics.fit(clean, [block], (24, 25, 26))
    lifted = clean.copy()
    lifted[:, 25] += 3.0
    before, after = (statistics.raw_scores(fitted, x)[:, 0] for x in (clean, lifted))
    assert np.median(after) > np.quantile(before, 0.99)


def test_the_scale_of_one_part_does_not_drown_another() -> None:
    features = gaussian(1500)
    plain = statistics.fit(features, [Block(detector="all", parts=(tuple(range(12)), tuple(range(12, 24))))])
    factor = np.repeat([1.0, 1000.0], 12)
    scaled = statistics.fit(features * factor, [Block(detector="all", parts=(tuple(range(12)), tuple(range(12, 24))))])
    expected = statistics.raw_scores(plain, features)
    assert np.allclose(statistics.raw_scores(scaled, features * factor), expected, rtol=1e-6)


def test_a_channel_that_is_silent_on_clean_data_speaks_when_it_wakes() -> None:
    features = gaussian(1000)
    features[:, 5] = 0.0
    fitted = statistics.fit(features, [Block(detector="all", parts=(tuple(range(24)),))])
    awake = features.copy()
    awake[:, 5] = 3.0
    clean = statistics.raw_scores(fitted, features)
    assert np.all(statistics.raw_scores(fitted, awake) > clean + 50)


@pytest.mark.parametrize("classes", [1, 40])
def test_the_two_large_matrices_hold_what_a_byte_can(classes: int) -> None:
    shares = np.random.default_rng(0).dirichlet(np.full(classes + 1, 0.1), size=2000) + 1e-6
    features = answered(gaussian(2000), shares / shares.sum(axis=1, keepdims=True))
    logits = tuple(range(24, 25 + classes))
    fitted = statistics.fit(features, [Block(detector="all", parts=(tuple(range(24)), logits))], logits)
    for matrix in (fitted.table, fitted.projection):
        steps = matrix * statistics.STEPS
        assert np.allclose(steps, np.round(steps))
        assert 100 <= np.abs(steps).max() <= statistics.STEPS


@pytest.mark.parametrize("strength", [1.0, 5.0, 30.0])
def test_no_deviation_lowers_a_score_however_strong_and_uneven_the_factors(strength: float) -> None:
    rng = np.random.default_rng(0)
    loadings = strength * rng.normal(size=(60, 3)) * rng.lognormal(0.0, 1.5, size=(60, 1))
    features = rng.normal(size=(4000, 3)) @ loadings.T + rng.normal(size=(4000, 60))
    fitted = statistics.fit(features, [Block(detector="all", parts=(tuple(range(60)),))])
    assert len(fitted.projection) == 12
    weights, factors = fitted.weights[0, :60], fitted.weights[0, 60:]
    form = np.diag(weights) + fitted.projection.T @ (factors[:, np.newaxis] * fitted.projection)
    root = 1 / np.sqrt(weights)
    assert np.linalg.eigvalsh(form * np.outer(root, root)).min() > 0
    # And the factors still do what they are for: what clean inputs have in common counts little.
    common = loadings[:, 0] / np.linalg.norm(loadings[:, 0] * np.sqrt(weights) / fitted.unit) / fitted.unit
    assert common @ form @ common < 0.2


def test_scores_survive_single_precision_where_one_factor_outweighs_all_else() -> None:
    rng = np.random.default_rng(0)
    features = 1000.0 + 10.0 * rng.normal(size=(2000, 1)) + rng.normal(size=(2000, 24))
    fitted = statistics.fit(features, [Block(detector="all", parts=(tuple(range(24)),))])
    arrays = {
        name: getattr(fitted, name).astype(np.float32) for name in ("unit", "centre", "table", "projection", "weights")
    }
    single = statistics.raw_scores(replace(fitted, **arrays), features.astype(np.float32))
    exact = statistics.raw_scores(fitted, features.astype(np.float32).astype(np.float64))
    assert np.allclose(single, exact, rtol=1e-3, atol=0)  # projected features instead of deviations: 1e-2


def test_each_detector_looks_at_its_own_columns_only() -> None:
    features = gaussian(600)
    blocks = [Block(detector="a", parts=(tuple(range(12)),)), Block(detector="b", parts=(tuple(range(12, 24)),))]
    fitted = statistics.fit(features, blocks)
    moved = features.copy()
    moved[:, 20] += 100.0
    before, after = (statistics.raw_scores(fitted, f) for f in (features, moved))
    assert np.allclose(before[:, 0], after[:, 0])
    assert np.all(after[:, 1] > before[:, 1] + 100)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("count", [199, 800])
def test_the_promise_holds_for_several_detectors_and_the_fewest_inputs_allowed(count: int, correlation: float) -> None:
    broken, runs = 0, 400
    rng = np.random.default_rng(0)
    for _ in range(runs):
        shared, own = rng.normal(size=(2 * count, 1)), rng.normal(size=(2 * count, 2))
        raw = np.exp(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own)
        scale = statistics.tails(raw[:count], 0.01)
        limits = statistics.set_thresholds(raw[count:], np.zeros(count, dtype=np.int64), 1, 0.01, scale=scale)
        low, high = np.log(limits.thresholds)
        broken += _share_above(low, high, correlation) > 0.015
    # 5% of 400 are 20 expected; 34 or more would happen by chance once in 500.
    assert broken <= 33


def _share_above(low: float, high: float, correlation: float) -> float:
    """P(a or b above their limits) for two standard normals with this correlation."""
    both = scipy.stats.multivariate_normal(cov=[[1.0, correlation], [correlation, 1.0]])
    return 1.0 - float(both.cdf([low, high]))


def test_detectors_that_do_not_vary_are_refused() -> None:
    raw = np.stack([np.arange(200.0), np.zeros(200)], axis=1)
    with pytest.raises(ModelError, match="do not vary"):
        statistics.tails(raw, 0.01)


@pytest.mark.parametrize("fpr", [0.01, 0.05])
def test_the_joint_false_positive_rate_keeps_its_promise_on_fresh_clean_data(fpr: float) -> None:
    blocks = [Block(detector="a", parts=(tuple(range(12)),)), Block(detector="b", parts=(tuple(range(12, 24)),))]
    broken = 0
    for seed in range(40):
        features = gaussian(1600 + 20_000, seed=seed)
        predicted = np.zeros(len(features), dtype=np.int64)
        fitted = statistics.fit(features[:800], blocks)
        raw = statistics.raw_scores(fitted, features)
        scale = statistics.tails(raw[:800], fpr)
        limits = statistics.set_thresholds(raw[800:1600], predicted[800:1600], 1, fpr, scale=scale)
        realised = np.mean((raw[1600:] / np.asarray(limits.thresholds)).max(axis=1) > 1)
        broken += realised > 1.5 * fpr
    # 5% of 40 are 2 expected; 7 or more would happen by chance once in 300.
    assert broken <= 6


def test_the_number_of_inputs_for_one_percent_is_199() -> None:
    assert statistics.inputs_needed(0.01) == 199
    assert statistics.allowed_exceedances(199, 0.01) == 0
    assert statistics.allowed_exceedances(198, 0.01) is None


def test_too_few_threshold_inputs_are_refused_with_the_number_needed() -> None:
    with pytest.raises(ModelError, match="at least 199"):
        statistics.set_thresholds(np.ones((100, 2)), np.zeros(100, dtype=np.int64), 1, 0.01, scale=np.ones(2))


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
def test_the_promise_holds_for_inputs_in_groups_that_are_alike(alike: float) -> None:
    rng, fpr, broken, runs = np.random.default_rng(0), 0.02, 0, 200
    for _ in range(runs):
        groups = np.repeat(np.arange(200), 20)
        joint = np.sqrt(alike) * rng.normal(size=200)[groups] + np.sqrt(1 - alike) * rng.normal(size=4000)
        allowed = statistics.allowed_of(joint, fpr, groups)
        if allowed is not None:  # else refused, which breaks no promise
            level = statistics.threshold_of(joint + 10.0, allowed) - 10.0
            broken += scipy.stats.norm.sf(level) > statistics.SLACK * fpr
    # At most 5% by the Beta law; how alike they are is estimated, so a little more is let pass here.
    assert broken / runs <= 0.1


def test_inputs_in_groups_are_worth_less_the_more_alike_they_are() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), 10)
    common, own = rng.normal(size=400)[groups], rng.normal(size=4000)
    found = [statistics.worth(np.sqrt(a) * common + np.sqrt(1 - a) * own, 0.05, groups) for a in (0.0, 0.5, 1.0)]
    assert found[0] > 3000 > found[1] > found[2]
    assert abs(found[2] - 400) < 40
    assert statistics.worth(own, 0.05, np.arange(4000)) == 4000


def test_groups_too_few_for_the_promise_are_refused_with_what_they_are_worth() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 30)
    raw = np.exp(rng.normal(size=40)[groups] + 0.05 * rng.normal(size=1200))[:, np.newaxis]
    expected = r"1200 inputs in the threshold half, worth \d+ independent ones; expected at least 199 "
    with pytest.raises(ModelError, match=expected):
        statistics.set_thresholds(raw, np.zeros(1200, np.int64), 1, 0.01, scale=np.ones(1), groups=groups)


def test_p_values_fall_as_scores_rise_and_are_never_zero() -> None:
    raw = np.random.default_rng(0).chisquare(5, size=(1000, 1))
    limits = statistics.set_thresholds(raw, np.zeros(1000, dtype=np.int64), 1, 0.01, scale=np.ones(1))
    scores, shares = zip(*limits.score_to_p, strict=True)
    assert list(scores) == sorted(scores)
    assert list(shares) == sorted(shares, reverse=True)
    assert shares[-1] > 0


@pytest.mark.parametrize(("flagged", "count"), [(0, 100), (1, 100), (5, 50), (49, 50)])
def test_the_upper_bound_of_a_rate_is_clopper_pearsons(flagged: int, count: int) -> None:
    expected = scipy.stats.beta.ppf(0.95, flagged + 1, count - flagged)
    assert statistics.rate_upper(flagged, count) == pytest.approx(expected, abs=1e-6)


def test_a_class_without_inputs_promises_nothing() -> None:
    assert statistics.rate_upper(0, 0) == 1.0


@pytest.mark.parametrize(("k", "n", "p"), [(0, 10, 0.1), (3, 10, 0.5), (200, 1000, 0.2), (10, 10, 0.3)])
def test_the_binomial_tail_agrees_with_plain_summation(k: int, n: int, p: float) -> None:
    plain = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
    assert statistics.binomial_cdf(k, n, p) == pytest.approx(plain, rel=1e-9)


def test_features_that_are_not_finite_are_refused() -> None:
    features = gaussian(100)
    features[3, 3] = np.nan
    with pytest.raises(ModelError):
        statistics.fit(features, [Block(detector="a", parts=((0, 1, 2, 3),))])


def test_how_groups_differ_is_in_the_covariance_though_each_class_has_few() -> None:
    rng = np.random.default_rng(0)

    def tracks(count: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and groups of inputs in tracks of 20, classes in turn: tracks differ much, inputs of one hardly."""
        groups = np.repeat(np.arange(count), 20)
        features = rng.normal(size=(count, 24))[groups] + rng.normal(scale=0.1, size=(20 * count, 24))
        return answered(features, 0.99 * np.eye(10)[groups % 10] + 0.001), groups

    features, groups = tracks(20)
    fresh, _ = tracks(200)
    distance = {}
    for name, known in (("known", groups), ("unknown", None)):
        fitted = statistics.fit(
            features, [Block(detector="all", parts=(tuple(range(24)),), factors=0)], tuple(range(24, 34)), groups=known
        )
        distance[name] = statistics.raw_scores(fitted, fresh).mean()
    assert distance["known"] < 1.5 * 24 < distance["unknown"]
