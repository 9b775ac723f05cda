"""The cascade: one pass for every input; STRIP and squeezing for the doubtful ones and a random few, within a budget.

The one-pass score s costs next to nothing. From the level on that a share ``GREY`` of the fit half reaches (of fresh
clean inputs up to twice as many where the fit half is small), an input is doubtful: clean inputs there are the
ambiguous ones, whose answer wavers when the input is disturbed, while a trigger's does not. So two dearer checks run,
and what they find counts towards the flag:

    F(x) = s exp(WEIGHT sum_k max(0, min(CAP, -log10 p_k) - log10 e))

p_k is the share of clean inputs, among the more suspicious fifth, that are at least as steady: in STRIP's entropy over
overlays, and in the l1 distance that the answer moves under median filters. The mean of -log10 p is log10 e for clean
inputs. Steadiness only ever adds: a trigger that a check does not see is no more hidden for having been checked.

Rules enforced here:

* an input is flagged where F exceeds a threshold of its own, set on the threshold half by the same order statistic as
  the one-pass threshold, so that the cascade as a whole keeps the false-positive rate. Audits at random are not part of
  that promise: they can raise a score by a factor of 2.2, so the share is to stay small;
* extra inferences come out of a budget per second; where it is spent, the one-pass threshold alone flags, and an input
  that is doubtful but below it is "not audited", never clean;
* without a sidecar, with one of too few overlays, or for a model without classes, the one pass decides, and the verdict
  says that no audit is there;
* which inputs are audited at random cannot be told from the input: the generator is the caller's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import logit_columns
from edgeguard.detection.guarded import GuardedModel, Inference
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.squeezing import SQUEEZERS, distances
from edgeguard.detection.statistics import allowed_exceedances, p_table, shares, threshold_of
from edgeguard.detection.strip import Answer, StripLimits, entropy, fit_limits, stopped, strip, superimpose
from edgeguard.detection.verdict import ONE_PASS, Audit, Verdict, p_value
from edgeguard.errors import ConfigError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Clock = Callable[[], float]

GREY = 0.04
REFERENCE = 0.2
WEIGHT = 0.25
CAP = 2.0
MAX_OVERLAYS = 8
SEQUENTIAL_AT = 0.1
SQUEEZED_BY = ("median 2x2", "median 3x3")
MAX_REFERENCE = 200
MIN_REFERENCE = 20

STRIP, SQUEEZING = "strip", "squeezing"
_KEYS = ("cascade", "entropies", "distances", "scores", "p_values")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the dearer stages were calibrated to.

    ``grey``: the one-pass score from which an input is doubtful. ``threshold``: F above it is flagged. ``entropies``
    and ``distances``: of clean inputs, ascending; no distances where inputs are no images. ``score_to_p``: pairs
    (F / threshold, share of clean inputs at or above it), ascending.
    """

    grey: float
    threshold: float
    strip: StripLimits
    entropies: tuple[float, ...]
    distances: tuple[float, ...]
    score_to_p: tuple[tuple[float, float], ...]

    def stages(self) -> dict[str, tuple[float, ...]]:
        """As the sidecar holds them."""
        return {
            "cascade": (self.grey, self.threshold, self.strip.threshold, self.strip.spread),
            "entropies": self.entropies,
            **({"distances": self.distances} if self.distances else {}),
            "scores": tuple(score for score, _ in self.score_to_p),
            "p_values": tuple(p for _, p in self.score_to_p),
        }


