"""The cascade: one pass for every input, further looks at the doubtful ones and a random few, within a budget.

The one-pass score s costs next to nothing. From the level on that a share ``GREY`` of clean inputs reaches, an input is
doubtful, and the model looks at it again, disturbed: first smoothed (as feature squeezing does), then, where that left
it among the most suspicious ``AGAIN``, with a clean input laid over it (as STRIP does), twice. Each look costs one
inference, and measures how far the model's answer moves: the l1 distance of its probabilities, 0 to 2. Clean inputs of
such a score are ambiguous ones, whose answer wavers, while a trigger's does not, or, where smoothing destroys the
trigger, jumps. What is rare among clean inputs counts towards the flag:

    F(x) = s exp(WEIGHT sum_k max(0, min(CAP, -log10 p_k) - log10 e))

p_k is the share of clean inputs from the grey level on whose answer moves as little under look k; for smoothing also
the share whose answer moves as much, whichever is the rarer. log10 e is the mean of -log10 p for clean inputs, of one
tail. Evidence only ever adds: a trigger that a look does not see is no more hidden for having been looked at.

Gao et al.: STRIP, ACSAC 2019, take the entropy of the answers under a hundred overlays (``strip.py``); how far the
answer moves says more under one. Xu, Evans, Qi: Feature Squeezing, NDSS 2018.

Rules enforced here:

* an input is flagged where F exceeds a threshold of its own, set on the threshold half by the same order statistic as
  the one-pass threshold, so that the cascade as a whole keeps the false-positive rate. Audits at random are not part of
  that promise, so their share is to stay small;
* extra inferences come out of a budget per second; where it is spent, the one-pass threshold alone flags, and an input
  that is doubtful but below it is "not audited", never clean;
* without a sidecar, with one of too few overlays, or for a model without classes, the one pass decides, and the verdict
  says that no audit is there;
* which inputs are audited at random cannot be told from the input: the generator is the caller's.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import logit_columns
from edgeguard.contract.scores import joint
from edgeguard.detection.guarded import GuardedModel, Inference, Measured
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.squeezing import smoothed
from edgeguard.detection.statistics import allowed_of, inputs_needed, p_table, shares, threshold_of
from edgeguard.detection.strip import Answer, superimpose
from edgeguard.detection.verdict import ONE_PASS, Audit, Verdict, judge, not_checked, p_value
from edgeguard.errors import ConfigError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Clock = Callable[[], float]

GREY = 0.28
AGAIN = 0.07
WEIGHT = 0.4
CAP = 2.0
FLAGGED_SHARE = 0.1
SIGMA = 0.8
MAX_REFERENCE = 200
MIN_REFERENCE = 20

SQUEEZING = "squeezing"
OVERLAID = ("strip 1", "strip 2", "strip 3")
ON_IMAGES = (SQUEEZING, *OVERLAID[:2])
ON_OTHERS = OVERLAID
_KEYS = ("cascade", "scores", "p_values")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the looks were calibrated to.

    ``grey``: the one-pass score from which an input is doubtful. ``again``: F after the first look from which there are
    more. ``threshold``: F above it is flagged. ``moved``: for each look, in their order, how far answers to clean
    inputs move, ascending. ``score_to_p``: pairs (F / threshold, share of clean inputs at or above it), ascending.
    """

    grey: float
    again: float
    threshold: float
    moved: Mapping[str, tuple[float, ...]]
    score_to_p: tuple[tuple[float, float], ...]

    def stages(self) -> dict[str, tuple[float, ...]]:
        """As the sidecar holds them."""
        return {
            "cascade": (self.grey, self.again, self.threshold),
            **self.moved,
            "scores": tuple(score for score, _ in self.score_to_p),
            "p_values": tuple(p for _, p in self.score_to_p),
        }


def limits_of(stages: Mapping[str, tuple[float, ...]]) -> Limits | None:
    """The limits that a sidecar holds; None where it holds none, or not those of this version."""
    looks = next((looks for looks in (ON_IMAGES, ON_OTHERS) if all(stages.get(name) for name in looks)), None)
    if looks is None or not set(_KEYS) <= set(stages) or len(stages["cascade"]) != 3:
        return None
    grey, again, threshold = stages["cascade"]
    scores, p_values = stages["scores"], stages["p_values"]
    if not (grey > 0 and again > 0 and threshold > 0) or len(scores) != len(p_values):
        return None
    if list(scores) != sorted(scores) or not all(0 < p <= 1 for p in p_values):
        return None
    return Limits(
        grey=grey,
        again=again,
        threshold=threshold,
        moved={name: tuple(sorted(stages[name])) for name in looks},
        score_to_p=tuple(zip(scores, p_values, strict=True)),
    )


def looks_at(inputs: Array) -> tuple[str, ...]:
    """Which looks there are at inputs [N, ...] of this kind: only images can be smoothed."""
    images = inputs.dtype == np.uint8 and inputs.ndim == 4 and min(inputs.shape[1:3]) >= 4
    return ON_IMAGES if images else ON_OTHERS


