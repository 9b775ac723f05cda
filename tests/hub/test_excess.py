"""The statistics of flag rates: what they promise under the null, and what liars can do to the estimates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, betabinom

from edgeguard.detection.statistics import rate_upper
from edgeguard.hub import excess


def counts(
    seed: int, devices: int, rate: float, *, spread: float = 0.25, inputs: int = 400, classes: int = 10
) -> tuple[excess.Floats, excess.Floats]:
    """Beta-binomial counts ``[devices, classes]`` of one mean rate."""
    rng = np.random.default_rng(seed)
    precision = 1 / excess.correlation(spread, np.asarray(rate)) - 1
    own = rng.beta(rate * precision, (1 - rate) * precision, (devices, classes))
    n = np.full((devices, classes), float(inputs))
    return n, rng.binomial(inputs, own).astype(np.float64)


@pytest.mark.parametrize(("flagged", "count"), [(0, 20), (0, 300), (1, 90), (4, 200), (20, 1000)])
@pytest.mark.parametrize("classes", [1, 10, 43])
def test_a_widened_bound_holds_for_all_classes_together(flagged: int, count: int, classes: int) -> None:
    wide = excess.widened(np.full(classes, rate_upper(flagged, count)))
    # What the calibration leaves open, by Clopper and Pearson at the confidence that Bonferroni asks for.
    assert wide[0] >= beta.ppf(1 - excess.CALIBRATION_RISK / classes, flagged + 1, count - flagged) - 1e-9


def test_the_usual_rate_of_a_fleet_is_its_rate() -> None:
    found = excess.rates(*counts(0, 500, 0.02))
    np.testing.assert_allclose(found, 0.02, rtol=0.1)


@pytest.mark.parametrize(("liars", "most"), [(0.01, 1.1), (0.1, 1.6), (0.2, 2.5)])
def test_liars_who_flag_everything_move_the_usual_rate_little(liars: float, most: float) -> None:
    inputs, flagged = counts(1, 500, 0.02)
    flagged[: int(liars * 500)] = 400
    assert excess.rates(inputs, flagged).max() < most * 0.02 * 1.15


def test_a_class_without_inputs_has_no_flags() -> None:
    assert excess.rates(np.zeros((3, 2)), np.zeros((3, 2))).tolist() == [0, 0]


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_the_dispersion_is_found_within_a_step_or_two(spread: float, rate: float) -> None:
    inputs, flagged = counts(2, 400, rate, spread=spread, inputs=2000)
    found = excess.dispersion(inputs, flagged, np.full(10, rate))
    assert spread / 2.2 < found < spread * 2.2


@pytest.mark.parametrize("lie", ["silent", "half of everything", "one class each"])
def test_a_fifth_of_liars_moves_the_dispersion_within_bounds(lie: str) -> None:
    inputs, flagged = counts(3, 500, 0.02, inputs=2000)
    if lie == "silent":
        flagged[:100] = 0
    elif lie == "half of everything":
        flagged[:100] = 1000
    else:
        flagged[np.arange(100), np.arange(100) % 10] = 800
    found = excess.dispersion(inputs, flagged, excess.rates(inputs, flagged))
    assert 0.25 / 3 < found < 0.25 * 4


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.06])
@pytest.mark.parametrize("looks", [1, 30])
def test_below_the_bound_a_ratio_seldom_ever_reaches_what_its_alpha_allows(rate: float, looks: int) -> None:
    """Ville's inequality, for rates that each device keeps: looked at again and again as counts grow."""
    rng = np.random.default_rng(4)
    devices, bound, spread = 4000, 0.06, 0.25
    precision = 1 / excess.correlation(spread, np.asarray(bound)) - 1
    own = rng.beta(rate * precision, (1 - rate) * precision, devices)
    n, k, largest = np.zeros(devices), np.zeros(devices), np.full(devices, -np.inf)
    for _ in range(looks):
        n, k = n + 50, k + rng.binomial(50, own)
        largest = np.maximum(largest, excess.log_ratio(n, k, np.full(devices, bound), spread))
    for alpha in (0.05, 0.01):
        assert np.mean(largest >= -np.log(alpha)) <= alpha + 2 * np.sqrt(alpha / devices)


def test_the_ratio_at_the_bound_has_a_mean_of_one() -> None:
    k = np.arange(101.0)
    ratio = np.exp(excess.log_ratio(np.full(101, 100.0), k, np.full(101, 0.05), 0.25))
    precision = 1 / float(excess.correlation(0.25, np.asarray(0.05))) - 1
    assert float(ratio @ betabinom.pmf(k, 100, 0.05 * precision, 0.95 * precision)) == pytest.approx(1.0)


@pytest.mark.parametrize("odd", [0.01, 0.1])
def test_odd_devices_alone_are_no_evidence(odd: float) -> None:
    ratio = np.full(int(1000 * odd), 200.0)
    found = excess.log_evidence(ratio, np.ones(ratio.size), 1000 - ratio.size, odd=odd, cap=50.0)
    assert found < 1.0


def test_silent_devices_do_not_outweigh_those_that_show_something() -> None:
    ratio = np.full(20, 30.0)
    few = excess.log_evidence(ratio, np.ones(20), 100, odd=1e-4, cap=5.0)
    many = excess.log_evidence(ratio, np.ones(20), 10_000, odd=1e-4, cap=5.0)
    assert few > many > 15


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_no_device_adds_more_than_the_cap_times_its_weight(weight: float) -> None:
    found = excess.log_evidence(np.array([1e6]), np.array([weight]), 50, odd=1e-9, cap=2.0)
    assert found <= 2.0 * weight


def test_the_share_of_odd_devices_is_seen_at_the_other_classes() -> None:
    share = excess.odd_share(np.array([900.0, 1.0, 3.0]), np.full(3, 1000.0))
    assert share[0] == pytest.approx(4.5 / 7000)
    assert share[1] > 0.1
