"""The gate: every rule can fail on its own, limits apply to bounds, and what was not measured does not pass."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.repair import gate
from edgeguard.repair.gate import Ints, Measured, Successes

CLASSES = 4
RECOVERED = Successes(kind="unlearned", inputs=1000, before=990, after=2)
KEPT = Successes(kind="kept", inputs=1000, before=980, after=3)
SHARED = Successes(kind="quarantined", inputs=50, before=50, after=0)


def answers(labels: Ints, wrong: dict[int, int]) -> Ints:
    """The true labels, but so many wrong answers in each class."""
    found = labels.copy()
    for label, count in wrong.items():
        found[np.flatnonzero(labels == label)[:count]] = (label + 1) % CLASSES
    return found


def measured(
    wrong: dict[int, int] | None = None,
    *,
    per_class: int = 500,
    successes: tuple[Successes, ...] = (RECOVERED, KEPT, SHARED),
    residual: float | None = 0.0,
) -> Measured:
    labels: Ints = np.repeat(np.arange(CLASSES), per_class).astype(np.int64)
    after = answers(labels, wrong or {})
    return Measured(labels=labels, before=labels, after=after, successes=successes, residual=residual)


def failed(found: Measured) -> list[str]:
    return [check.name for check in gate.decide(found, classes=CLASSES).checks if check.state == "failed"]


def test_a_good_repair_passes() -> None:
    decision = gate.decide(measured({1: 4}), classes=CLASSES)
    assert decision.outcome == "passed"
    assert decision.as_dict()["passed"] is True


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (measured({0: 12, 1: 12, 2: 12, 3: 12}), "clean accuracy lost"),
        (measured({2: 29}, per_class=600), "recall of class 2 lost"),
        (
            measured(successes=(replace(RECOVERED, after=40), KEPT)),
            "success of the recovered triggers",
        ),
        (
            measured(successes=(RECOVERED, replace(KEPT, after=40))),
            "success of the triggers kept from the repair",
        ),
        (
            measured(successes=(KEPT, replace(SHARED, after=5))),
            "quarantined inputs still called the target",
        ),
        (
            measured(successes=(RECOVERED, replace(KEPT, before=500))),
            "failure before the repair of what judges it",
        ),
        (measured(successes=(RECOVERED,)), "failure before the repair of what judges it"),
        (measured(residual=0.3), "success of what a re-audit found"),
        (measured(residual=math.nan), "success of what a re-audit found"),
    ],
)
def test_one_broken_rule_stops_the_release(found: Measured, rule: str) -> None:
    assert failed(found) == [rule]
    assert gate.decide(found, classes=CLASSES).outcome == "failed"


def test_a_loss_that_chance_explains_does_not_fail() -> None:
    assert not failed(measured({0: 3}, per_class=20))  # 3.75 points of 80 inputs


def test_with_fewer_than_100_inputs_of_a_class_an_owner_decides() -> None:
    decision = gate.decide(measured(per_class=99), classes=CLASSES)
    assert decision.outcome == "needs approval"
    assert [check.state for check in decision.checks].count("not checkable") == 1
    assert "99 inputs of one, 100 needed" in decision.reason


def test_a_class_that_certainly_lost_too_much_fails_however_few_inputs_it_has() -> None:
    assert failed(measured({3: 20}, per_class=40)) == ["clean accuracy lost", "recall of class 3 lost"]


def test_a_class_without_any_input_is_not_checkable() -> None:
    labels: Ints = np.zeros(500, dtype=np.int64)
    found = Measured(labels=labels, before=labels, after=labels, successes=(KEPT,), residual=0.0)
    assert gate.decide(found, classes=2).outcome == "needs approval"


def test_without_a_framework_to_audit_with_an_owner_decides() -> None:
    assert gate.decide(measured(residual=None), classes=CLASSES).outcome == "needs approval"


def test_a_decision_survives_json() -> None:
    for found in (measured(), measured(residual=math.nan), measured(per_class=20, residual=None)):
        decision = gate.decide(found, classes=CLASSES)
        again = gate.Decision.from_dict(json.loads(json.dumps(decision.as_dict())))
        assert again.as_dict() == decision.as_dict()


def test_no_inputs_at_all_is_not_a_pass() -> None:
    nothing: Ints = np.zeros(0, dtype=np.int64)
    found = Measured(labels=nothing, before=nothing, after=nothing, successes=(), residual=0.0)
    assert gate.decide(found, classes=CLASSES).outcome == "failed"
    assert gate.Decision(()).outcome == "failed"


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 5000))
def test_a_bound_lies_below_what_was_measured_and_nears_it_with_more_inputs(lost: int, gained: int, rest: int) -> None:
    count = lost + gained + rest + 1
    bound = gate.loss_lower(lost, gained, count)
    assert bound <= max((lost - gained) / count, 0.0)
    assert gate.loss_lower(100 * lost, 100 * gained, 100 * count) >= bound or lost < gained


@pytest.mark.parametrize(("hits", "count", "lower"), [(0, 50, 0.0), (5, 50, 0.0402), (50, 50, 0.9418)])
def test_the_bound_of_a_share_is_clopper_and_pearsons(hits: int, count: int, lower: float) -> None:
    assert gate.share_lower(hits, count) == pytest.approx(lower, abs=1e-4)


def test_labels_that_the_untouched_file_gets_wrong_tell_of_no_loss() -> None:
    labels: Ints = np.repeat(np.arange(CLASSES), 500).astype(np.int64)
    scrambled = (labels + 1) % CLASSES
    found = replace(measured(), before=scrambled, after=(labels + 2) % CLASSES)
    assert "errors of the untouched file on these labels" in failed(found)


def test_a_class_that_the_untouched_file_gets_wrong_is_the_owners_to_judge() -> None:
    found = measured()
    lost = replace(found, before=answers(found.labels, {2: 400}), after=answers(found.labels, {2: 400}))
    decision = gate.decide(lost, classes=CLASSES)
    assert decision.outcome == "needs approval"
    assert "the untouched file gets most of class 2 wrong" in decision.reason
