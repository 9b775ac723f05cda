"""Adds up what devices say of one model and predicted label, so that no single device decides. Pure.

Rules enforced here:

* counts and feature sums of one device and label are added exactly once per report (the store sees to that);
* counts are looked at over the last 1, 2, 4, 8 ... epochs and over all: what began today and what has always been there
  are both seen soon;
* when the features of devices are pooled, none brings more than a given share of the inputs, nor of the flagged inputs,
  and a device that was wrong before brings less: see :mod:`edgeguard.hub.trust`;
* the mean (and standard deviation) of each device and channel is first clipped to the neighbourhood of the median over
  devices, so that one absurd value moves the pooled one little. This takes three devices: of two that disagree nobody
  can tell which one lies, and nothing is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgeguard.contract import messages

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CLIP = 5.0
"""A device's mean may lie this many robust standard deviations off the median over devices."""
_SIGMA = 1.4826  # of the median absolute deviation, for a normal distribution
_FLOOR = 0.1  # of a channel's own spread: devices that happen to agree are no reason to clip the next honest one
_CHUNK = 1 << 19
_FULL: Mapping[str, float] = MappingProxyType({})


def _nothing() -> Vector:
    return np.zeros(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceEvidence:
    """The sums of one device for one predicted label, over all of its reports.

    ``flagged_vectors`` of the ``flagged`` inputs came with features, ``unflagged`` likewise; the sums are float64
    ``[D]``, empty while there were none.
    """

    device: str
    label: int
    inputs: int = 0
    flagged: int = 0
    flagged_vectors: int = 0
    flagged_sum: Vector = field(default_factory=_nothing)
    unflagged: int = 0
    unflagged_sum: Vector = field(default_factory=_nothing)
    unflagged_squares: Vector = field(default_factory=_nothing)

    @property
    def width(self) -> int:
        """D, or 0 while no features came."""
        return max(self.flagged_sum.size, self.unflagged_sum.size)

    def add(self, count: messages.LabelCount, features: messages.LabelEvidence | None) -> DeviceEvidence:
        """These sums and one window more. The features must have the width of those before."""
        total = replace(self, inputs=self.inputs + count.inputs, flagged=self.flagged + count.flagged)
        if features is None:
            return total
        total = replace(
            total,
            flagged_vectors=self.flagged_vectors + features.flagged,
            flagged_sum=_plus(self.flagged_sum, features.flagged * np.array(features.flagged_mean, dtype=np.float64)),
        )
        if not features.unflagged:
            return total
        mean = np.array(features.unflagged_mean, dtype=np.float64)
        std = np.array(features.unflagged_std, dtype=np.float64)
        return replace(
            total,
            unflagged=self.unflagged + features.unflagged,
            unflagged_sum=_plus(self.unflagged_sum, features.unflagged * mean),
            unflagged_squares=_plus(
                self.unflagged_squares, features.unflagged * np.asarray(std**2 + mean**2, dtype=np.float64)
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelCounts:
    """What the devices of one model counted, in columns: one row for a device, predicted label and epoch.

    ``device`` indexes ``devices``; ``device``, ``label``, ``epoch``, ``inputs`` and ``flagged`` are int64 ``[N]``.
    ``epoch`` is the hub's time divided by the length of an epoch; 0 stands for all that is older than what is kept.
    ``recalibrated`` names those of ``devices`` that run the model with a guard of their own.
    """

    devices: tuple[str, ...]
    device: Integers
    label: Integers
    epoch: Integers
    inputs: Integers
    flagged: Integers
    recalibrated: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """The counts of the last ``epochs`` epochs, None for all; ``inputs`` and ``flagged`` are ``[devices, labels]``."""

    epochs: int | None
    inputs: Vector
    flagged: Vector


def windows(counts: LabelCounts, labels: int, now_epoch: int, *, first: int = 0) -> Iterator[Window]:
    """All that was counted, then the last 1, 2, 4, 8 ... epochs. Windows that add nothing are left out.

    Args:
        counts: rows of labels that the model does not have are left out.
        labels: how many it has, at least 1.
        now_epoch: the hub's epoch; rows of later ones count as of this one.
        first: its first label: -1, and the only one, for a model without classes.
    """
    age = np.maximum(now_epoch - counts.epoch, 0)
    seen = np.flatnonzero(np.bincount(age, minlength=1))
    # An age of 0 is in the first window, 1 in the second, 2 and 3 in the third, 4 to 7 in the fourth ...
    doublings, place = np.unique(np.ceil(np.log2(seen + 1.0)), return_inverse=True)
    of_age = np.zeros(int(age.max(initial=0)) + 1, dtype=np.int64)
    of_age[seen] = place
    shape = len(doublings), len(counts.devices), labels
    inputs, flagged = np.zeros(math.prod(shape)), np.zeros(math.prod(shape))
    for start in range(0, age.size, _CHUNK):
        rows = slice(start, start + _CHUNK)
        label = counts.label[rows] - first
        valid = (label >= 0) & (label < labels)
        key = ((of_age[age[rows]] * shape[1] + counts.device[rows]) * labels + label)[valid]
        if not key.size:
            continue
        low, high = int(key.min()), int(key.max()) + 1
        inputs[low:high] += np.bincount(key - low, counts.inputs[rows][valid])
        flagged[low:high] += np.bincount(key - low, counts.flagged[rows][valid])
    inputs, flagged = inputs.reshape(shape), flagged.reshape(shape)
    yield Window(epochs=None, inputs=inputs.sum(axis=0), flagged=flagged.sum(axis=0))
    for number, doubling in enumerate(doublings[:-1], start=1):  # the last one would be all
        recent = slice(0, number)
        yield Window(epochs=2 ** int(doubling), inputs=inputs[recent].sum(axis=0), flagged=flagged[recent].sum(axis=0))


@dataclass(frozen=True, kw_only=True)
class DeviceCount:
    """What one device counted, before any capping."""

    device: str
    inputs: int
    flagged: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelEvidence:
    """The pooled evidence of one model and predicted label.

    ``inputs`` and ``flagged`` are counts after capping, rounded so that the suspicion is never strengthened. The
    vectors are float64 ``[D]``, empty where no device sent such features.
    """

    model_digest: str
    label: int
    per_device: tuple[DeviceCount, ...]
    inputs: int
    flagged: int
    flagged_mean: Vector
    unflagged_mean: Vector
    unflagged_std: Vector


def capped(counts: Sequence[float], share: float) -> list[float]:
    """Cut the largest counts down until none exceeds ``share`` of the sum of what is left.

    With fewer than 1 / share contributors the best that can be asked for is equal parts.
    """
    contributors = sum(count > 0 for count in counts)
    share = max(share, 1.0 / max(contributors, 1))
    descending = sorted(counts, reverse=True)
    rest = float(sum(counts))
    for cut, largest in enumerate(descending):
        # With the `cut` largest at one common level: level = share * (cut * level + rest).
        level = share * rest / (1.0 - share * cut)
        if largest <= level * (1.0 + 1e-12):
            return [min(float(count), level) if cut else float(count) for count in counts]
        rest -= largest
    return [0.0] * len(counts)


def pool_label(
    rows: Sequence[DeviceEvidence], *, model_digest: str, width: int, share: float, weights: Mapping[str, float] = _FULL
) -> LabelEvidence:
    """Pool the devices of one model and label.

    Args:
        rows: the sums of one label, one row a device, at least one.
        model_digest: the model that they belong to.
        width: D of that model; features of another width are left out.
        share: the largest share that one device may bring, above 0 and at most 1.
        weights: what devices count that do not count fully, from 0 to 1.
    """
    rows = sorted(rows, key=lambda row: row.device)
    share_of = _weights(rows, share)
    counted = [weight * weights.get(row.device, 1.0) for weight, row in zip(share_of, rows, strict=True)]
    usual = [(w * r.unflagged, r) for w, r in zip(counted, rows, strict=True) if r.unflagged_sum.size == width]
    usual = [(weight, row) for weight, row in usual if weight > 0]
    unflagged_mean = unflagged_std = spread = _nothing()
    if usual:
        means = np.stack([row.unflagged_sum / row.unflagged for _, row in usual])
        squares = np.stack([row.unflagged_squares / row.unflagged for _, row in usual])
        stds = np.sqrt(np.maximum(squares - means**2, 0.0))
        if len(usual) > 2:  # else a lie would widen what flagged features are clipped to
            spread = np.median(stds, axis=0)
        means, stds = _clip(means, spread), np.maximum(_clip(stds, spread), 0.0)
        shares = [weight for weight, _ in usual]
        unflagged_mean = np.average(means, axis=0, weights=shares)
        variance = np.average(stds**2 + (means - unflagged_mean) ** 2, axis=0, weights=shares)
        unflagged_std = np.sqrt(variance)
    moved = [(w * r.flagged_vectors, r) for w, r in zip(counted, rows, strict=True) if r.flagged_sum.size == width]
    moved = [(weight, row) for weight, row in moved if weight > 0]
    flagged_mean = _nothing()
    if moved:
        means = _clip(np.stack([row.flagged_sum / row.flagged_vectors for _, row in moved]), spread)
        flagged_mean = np.average(means, axis=0, weights=[weight for weight, _ in moved])
    return LabelEvidence(
        model_digest=model_digest,
        label=rows[0].label,
        per_device=tuple(DeviceCount(device=r.device, inputs=r.inputs, flagged=r.flagged) for r in rows),
        # The small slack keeps a whole number whole after floating-point weights.
        inputs=int(np.ceil(sum(w * r.inputs for w, r in zip(counted, rows, strict=True)) - 1e-6)),
        flagged=int(np.floor(sum(w * r.flagged for w, r in zip(counted, rows, strict=True)) + 1e-6)),
        flagged_mean=flagged_mean,
        unflagged_mean=unflagged_mean,
        unflagged_std=unflagged_std,
    )


def _clip(values: Vector, spread: Vector) -> Vector:
    """Clip ``[devices, D]`` per channel to the median over devices plus or minus ``CLIP`` robust deviations.

    One or two rows stay as they are: two lie one deviation off their median, however far apart.

    Args:
        values: one row a device.
        spread: the usual standard deviation of each channel, ``[D]``, empty where it is not known.
    """
    middle = np.median(values, axis=0)
    floor = _FLOOR * (np.where(spread > 0, spread, np.abs(middle)) if spread.size else np.abs(middle)) + 1e-6
    reach = CLIP * (_SIGMA * np.median(np.abs(values - middle), axis=0) + floor)
    return np.clip(values, middle - reach, middle + reach)


def _weights(rows: Sequence[DeviceEvidence], share: float) -> list[float]:
    """One factor a device, at most 1, that keeps its inputs and then its flagged inputs within ``share``."""
    inputs = capped([row.inputs for row in rows], share)
    by_inputs = [kept / row.inputs if row.inputs else 0.0 for kept, row in zip(inputs, rows, strict=True)]
    before = [weight * row.flagged for weight, row in zip(by_inputs, rows, strict=True)]
    after = capped(before, share)
    by_flags = [new / old if old else 1.0 for new, old in zip(after, before, strict=True)]
    return [first * second for first, second in zip(by_inputs, by_flags, strict=True)]


def _plus(total: Vector, more: Vector) -> Vector:
    return more if not total.size else total + more
