"""The gate: every rule can fail on its own, and what was not measured does not pass."""

from __future__ import annotations

import math

import pytest

from edgeguard.repair import gate
from edgeguard.repair.gate import Measured


def measured(
    accuracy: float = 0.99, recall: float = 0.98, success: float = 0.0, inputs: int = 100, kept: float = 0.0
) -> Measured:
    return Measured(
        clean_accuracy=accuracy, target_recall=recall, recall_inputs=inputs, success=success, kept_success=kept
    )


BEFORE = measured(success=1.0, kept=1.0)


def test_a_good_repair_passes() -> None:
    assert gate.decide(BEFORE, measured(0.975, 0.96, 0.03), residual_success=0.0).passed


@pytest.mark.parametrize(
    ("after", "residual", "rule"),
    [
        (measured(accuracy=0.96), 0.0, "clean accuracy lost"),
        (measured(recall=0.94), 0.0, "recall of the target label lost"),
        (measured(success=0.06), 0.0, "success of the unlearned triggers"),
        (measured(kept=0.06), 0.0, "success of the triggers kept from the repair"),
        (measured(kept=math.nan), 0.0, "success of the triggers kept from the repair"),
        (measured(), 0.06, "success of a newly sought trigger"),
        (measured(accuracy=math.nan), 0.0, "clean accuracy lost"),
        (measured(recall=math.nan), 0.0, "recall of the target label lost"),
        (measured(success=math.nan), 0.0, "success of the unlearned triggers"),
        (measured(), math.nan, "success of a newly sought trigger"),
    ],
)
def test_one_broken_rule_stops_the_release(after: Measured, residual: float, rule: str) -> None:
    decision = gate.decide(BEFORE, after, residual_success=residual)
    assert not decision.passed
    assert [check.name for check in decision.checks if not check.passed] == [rule]


@pytest.mark.parametrize("kept", [0.8, 0.0, math.nan])
def test_triggers_that_did_not_work_before_the_repair_prove_nothing(kept: float) -> None:
    decision = gate.decide(measured(success=1.0, kept=kept), measured(), residual_success=0.0)
    assert [check.name for check in decision.checks if not check.passed] == [
        "failure of these triggers before the repair"
    ]


def test_with_few_inputs_of_the_target_label_one_of_them_may_be_lost() -> None:
    before, after = measured(recall=1.0, inputs=20, kept=1.0), measured(recall=0.95, inputs=20)
    assert gate.decide(before, after, residual_success=0.0).passed
    assert not gate.decide(before, measured(recall=0.90, inputs=20), residual_success=0.0).passed


def test_no_checks_at_all_is_not_a_pass() -> None:
    assert not gate.Decision(()).passed
