"""Decides from pooled evidence whether a model is suspicious, for which label and by which channels. Pure.

Rules enforced here:

* a label is suspicious when its pooled flagged inputs would be this many with a probability below ``alpha`` even if
  the model's false-positive rate stood at its upper bound (exact binomial tail);
* several devices must each show an excess of their own: one lying device opens no case;
* a few flagged inputs prove nothing, however rare;
* a label that the calibration never saw, or hardly, has no bound of its own (its ``fpr_upper`` is near 1, which no
  attack exceeds). It is judged by the promise for all inputs together, and never against less than ``UNSEEN_FLOOR``.
  That promise need not hold for one class: such a suspicion is a reason to inspect, and says what it rests on;
* where several labels qualify, the one with the largest excess in standard deviations comes first: a backdoor's
  target label draws most, labels that its failures land on draw less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from scipy.special import betainc

from edgeguard.contract.guard import Tap
from edgeguard.detection.statistics import SLACK
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.evidence import LabelEvidence, Vector

UNSEEN = 0.5
"""A bound from here on says that the calibration saw at most four clean inputs of the class, or flagged most."""
UNSEEN_FLOOR = 0.05


class ChannelShift(msgspec.Struct, frozen=True, kw_only=True):
    """One channel that flagged inputs move: where it is, and how far in standard deviations of unflagged inputs.

    ``channel`` counts within the tapped activation, ``index`` within ``edgeguard_features``.
    """

    tensor: str
    source_layer: str
    kind: str
    channel: int
    index: int
    shift_in_std: float


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """One label of one model that clean inputs do not explain. Counts are those after capping.

    ``calibrated`` is False where the label was judged without a bound of its own.
    """

    model_digest: str
    label: int
    devices: tuple[str, ...]
    flagged: int
    inputs: int
    p_value: float
    excess: float
    channels: tuple[ChannelShift, ...]
    calibrated: bool = True


def assess(
    evidence: Iterable[LabelEvidence],
    policy: PolicyConfig,
    *,
    fpr_upper: Sequence[float],
    fpr: float,
    taps: Sequence[Tap],
    devices: int,
) -> list[Suspicion]:
    """The suspicious labels of one model, the strongest first.

    Args:
        evidence: its pooled evidence, one per label.
        policy: the thresholds.
        fpr_upper: upper bound of the false-positive rate per predicted class; one entry for a model without classes.
        fpr: the promised false-positive rate over all inputs together.
        taps: where the features come from.
        devices: how many devices run the model, whether they reported yet or not.
    """
    found = [_assess_label(item, policy, fpr_upper, fpr, taps, devices) for item in evidence]
    return sorted((s for s in found if s is not None), key=lambda s: (-s.excess, s.label))


def binomial_tail(successes: int, trials: int, rate: float) -> float:
    """P(X >= successes) for X ~ Binomial(trials, rate), exact also where it is tiny."""
    if successes <= 0:
        return 1.0
    if successes > trials:
        return 0.0
    return float(betainc(successes, trials - successes + 1, rate))


def _assess_label(
    item: LabelEvidence, policy: PolicyConfig, fpr_upper: Sequence[float], fpr: float, taps: Sequence[Tap], devices: int
) -> Suspicion | None:
    upper = _upper(fpr_upper, item.label)
    if upper is None or item.flagged < policy.min_flagged:
        return None
    calibrated = upper < UNSEEN
    rate = min(max(upper, 1e-9) if calibrated else max(SLACK * fpr, UNSEEN_FLOOR), 1.0 - 1e-9)
    p_value = binomial_tail(item.flagged, item.inputs, rate)
    own = [d for d in item.per_device if binomial_tail(d.flagged, d.inputs, rate) < policy.device_alpha]
    needed = max(1, min(policy.min_devices, max(devices, len(item.per_device))))
    if p_value >= policy.alpha or len(own) < needed:
        return None
    spread = math.sqrt(item.inputs * rate * (1.0 - rate))
    return Suspicion(
        model_digest=item.model_digest,
        label=item.label,
        devices=tuple(d.device for d in own),
        flagged=item.flagged,
        inputs=item.inputs,
        p_value=p_value,
        excess=(item.flagged - item.inputs * rate) / spread,
        channels=_shifts(item, taps, policy.channels),
        calibrated=calibrated,
    )


def _upper(fpr_upper: Sequence[float], label: int) -> float | None:
    """The bound for a label, None for a label that the model does not have."""
    index = 0 if label == -1 and len(fpr_upper) == 1 else label
    if not 0 <= index < len(fpr_upper):
        return None
    return fpr_upper[index]


def _shifts(item: LabelEvidence, taps: Sequence[Tap], count: int) -> tuple[ChannelShift, ...]:
    if not item.flagged_mean.size or not item.unflagged_mean.size:
        return ()
    shift = np.abs(item.flagged_mean - item.unflagged_mean) / _scale(item.unflagged_std)
    shifts: list[ChannelShift] = []
    for position in np.argsort(-shift, kind="stable"):
        index = int(position)
        tap = next((t for t in taps if t.offset <= index < t.offset + t.channels), None)
        if tap is not None and tap.kind != "logit":  # a logit is no channel: it moves whatever the trigger is
            shifts.append(
                ChannelShift(
                    tensor=tap.tensor,
                    source_layer=tap.source_layer,
                    kind=tap.kind,
                    channel=index - tap.offset,
                    index=index,
                    shift_in_std=round(float(shift[index]), 3),
                )
            )
        if len(shifts) == count:
            break
    return tuple(shifts)


def _scale(std: Vector) -> Vector:
    """Standard deviations with a floor: a channel that clean inputs never move would else give infinity."""
    floor = max(0.01 * float(np.median(std)), 1e-6)
    return np.maximum(std, floor)
