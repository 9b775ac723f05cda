"""From verdicts to one report: counts, score histogram and per-channel evidence. Pure: time is passed in.

Rules enforced here:

* a window has one model and one guard, and features of one length;
* an input that could not be scored is ``unchecked``: it lands in no label, no bin and no mean;
* sums stream in float64; no input and no feature vector is kept;
* a report fits ``MAX_PAYLOAD``: evidence of the labels with the fewest flags is left out where it would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract import messages
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import ActivationMean, Alert, LabelCount, LabelEvidence, Report
from edgeguard.contract.scores import BINS, bin_of
from edgeguard.detection.verdict import Verdict

Vector = npt.NDArray[np.float64]

NO_CLASS = -1
MAX_CELLS = 1 << 23
"""Labels times features that one window holds sums of; an input of one label more is counted as unchecked."""
_LARGEST = float(np.finfo(np.float32).max)
_RESERVE = 1024
"""Bytes kept for what a report holds beside its lists."""


class _Sums:
    """Running count, sum and sum of squares of feature vectors ``[D]``."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.total: Vector = np.zeros(size)
        self.squares: Vector = np.zeros(size)

    def add(self, wide: Vector) -> None:
        self.count += 1
        self.total += wide
        self.squares += wide * wide

    def mean(self) -> Vector:
        return self.total / self.count

    def std(self) -> Vector:
        mean = self.mean()
        return np.asarray(np.sqrt(np.maximum(self.squares / self.count - mean * mean, 0.0)))


class _Label:
    def __init__(self, size: int) -> None:
        self.flagged = _Sums(size)
        self.unflagged = _Sums(size)


class Identity(NamedTuple):
    """What evidence belongs to: the two digests of a guarded file."""

    model_digest: str
    guard_digest: str

    @classmethod
    def of(cls, metadata: GuardMetadata) -> Identity:
        """Those of one file."""
        return cls(metadata.model_digest, metadata.guard_digest)


class Window:
    """Adds up the inputs of one report.

    Args:
        identity: the model and guard that all inputs of this window run through.
        size: D, how many features they have.
        started_ms: the device's clock.
        max_cells: labels times features that it may hold sums of.
    """

    def __init__(self, identity: Identity, size: int, *, started_ms: int, max_cells: int = MAX_CELLS) -> None:
        self.identity = identity
        self._max_labels = min(messages.MAX_LABELS, max(1, max_cells // size))
        self.size = size
        self._started_ms = started_ms
        self._labels: dict[int, _Label] = {}
        self._histogram = [0] * BINS
        self.inputs = 0
        self.unchecked = 0

    def add(self, verdict: Verdict, features: npt.NDArray[np.float32]) -> None:
        """Count one input.

        Args:
            verdict: what the guard thinks of it.
            features: ``edgeguard_features`` of it, float32 ``[D]``.
        """
        wide = features.astype(np.float64)
        # In float64 no square of a finite float32 overflows: the sum is finite when each feature is.
        if math.isnan(verdict.score) or not math.isfinite(np.dot(wide, wide)):
            self.add_unchecked()
            return
        number = NO_CLASS if verdict.predicted is None else verdict.predicted
        label = self._labels.get(number)
        if label is None and len(self._labels) >= self._max_labels:
            self.add_unchecked()
            return
        self.inputs += 1
        self._histogram[bin_of(verdict.score)] += 1
        if label is None:
            label = self._labels[number] = _Label(self.size)
        (label.flagged if verdict.flagged else label.unflagged).add(wide)

    def add_unchecked(self) -> None:
        """Count one input that could not be scored."""
        self.inputs += 1
        self.unchecked += 1

    def report(self, *, boot: str, seq: int, ended_ms: int) -> Report:
        """The report of what was added so far."""
        counts = tuple(
            LabelCount(label=n, inputs=s.flagged.count + s.unflagged.count, flagged=s.flagged.count)
            for n, s in sorted(self._labels.items())
        )
        activation = self._activation()
        room = messages.MAX_PAYLOAD - _RESERVE - _size((counts, activation))
        return Report(
            boot=boot,
            seq=seq,
            model_digest=self.identity.model_digest,
            guard_digest=self.identity.guard_digest,
            started_ms=self._started_ms,
            ended_ms=ended_ms,
            inputs=self.inputs,
            unchecked=self.unchecked,
            labels=counts,
            histogram=tuple(self._histogram),
            evidence=self._evidence(room),
            activation=activation,
        )

    def _evidence(self, room: int) -> tuple[LabelEvidence, ...]:
        flagged = [(n, s) for n, s in self._labels.items() if s.flagged.count]
        flagged.sort(key=lambda pair: (-pair[1].flagged.count, pair[0]))
        chosen: list[LabelEvidence] = []
        for number, sums in flagged[: messages.MAX_EVIDENCE]:
            unflagged = sums.unflagged
            evidence = LabelEvidence(
                label=number,
                flagged=sums.flagged.count,
                unflagged=unflagged.count,
                flagged_mean=_rounded(sums.flagged.mean()),
                unflagged_mean=_rounded(unflagged.mean()) if unflagged.count else (),
                unflagged_std=_rounded(unflagged.std()) if unflagged.count else (),
            )
            room -= _size(evidence) + 1
            if room < 0:
                break
            chosen.append(evidence)
        return tuple(chosen)

    def unflagged(self) -> tuple[int, Vector]:
        """How many inputs were scored and not flagged, and the sum of their features ``[D]``."""
        sums = [s.unflagged for s in self._labels.values()]
        total: Vector = np.sum([s.total for s in sums], axis=0) if sums else np.zeros(self.size)
        return sum(s.count for s in sums), total

    def _activation(self) -> ActivationMean | None:
        count, total = self.unflagged()
        if not count:
            return None
        return ActivationMean(inputs=count, mean=_rounded(total / count))


@dataclass(frozen=True)
class AlertLimit:
    """A bucket of ``per_minute`` alerts that refills evenly; :meth:`take` returns its next state."""

    per_minute: int
    tokens: float
    at_s: float

    @classmethod
    def full(cls, per_minute: int, now_s: float) -> AlertLimit:
        """A bucket that allows ``per_minute`` alerts at once."""
        return cls(per_minute, float(per_minute), now_s)

    def take(self, now_s: float) -> tuple[bool, AlertLimit]:
        """Whether one more alert may be sent now, and the bucket after that."""
        tokens = min(float(self.per_minute), self.tokens + (now_s - self.at_s) * self.per_minute / 60.0)
        allowed = tokens >= 1.0
        return allowed, AlertLimit(self.per_minute, tokens - 1.0 if allowed else tokens, now_s)


def alert_builder(verdict: Verdict, identity: Identity, *, at_ms: int) -> Callable[[str, int], Alert]:
    """What makes the alert of one flagged input once its boot and seq are known."""

    def build(boot: str, seq: int) -> Alert:
        return Alert(
            boot=boot,
            seq=seq,
            model_digest=identity.model_digest,
            guard_digest=identity.guard_digest,
            at_ms=at_ms,
            label=NO_CLASS if verdict.predicted is None else verdict.predicted,
            score=_finite(verdict.score),
            scores={name: _finite(score) for name, score in verdict.scores.items()},
            p_value=verdict.p_value,
        )

    return build


def _finite(score: float) -> float:
    # JSON has no infinity; a float32 score that overflowed is still a flagged one.
    return max(-_LARGEST, min(score, _LARGEST))


def _rounded(values: Vector) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def _size(value: object) -> int:
    return len(msgspec.json.encode(value))