def limits_of(stages: Mapping[str, tuple[float, ...]]) -> Limits | None:
    """The limits that a sidecar holds; None where it holds none, or not those of this version."""
    if not set(_KEYS) - {"distances"} <= set(stages) or len(stages["cascade"]) != 4:
        return None
    grey, threshold, entropy, spread = stages["cascade"]
    if not (grey > 0 and threshold > 0 and spread >= 0 and stages["entropies"]):
        return None
    if len(stages["scores"]) != len(stages["p_values"]):
        return None
    return Limits(
        grey=grey,
        threshold=threshold,
        strip=StripLimits(threshold=entropy, spread=spread),
        entropies=tuple(sorted(stages["entropies"])),
        distances=tuple(sorted(stages.get("distances", ()))),
        score_to_p=tuple(zip(stages["scores"], stages["p_values"], strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the dearer stages measured of one input, and how many inferences that took."""

    values: Mapping[str, float]
    forwards: int


def check(
    x: Array,
    answer: Answer,
    overlays: Array,
    limits: StripLimits | None,
    *,
    squeeze: bool,
    before: Floats | None = None,
) -> Checked:
    """Run the dearer stages on one input.

    Args:
        x: in the owner's own type.
        answer: the model.
        overlays: clean inputs [N, ...] of that type; the first ``MAX_OVERLAYS`` are used.
        limits: when STRIP may stop early.
        squeeze: also squeeze; for images.
        before: the model's answer to ``x``, where it is known.

    Returns:
        The entropy in bits, and the mean l1 distance that squeezing moves the answer.
    """
    found = strip(x, overlays[:MAX_OVERLAYS], answer, limits)
    values, forwards = {STRIP: found.entropy}, found.forwards
    if squeeze:
        values[SQUEEZING] = _moved(x, answer, before)
        forwards += len(SQUEEZED_BY) + (before is None)
    return Checked(values=values, forwards=forwards)


def _moved(image: Array, answer: Answer, before: Floats | None = None) -> float:
    """The mean l1 distance that squeezing moves the answer."""
    moved = distances(image, answer, {name: SQUEEZERS[name] for name in SQUEEZED_BY}, before=before)
    return sum(moved.values()) / len(moved)


def worst_cost(limits: Limits) -> int:
    """The most extra inferences that one input can take."""
    return MAX_OVERLAYS + (len(SQUEEZED_BY) if limits.distances else 0)


def share_at_least_as_steady(reference: tuple[float, ...], value: float) -> float:
    """Share of clean inputs whose value is as low or lower; never 0."""
    return (bisect_right(reference, value) + 1) / (len(reference) + 1)


def combined(score: float, values: Mapping[str, float], limits: Limits) -> float:
    """F of a one-pass score and what the dearer stages measured. Never below the score."""
    evidence = 0.0
    for name, reference in ((STRIP, limits.entropies), (SQUEEZING, limits.distances)):
        if name in values and reference:
            share = share_at_least_as_steady(reference, values[name])
            evidence += max(0.0, min(CAP, -math.log10(share)) - math.log10(math.e))
    return score * math.exp(WEIGHT * evidence)


def calibrate(
    fit_inputs: Array,
    fit_scores: Floats,
    threshold_inputs: Array,
    threshold_scores: Floats,
    *,
    fpr: float,
    answer: Answer,
    overlays: Array,
    progress: Callable[[str, int, int], None] | None = None,
) -> Limits | None:
    """Set the limits of the dearer stages on clean inputs; None where there are too few.

    Args:
        fit_inputs, fit_scores: the fit half [N, ...] and its joint one-pass scores [N].
        threshold_inputs, threshold_scores: the threshold half, likewise.
        fpr: the false-positive rate asked of the cascade.
        answer: the model.
        overlays: clean inputs [N, ...] of the fit half; ``MAX_OVERLAYS`` are used, fewer are too few.
        progress: called with a text, the steps done and the steps in total.
    """
    allowed = allowed_exceedances(len(threshold_scores), fpr)
    chosen = np.argsort(-fit_scores)[: max(MIN_REFERENCE, round(REFERENCE * len(fit_scores)))]
    if allowed is None or len(chosen) < MIN_REFERENCE or len(overlays) < MAX_OVERLAYS:
        return None
    squeeze = fit_inputs.dtype == np.uint8 and fit_inputs.ndim == 4 and min(fit_inputs.shape[1:3]) >= 4
    if progress:
        progress("calibrating the dearer checks", 0, 1)
    every = np.asarray(
        [[entropy(answer(superimpose(fit_inputs[i], o))) for o in overlays[:MAX_OVERLAYS]] for i in chosen]
    )
    sequential = fit_limits(every, SEQUENTIAL_AT)
    limits = Limits(
        grey=float(np.quantile(fit_scores, 1.0 - GREY)),
        threshold=1.0,
        strip=sequential,
        entropies=_thinned([stopped(row, sequential) for row in every]),
        distances=_thinned([_moved(fit_inputs[i], answer) for i in chosen] if squeeze else []),
        score_to_p=(),
    )
    joint = threshold_scores.copy()
    for i in np.flatnonzero(threshold_scores >= limits.grey):
        values = check(threshold_inputs[i], answer, overlays, sequential, squeeze=squeeze).values
        joint[i] = combined(float(threshold_scores[i]), values, limits)
    level = threshold_of(joint, allowed)
    return replace(limits, threshold=level, score_to_p=p_table(joint / level))


def _thinned(values: list[float]) -> tuple[float, ...]:
    """At most ``MAX_REFERENCE`` of them that stand for all, ascending."""
    if len(values) <= MAX_REFERENCE:
        return tuple(sorted(float(v) for v in values))
    return tuple(float(v) for v in np.quantile(values, np.linspace(0.0, 1.0, MAX_REFERENCE)))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Extra inferences: ``per_second`` on average, at most ``burst`` at once; an infinite ``burst`` is no limit.

    One input is audited only when all that it can take is there (:func:`worst_cost`): a smaller burst audits nothing.
    """

    per_second: float = 8.0
    burst: float = 30.0

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that are negative or no numbers, and for an infinite rate."""
        if not (0 <= self.per_second < math.inf and self.burst >= 0):
            raise ConfigError(
                "audit budget", got=f"{self.per_second:g} a second, {self.burst:g} at once", expected="0 or more"
            )


UNLIMITED = Budget(per_second=0.0, burst=math.inf)
"""Every doubtful input is audited: for inputs that wait, as in a file."""


class Bucket:
    """What is left of a budget. Full at first."""

    def __init__(self, budget: Budget, now: float) -> None:
        self._budget, self._left, self._at = budget, budget.burst, now

    def affords(self, cost: float, now: float) -> bool:
        """Whether ``cost`` inferences can be spent at ``now`` seconds. A clock that goes back adds nothing."""
        elapsed, self._at = max(0.0, now - self._at), max(now, self._at)
        self._left = min(self._budget.burst, self._left + elapsed * self._budget.per_second)
        return self._left >= cost

    def spend(self, cost: float) -> None:
        """Take ``cost`` inferences out of it."""
        self._left -= cost


class Cascade:
    """A guarded model with its dearer stages. Not for use from several threads at once."""

    def __init__(
        self,
        model: GuardedModel,
        sidecar: Sidecar | None,
        *,
        clock: Clock,
        rng: np.random.Generator,
        budget: Budget | None = None,
        audit_share: float = 0.005,
    ) -> None:
        """Args: the clock gives seconds and never goes back; ``audit_share`` of unsuspicious inputs is checked too.

        Raises:
            ConfigError: a share outside 0 to 1.
        """
        if not 0.0 <= audit_share <= 1.0:
            raise ConfigError("audit share", got=audit_share, expected="0 to 1")
        self._model = model
        self._logits = logit_columns(model.metadata.taps)
        self._overlays = None if sidecar is None else sidecar.overlays
        usable = bool(self._logits) and not model.metadata.calibration.synthetic
        # Entropies under fewer overlays than the limits were calibrated with are not comparable to them.
        if sidecar is None or len(sidecar.overlays) < MAX_OVERLAYS:
            usable = False
        self.limits = limits_of(sidecar.stages) if sidecar is not None and usable else None
        self._clock, self._rng, self._audit_share = clock, rng, audit_share
        self._bucket = Bucket(budget or Budget(), clock())

    def infer(self, x: Array) -> tuple[Inference, int]:
        """Run one input through the one pass and what else it takes; how many inferences that were.

        Raises:
            ModelError: the input does not fit.
        """
        first = self._model.infer(x)
        verdict, limits = first.verdict, self.limits
        if limits is None or verdict.status == "not checked" or self._overlays is None:
            return first, 1
        # From the cascade's own threshold on, the dearer stages could change nothing: they only ever add.
        doubtful = limits.grey <= verdict.score <= limits.threshold
        if verdict.score > limits.threshold or (not doubtful and self._rng.random() >= self._audit_share):
            return replace(first, verdict=_decided(verdict, {}, limits, "not needed")), 1
        if not self._bucket.affords(worst_cost(limits), self._clock()):
            if not doubtful:
                return replace(first, verdict=_decided(verdict, {}, limits, "not needed")), 1
            reason = f"{verdict.reason}; doubtful, but the budget for audits is spent"
            return replace(first, verdict=replace(verdict, audit="no budget", reason=reason)), 1
        before = self._shares(first.features)
        found = check(x, self._answer, self._overlays, limits.strip, squeeze=bool(limits.distances), before=before)
        self._bucket.spend(found.forwards)
        return replace(first, verdict=_decided(verdict, found.values, limits, "done")), 1 + found.forwards

    def _answer(self, x: Array) -> Floats:
        return self._shares(self._model.infer(x).features)

    def _shares(self, features: npt.NDArray[np.float32]) -> Floats:
        return np.asarray(shares(features.astype(np.float64)[np.newaxis], self._logits)[0])


def _decided(verdict: Verdict, values: Mapping[str, float], limits: Limits, audit: Audit) -> Verdict:
    score = combined(verdict.score, values, limits) / limits.threshold
    steady = [
        f"{name} {values[name]:.2f}, as steady as {share_at_least_as_steady(reference, values[name]):.0%} of clean ones"
        for name, reference in ((STRIP, limits.entropies), (SQUEEZING, limits.distances))
        if name in values
    ]
    steady.append(f"together {score:.2f}, {'above' if score > 1.0 else 'within'} the threshold of 1")
    return replace(
        verdict,
        score=score,
        p_value=p_value(score, limits.score_to_p),
        stages=(ONE_PASS, *values),
        evidence=dict(values),
        audit=audit,
        reason="; ".join([verdict.reason.split(",")[0], *steady]),
    )