def disturbed(x: Array, look: str, overlays: Array) -> Array:
    """One input as a look has it. ``overlays``: clean inputs [N, ...] of its type, one for each look that takes one."""
    return smoothed(x, SIGMA) if look == SQUEEZING else superimpose(x, overlays[OVERLAID.index(look)])


def distance(before: Floats, after: Floats) -> float:
    """How far an answer moved: the l1 distance of probabilities [C], 0 to 2."""
    return float(np.abs(before - after).sum())


def worst_cost(limits: Limits) -> int:
    """The most extra inferences that one input can take."""
    return len(limits.moved)


def rarity(look: str, reference: tuple[float, ...], value: float) -> float:
    """Share of clean inputs that are as far out, of which the input itself is one; never 0."""
    count = len(reference) + 1
    as_little = (bisect_right(reference, value) + 1) / count
    if look != SQUEEZING:
        return as_little
    return min(as_little, (len(reference) - bisect_left(reference, value) + 1) / count)


def combined(score: float, values: Mapping[str, float], limits: Limits) -> float:
    """F of a one-pass score and how far each look moved the answer. Never below the score."""
    evidence = sum(
        max(0.0, min(CAP, -math.log10(rarity(look, reference, values[look]))) - math.log10(math.e))
        for look, reference in limits.moved.items()
        if look in values
    )
    return score * math.exp(WEIGHT * evidence)


def look(x: Array, score: float, before: Floats, answer: Answer, overlays: Array, limits: Limits) -> dict[str, float]:
    """Look at one input as often as its score asks for.

    Args:
        x: in the owner's own type.
        score: its one-pass score.
        before: the model's answer to it [C].
        answer: the model.
        overlays: clean inputs [N, ...] of that type.
        limits: what the looks were calibrated to.

    Returns:
        How far each look moved the answer. What is no longer suspicious after the first gets no more.
    """
    values: dict[str, float] = {}
    for name in limits.moved:
        if values and combined(score, values, limits) < limits.again:
            break
        values[name] = distance(before, answer(disturbed(x, name, overlays)))
    return values


