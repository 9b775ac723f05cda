"""A window: counts that add up, evidence that equals the plain formula, messages that fit."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.agent.window import AlertLimit, Identity, Window, alert_builder
from edgeguard.contract.messages import MAX_EVIDENCE, MAX_PAYLOAD, Alert, Report, decode, encode
from edgeguard.contract.scores import EDGES
from edgeguard.detection.verdict import Verdict, judge

BOOT = "00000000000000aa"
IDENTITY = Identity("a" * 64, "b" * 64)


def verdict(label: int | None, score: float) -> Verdict:
    return judge(label, {"linf": score})


def features(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def close(window: Window) -> Report:
    """The report as the hub would decode it."""
    return decode(Report, encode(window.report(boot=BOOT, seq=1, ended_ms=9)))


INPUTS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 5)),
        st.one_of(st.floats(0, 100, width=32), st.sampled_from([*EDGES, math.nan, math.inf])),
        st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3),
    ),
    max_size=60,
)


@given(INPUTS)
def test_counts_add_up_whatever_comes(inputs: list[tuple[int | None, float, list[float]]]) -> None:
    window = Window(IDENTITY, 3, started_ms=1)
    for label, score, values in inputs:
        window.add(verdict(label, score), features(*values))
    report = close(window)
    assert report.inputs == len(inputs) == sum(one.inputs for one in report.labels) + report.unchecked
    assert report.unchecked == sum(math.isnan(score) for _, score, _ in inputs)
    assert sum(report.histogram) == report.inputs - report.unchecked
    flagged = sum(score > 1 for _, score, _ in inputs)
    assert sum(one.flagged for one in report.labels) == flagged == sum(report.histogram[EDGES.index(1.0) + 1 :])
    assert sum(one.flagged for one in report.evidence) == flagged


def test_evidence_is_the_mean_and_spread_of_flagged_and_unflagged() -> None:
    rng = np.random.default_rng(0)
    flagged, unflagged = rng.normal(5, 1, (7, 4)).astype(np.float32), rng.normal(0, 2, (30, 4)).astype(np.float32)
    window = Window(IDENTITY, 4, started_ms=1)
    for row in unflagged:
        window.add(verdict(3, 0.5), row)
    for row in flagged:
        window.add(verdict(3, 1.5), row)
    (evidence,) = close(window).evidence
    assert (evidence.label, evidence.flagged, evidence.unflagged) == (3, 7, 30)
    np.testing.assert_allclose(evidence.flagged_mean, flagged.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evidence.unflagged_mean, unflagged.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evidence.unflagged_std, unflagged.std(0), rtol=1e-5)


def test_a_constant_feature_has_no_spread() -> None:
    window = Window(IDENTITY, 1, started_ms=1)
    for _ in range(9):
        window.add(verdict(0, 0.5), features(123.456))
    window.add(verdict(0, 1.5), features(1))
    assert close(window).evidence[0].unflagged_std[0] < 1e-4


def test_a_label_without_unflagged_inputs_has_no_unflagged_vectors() -> None:
    window = Window(IDENTITY, 1, started_ms=1)
    window.add(verdict(0, 2.0), features(1))
    report = close(window)
    assert (report.evidence[0].unflagged_mean, report.evidence[0].unflagged_std) == ((), ())
    assert report.activation is None


def test_a_clean_window_carries_no_evidence_but_its_activations() -> None:
    window = Window(IDENTITY, 2, started_ms=1)
    window.add(verdict(0, 0.5), features(1, 3))
    window.add(verdict(1, 0.5), features(3, 5))
    window.add_unchecked()
    report = close(window)
    assert report.evidence == ()
    assert report.activation is not None
    assert (report.activation.inputs, report.activation.mean) == (2, (2.0, 4.0))


def test_a_model_without_classes_counts_under_minus_one() -> None:
    window = Window(IDENTITY, 1, started_ms=1)
    window.add(verdict(None, 0.5), features(1))
    assert close(window).labels[0].label == -1


def test_features_that_are_not_finite_are_not_checked() -> None:
    window = Window(IDENTITY, 1, started_ms=1)
    window.add(verdict(0, 2.0), features(math.inf))
    report = close(window)
    assert (report.inputs, report.unchecked, report.labels) == (1, 1, ())


def test_the_labels_with_most_flags_bring_the_evidence() -> None:
    window = Window(IDENTITY, 1, started_ms=1)
    for label in range(MAX_EVIDENCE + 6):
        for _ in range(2 if label >= 6 else 1):
            window.add(verdict(label, 2.0), features(1))
    assert sorted(one.label for one in close(window).evidence) == list(range(6, MAX_EVIDENCE + 6))


def test_the_largest_report_fits_a_message() -> None:
    size = 4096
    window = Window(IDENTITY, size, started_ms=1)
    rng = np.random.default_rng(0)
    for label in range(40):
        for score in (0.5, 2.0, *([2.0] if label == 17 else [])):
            window.add(verdict(label, score), (rng.normal(size=size) * 1e-7).astype(np.float32))
    payload = encode(window.report(boot=BOOT, seq=2**53, ended_ms=2**53))
    assert len(payload) <= MAX_PAYLOAD
    report = decode(Report, payload)
    assert report.evidence[0].label == 17
    assert report.inputs == 81


@pytest.mark.parametrize(("per_minute", "allowed"), [(0, 0), (3, 3), (1000, 10)])
def test_so_many_alerts_go_out_at_once(per_minute: int, allowed: int) -> None:
    limit, sent = AlertLimit.full(per_minute, 100.0), 0
    for _ in range(10):
        may, limit = limit.take(100.0)
        sent += may
    assert sent == allowed


def test_alerts_refill_with_time_up_to_a_minutes_worth() -> None:
    limit = AlertLimit.full(6, 0.0)
    for _ in range(6):
        _, limit = limit.take(0.0)
    assert not limit.take(9.0)[0]
    assert limit.take(10.0)[0]
    _, rested = limit.take(10_000.0)
    assert rested.tokens == 5.0


def test_an_alert_tells_label_and_scores_and_survives_infinity() -> None:
    build = alert_builder(verdict(2, math.inf), IDENTITY, at_ms=5)
    message = decode(Alert, encode(build(BOOT, 4)))
    assert (message.seq, message.label, message.model_digest) == (4, 2, "a" * 64)
    assert message.score == message.scores["linf"] > 1e38
