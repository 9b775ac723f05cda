"""The verdict on one input: what was scored, by which stages, and why it is flagged or not."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Literal

import msgspec

from edgeguard.contract import scores as decision

Status = Literal["clean", "flagged", "not checked", "not audited"]
Audit = Literal["not available", "not needed", "done", "no budget"]

ONE_PASS = "one-pass"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard thinks of one input.

    ``predicted`` is the class index, None for a model without classes. ``score`` is the largest of ``scores``, each
    divided by its threshold, or what the cascade made of it over its own; NaN means not checked. ``p_value`` is the
    share of clean calibration inputs that score at least as high, None where it is unknown. ``stages`` lists the
    checks that ran, ``evidence`` what the dearer ones measured. ``audit`` says how the dearer checks stand: there
    are none, nothing hung on them (not doubtful, or flagged anyway), they ran, or they should have run but the budget
    was spent.
    """

    predicted: int | None
    score: float
    scores: Mapping[str, float]
    p_value: float | None
    stages: tuple[str, ...]
    reason: str
    evidence: Mapping[str, float] = msgspec.field(default_factory=dict)
    audit: Audit = "not available"

    @property
    def status(self) -> Status:
        """``not checked`` is never ``clean``, and neither is a doubtful input that the budget did not reach."""
        if math.isnan(self.score):
            return "not checked"
        if decision.is_flagged(self.score):
            return "flagged"
        return "not audited" if self.audit == "no budget" else "clean"

    @property
    def flagged(self) -> bool:
        """True when the joint score exceeds the threshold."""
        return self.status == "flagged"


def judge(
    predicted: int | None, scores: Mapping[str, float], score_to_p: Sequence[tuple[float, float]] = ()
) -> Verdict:
    """Apply the decision rule to the scores of one input.

    Args:
        predicted: class index, or None for a model without classes.
        scores: per detector, the raw score divided by its threshold.
        score_to_p: pairs (joint score, share of clean inputs at or above it), ascending in score.
    """
    score = decision.joint(scores.values())
    if math.isnan(score):
        return not_checked(predicted, scores, "a score is missing or not a number")
    name = max(scores, key=lambda detector: scores[detector])
    relation = "above" if decision.is_flagged(score) else "within"
    return Verdict(
        predicted=predicted,
        score=score,
        scores=dict(scores),
        p_value=p_value(score, score_to_p),
        stages=(ONE_PASS,),
        reason=f"{name} {score:.2f}, {relation} the threshold of {decision.THRESHOLD:g}",
    )


def not_checked(predicted: int | None, scores: Mapping[str, float], reason: str) -> Verdict:
    """The verdict on an input that no score speaks about."""
    return Verdict(predicted=predicted, score=math.nan, scores=dict(scores), p_value=None, stages=(), reason=reason)


def p_value(score: float, score_to_p: Sequence[tuple[float, float]]) -> float | None:
    """Share of clean calibration inputs that score at least ``score``; never below the table's last entry."""
    if not score_to_p:
        return None
    index = bisect_left(score_to_p, score, key=itemgetter(0))
    return score_to_p[min(index, len(score_to_p) - 1)][1]