def calibrate(
    fit_inputs: Array,
    fit_scores: Floats,
    threshold_inputs: Array,
    threshold_scores: Floats,
    *,
    fpr: float,
    answer: Answer,
    overlays: Array,
    groups: npt.NDArray[np.int64] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Limits | None:
    """Set the limits of the looks on clean inputs; None where there are too few.

    Args:
        fit_inputs, fit_scores: the fit half [N, ...] and its joint one-pass scores [N], by statistics that did not see
            the input: those that did score it lower than a fresh one.
        threshold_inputs, threshold_scores: the threshold half, likewise.
        fpr: the false-positive rate asked of the cascade.
        answer: the model.
        overlays: clean inputs [N, ...] of the fit half, one for each look that takes one; fewer are too few.
        groups: which inputs of the threshold half [N] belong together.
        progress: called with a text, the steps done and the steps in total.
    """
    names = looks_at(fit_inputs)
    grey = float(np.quantile(fit_scores, 1.0 - GREY)) if len(fit_scores) else 0.0
    chosen = np.flatnonzero(fit_scores >= grey)
    if len(threshold_scores) < inputs_needed(fpr) or len(chosen) < MIN_REFERENCE or len(overlays) < len(OVERLAID):
        return None
    moved: dict[str, list[float]] = {name: [] for name in names}
    for done, index in enumerate(chosen):
        if progress and done % 50 == 0:
            progress("calibrating the further looks", done, len(chosen))
        before = answer(fit_inputs[index])
        for name in names:
            moved[name].append(distance(before, answer(disturbed(fit_inputs[index], name, overlays))))
    limits = Limits(
        grey=grey,
        again=1.0,
        threshold=math.inf,
        moved={name: _thinned(values) for name, values in moved.items()},
        score_to_p=(),
    )
    first = [
        combined(float(fit_scores[index]), {names[0]: moved[names[0]][place]}, limits)
        for place, index in enumerate(chosen)
    ]
    # Of all clean inputs a share AGAIN is looked at again: of those from the grey level on, so many more.
    limits = replace(limits, again=float(np.quantile(first, max(0.0, 1.0 - AGAIN * len(fit_scores) / len(chosen)))))
    joint = threshold_scores.copy()
    for index in np.flatnonzero(threshold_scores >= grey):
        x, score = threshold_inputs[index], float(threshold_scores[index])
        joint[index] = combined(score, look(x, score, answer(x), answer, overlays, limits), limits)
    allowed = allowed_of(joint, fpr, groups)
    if allowed is None:
        return None
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

    per_second: float = 9.3
    burst: float = 15.0

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


class Allowance:
    """A budget in two parts: ``FLAGGED_SHARE`` of it for inputs that are flagged already, the rest for the others.

    So an attacker who shows one obvious trigger after another does not use up what less obvious ones would have got.
    """

    def __init__(self, budget: Budget, worst: float, now: float) -> None:
        """Args: the budget, what one input can take at most, and the time in seconds."""
        self._worst = worst
        if math.isinf(budget.burst):
            self._buckets = {True: Bucket(budget, now), False: Bucket(budget, now)}
            return
        own = worst if budget.burst >= 2 * worst else 0.0  # too little for two parts
        rate = FLAGGED_SHARE * budget.per_second if own else 0.0
        self._buckets = {
            True: Bucket(Budget(per_second=rate, burst=own), now),
            False: Bucket(Budget(per_second=budget.per_second - rate, burst=budget.burst - own), now),
        }

    def affords(self, *, flagged: bool, now: float) -> bool:
        """Whether an input can be audited at ``now`` seconds."""
        return self._buckets[flagged].affords(self._worst, now)

    def spend(self, cost: float, *, flagged: bool) -> None:
        """Take ``cost`` inferences out of it."""
        self._buckets[flagged].spend(cost)


class Cascade:
    """A guarded model with its further looks. Not for use from several threads at once."""

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
        limits = limits_of(sidecar.stages) if sidecar is not None and usable else None
        if limits is not None and sidecar is not None:
            # A sidecar may come from outside: looks that inputs of this kind cannot take are no looks.
            fits = len(sidecar.overlays) >= len(OVERLAID) and tuple(limits.moved) == looks_at(sidecar.overlays)
            limits = limits if fits else None
        self.limits = limits
        self.audit_share = audit_share
        self._clock = clock
        # One draw for each input: NumPy's generator takes five times as long for a single number.
        self._draw = random.Random(int(rng.integers(1 << 62))).random
        self._allowance = Allowance(budget or Budget(), 0 if self.limits is None else worst_cost(self.limits), clock())

    def infer(self, x: Array, *, looks: bool = True) -> tuple[Inference, int]:
        """Run one input through the one pass and what else it takes; how many inferences that were.

        Without ``looks`` nothing else is done, as if the budget were spent.

        Raises:
            ModelError: the input does not fit.
        """
        first = self._model.measure(x)
        verdict, taken = self._verdict(x, first, looks=looks)
        return Inference(first.outputs, first.features, verdict), 1 + taken

    def _verdict(self, x: Array, first: Measured, *, looks: bool) -> tuple[Verdict, int]:
        """The verdict on an input, and how many looks it took."""
        limits, score = self.limits, joint(first.scores.values())
        if first.doubt:
            return not_checked(first.predicted, first.scores, first.doubt), 0
        if limits is None or self._overlays is None or math.isnan(score):
            return judge(first.predicted, first.scores, self._model.metadata.score_to_p), 0
        # Looks only ever add: one flagged already stays so, and is looked at for how sure that is.
        flagged, doubtful = score > limits.threshold, score >= limits.grey
        if not doubtful and self._draw() >= self.audit_share:
            return _decided(first, score, {}, limits, "not needed"), 0
        if not (looks and self._allowance.affords(flagged=flagged, now=self._clock())):
            if flagged or not doubtful:
                return _decided(first, score, {}, limits, "not needed"), 0
            alone = judge(first.predicted, first.scores, self._model.metadata.score_to_p)
            reason = f"{alone.reason}; doubtful, but the budget for audits is spent"
            return msgspec.structs.replace(alone, audit="no budget", reason=reason), 0
        values = look(x, score, self._shares(first.features), self._answer, self._overlays, limits)
        self._allowance.spend(len(values), flagged=flagged)
        return _decided(first, score, values, limits, "done"), len(values)

    def _answer(self, x: Array) -> Floats:
        return self._shares(self._model.measure(x).features)

    def _shares(self, features: npt.NDArray[np.float32]) -> Floats:
        return np.asarray(shares(features.astype(np.float64)[np.newaxis], self._logits)[0])


def _decided(first: Measured, one_pass: float, values: Mapping[str, float], limits: Limits, audit: Audit) -> Verdict:
    score = (combined(one_pass, values, limits) if values else one_pass) / limits.threshold
    detector = max(first.scores, key=first.scores.__getitem__)
    looked = "".join(
        [
            f"; {name} moves the answer by {value:.2f}, as for {rarity(name, limits.moved[name], value):.0%} of clean "
            "inputs"
            for name, value in values.items()
        ]
    )
    relation = "above" if score > 1.0 else "within"
    return Verdict(
        predicted=first.predicted,
        score=score,
        scores=first.scores,
        p_value=p_value(score, limits.score_to_p),
        stages=(ONE_PASS, *values),
        evidence=dict(values),
        audit=audit,
        reason=f"{detector} {one_pass:.2f}{looked}; together {score:.2f}, {relation} the threshold of 1",
    )
