"""What is no backdoor: a fleet or a site that has changed, and a sensor that broke."""

from __future__ import annotations

import numpy as np
import pytest

from edgeguard.hub.drift import Finding, findings
from edgeguard.hub.evidence import Window
from edgeguard.hub.excess import Floats

UPPER = np.full(10, 0.03)
NAMES = tuple(f"site{i % 5}-{i}" for i in range(50))


def counts(rate: float | Floats, *, epochs: int = 8, seed: int = 0) -> Window:
    rng = np.random.default_rng(seed)
    inputs = np.full((50, 10), 40 * epochs)
    return Window(epochs=epochs, inputs=inputs.astype(float), flagged=rng.binomial(inputs, rate).astype(float))


def judge(recent: Window, older: Window | None = None) -> tuple[Finding, ...]:
    total = recent if older is None else Window(
        epochs=None, inputs=recent.inputs + older.inputs, flagged=recent.flagged + older.flagged
    )  # fmt: skip
    return findings(NAMES, recent, total, fpr_upper=UPPER, fpr=0.01)


def kinds(found: tuple[Finding, ...]) -> set[tuple[str, str]]:
    return {(finding.kind, finding.subject) for finding in found}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.03])
def test_a_steady_fleet_has_no_findings(rate: float, seed: int) -> None:
    assert not judge(counts(rate, seed=seed), counts(rate, epochs=100, seed=seed + 50))


def test_all_classes_flagged_more_often_than_before_are_drift_of_the_fleet() -> None:
    found = judge(counts(0.028), counts(0.005, epochs=100))
    assert kinds(found) == {("drift", "fleet")}
    assert "10 of 10 classes" in found[0].text


def test_all_classes_above_their_bound_from_the_start_are_drift_of_the_fleet() -> None:
    assert kinds(judge(counts(0.08))) == {("drift", "fleet")}


def test_one_class_is_no_drift() -> None:
    rate = np.full(10, 0.01)
    rate[3] = 0.4
    assert not judge(counts(rate), counts(0.01, epochs=100))


def test_one_site_whose_classes_all_rise_has_drifted_and_its_sensors_are_whole() -> None:
    rate = np.where(np.array([name.startswith("site2") for name in NAMES]), 0.08, 0.01)[:, None]
    assert kinds(judge(counts(rate), counts(0.01, epochs=100))) == {("drift", "site site2")}


def test_one_device_flagged_everywhere_is_a_broken_sensor() -> None:
    rate = np.full((50, 1), 0.01)
    rate[7] = 0.3
    assert kinds(judge(counts(rate), counts(0.01, epochs=100))) == {("sensor", NAMES[7])}


def test_one_device_flagged_in_one_class_is_none() -> None:
    rate = np.full((50, 10), 0.01)
    rate[7, 3] = 0.9
    assert not judge(counts(rate), counts(0.01, epochs=100))


def test_a_class_without_a_bound_does_not_hide_a_broken_sensor() -> None:
    rate = np.full((50, 10), 0.01)
    rate[:, 0] = 0.6
    rate[7, 1:] = 0.3
    recent = counts(rate)
    upper = np.where(np.arange(10) == 0, 1.0, 0.03)
    found = findings(NAMES, recent, recent, fpr_upper=upper, fpr=0.01)
    assert kinds(found) == {("sensor", NAMES[7])}


def test_a_model_without_classes_has_no_others_to_compare_with() -> None:
    window = Window(epochs=None, inputs=np.full((5, 1), 100.0), flagged=np.full((5, 1), 90.0))
    assert not findings(NAMES[:5], window, window, fpr_upper=np.array([0.03]), fpr=0.01)
