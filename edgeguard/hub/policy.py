"""Decides from counts whether a model is suspicious, and for which label; and from features, by which channels. Pure.

Rules enforced here:

* a label is suspicious when its flagged inputs speak against every rate that is explained, by an e-value of
  1 / ``alpha``: see :mod:`edgeguard.hub.excess`. As windows begin anew with each epoch, labels times epochs times
  ``alpha`` bounds the expected number of false suspicions, however often one looks;
* what is explained is what the calibration bounds, widened up to ``WIDENED_TO`` to hold for all classes together, and
  no more than ``TOLERANCE`` times what the fleet usually shows for this class. A rate that is usual in the fleet and
  within its bound is explained, whichever it is; never is less explained than the promise for all inputs together;
* what raises the other classes of a device explains as much of this one: drift, night and a broken sensor point at no
  label, but are findings of their own: see :mod:`edgeguard.hub.drift`;
* a few odd devices are no attack: as many as the other classes show;
* no device adds more than its part of what a quorum of devices must show, and devices that reports proved wrong count
  less and raise the quorum: see :mod:`edgeguard.hub.trust`;
* a few flagged inputs prove nothing, however rare;
* a label that the calibration never saw, or hardly, has no bound of its own (its ``fpr_upper`` is near 1, which no
  attack exceeds). It is judged by what is usual in the fleet, and never against less than ``UNSEEN_FLOOR``. That need
  not hold for one class: such a suspicion is a reason to inspect, and says what it rests on;
* a device that fitted its guard anew has bounds that the hub does not know. All its classes are judged like such a
  label, and against no less than the bounds that the model came with;
* reports alone raise a suspicion, never a case. Where several labels are suspicious, the one that most devices stand
  behind comes first, and of equal ones that of the largest excess: a backdoor's target label draws most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection.statistics import SLACK
from edgeguard.hub import drift, evidence, excess
from edgeguard.hub import trust as trusts
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.drift import Finding
from edgeguard.hub.evidence import DeviceEvidence, LabelCounts, Vector, Window
from edgeguard.hub.trust import Trust

UNSEEN = 0.5
"""A bound from here on says that the calibration saw at most four clean inputs of the class, or flagged most."""
UNSEEN_FLOOR = 0.05
WIDENED_TO = 0.1
"""Bounds are widened to hold for all classes together, but not beyond this."""
TOLERANCE = 2.0
"""How many times the fleet's usual rate of a class devices may show, within its bound, before it needs explaining."""
MIN_PEERS = 10
"""With fewer devices than this nobody can say what is usual."""
_SATURATED = 0.9
"""A device of which so much is explained is flagged everywhere, and says nothing of one class."""
_CAP = 1.5  # times a quorum's part: what one device may add
_SIGMAS = 2.0  # a device that is nearer to what is explained counts as one that shows nothing
_ALONE = 1e-9  # of a single device nobody can tell whether it is odd: it is believed
_NOBODY: Mapping[str, Trust] = MappingProxyType({})


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
    """One label of one model that nothing known explains.

    Attributes:
        devices: those that each show an excess of their own.
        flagged: flagged inputs of this label on these devices, over all epochs that are kept, of ``inputs``.
        p_value: 1 / e-value.
        excess: in standard deviations of what is explained, on these devices, in the window that shows it best.
        calibrated: False where the label was judged without a bound of its own, on one of these devices at least.
        reason: the same in words, for people.
        channels: empty until somebody looked at the features: see :func:`channels`.
    """

    model_digest: str
    label: int
    devices: tuple[str, ...]
    flagged: int
    inputs: int
    p_value: float
    excess: float
    calibrated: bool = True
    reason: str = ""
    channels: tuple[ChannelShift, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What the counts of one model say: suspicions, the strongest first, and what else has changed."""

    suspicions: tuple[Suspicion, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Known:
    """What explains flags, per class ``[C]``, and how much of it at most, ``bound`` ``[devices, C]``.

    ``weight``: what each device counts, ``[devices]``; ``bar``: what they need together. ``calm``: the classes by which
    a device's other rates are judged: those that a calibration bounds, if any, since one class of many flags would
    drown them. ``cap``: the most that one device may add. ``odd``: the largest share of odd devices that is believed.
    """

    explained: Vector
    bound: Vector
    calm: npt.NDArray[np.bool_]
    weight: Vector
    bar: float
    cap: float
    odd: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Excess:
    """One label in one window: the devices (rows of the counts) that show an excess of their own, and how much."""

    label: int
    epochs: int | None
    log_evidence: float
    support: float
    own: npt.NDArray[np.intp]
    inputs: float
    flagged: float
    explained: float

    @property
    def deviations(self) -> float:
        rate = self.explained / self.inputs
        return (self.flagged - self.explained) / math.sqrt(self.explained * (1.0 - rate))


def assess(
    counts: LabelCounts,
    policy: PolicyConfig,
    *,
    guard: GuardMetadata,
    devices: int,
    trust: Mapping[str, Trust] | None = None,
    now_epoch: int,
) -> Assessment:
    """Judge one model.

    Args:
        counts: what its devices counted.
        policy: the thresholds.
        guard: what the model's guard says of itself.
        devices: how many devices run the model, whether they reported yet or not.
        trust: in each device, as it stands now (:func:`edgeguard.hub.trust.standing`); those not named count fully.
        now_epoch: the hub's epoch.
    """
    trust = _NOBODY if trust is None else trust
    first = -1 if guard.class_output is None else 0
    fpr_upper = np.asarray(guard.fpr_upper, dtype=np.float64)
    looks = evidence.windows(counts, fpr_upper.size, now_epoch, first=first)
    everything = next(looks)
    quorum = quorum_of(policy, max(devices, len(counts.devices)))
    recalibrated = np.isin(counts.devices, list(counts.recalibrated))
    known = _known(counts, everything, guard.fpr, fpr_upper, recalibrated, policy, trust, quorum)
    recent, strongest = everything, dict[int, _Excess]()
    for window in chain((everything,), looks):
        if window.epochs is not None and window.epochs <= drift.RECENT:
            recent = window
        for found in _excesses(window, known, policy):
            before = strongest.get(found.label)
            if before is None or found.log_evidence > before.log_evidence:
                strongest[found.label] = found
    suspicions = sorted(strongest.values(), key=lambda found: (-found.support, -found.deviations, found.label))
    return Assessment(
        suspicions=tuple(
            _suspicion(found, counts, everything, guard, known, int(recalibrated[found.own].sum()), first)
            for found in suspicions
        ),
        findings=drift.findings(counts.devices, recent, everything, fpr_upper=fpr_upper, fpr=guard.fpr),
    )


def quorum_of(policy: PolicyConfig, devices: int) -> int:
    """How many devices must each show an excess; never more than there are."""
    return max(1, min(max(policy.min_devices, math.ceil(policy.quorum_share * devices)), devices))


def explained_rates(inputs: Vector, flagged: Vector, fpr_upper: Vector, fpr: float) -> Vector:
    """The largest rate of each class ``[C]`` that needs no explaining, from counts ``[devices, C]``."""
    usual = TOLERANCE * excess.rates(inputs, flagged)
    peers = (inputs > 0).sum(axis=0) >= MIN_PEERS
    # A wide bound comes from few calibration inputs, not from a high rate: wider still, it would explain anything.
    bound = np.minimum(excess.widened(fpr_upper), np.maximum(fpr_upper, WIDENED_TO))
    promised = SLACK * fpr
    seen = np.where(peers, np.minimum(bound, np.maximum(usual, promised)), bound)
    unseen = np.maximum(np.where(peers, usual, 0.0), max(promised, UNSEEN_FLOOR))
    return np.asarray(np.clip(np.where(fpr_upper < UNSEEN, seen, unseen), 1e-9, 1.0 - 1e-9))


def channels(
    rows: Sequence[DeviceEvidence],
    guard: GuardMetadata,
    count: int,
    *,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> tuple[ChannelShift, ...]:
    """The channels that flagged inputs of one label move most: the weighted median over devices of each one's shift.

    Args:
        rows: the sums of the label, of the devices behind the suspicion: one row a device.
        guard: says where the features come from.
        count: how many channels to name.
        weights: what devices count that do not count fully; those of weight 0 are left out.
    """
    width = guard.feature_count
    counted = [
        (weights.get(row.device, 1.0), row)
        for row in rows
        if row.flagged_vectors and row.unflagged and row.flagged_sum.size == row.unflagged_sum.size == width
    ]
    counted = [(weight, row) for weight, row in counted if weight > 0]
    if not counted:
        return ()
    flagged = np.stack([row.flagged_sum / row.flagged_vectors for _, row in counted])
    usual = np.stack([row.unflagged_sum / row.unflagged for _, row in counted])
    squares = np.stack([row.unflagged_squares / row.unflagged for _, row in counted])
    weight = np.asarray([weight for weight, _ in counted])
    std = _median(np.sqrt(np.maximum(squares - usual**2, 0.0)), weight)
    return _shifts(np.abs(_median(flagged - usual, weight)) / _scale(std), guard, count)


def _known(
    counts: LabelCounts,
    everything: Window,
    fpr: float,
    fpr_upper: Vector,
    recalibrated: npt.NDArray[np.bool_],
    policy: PolicyConfig,
    trust: Mapping[str, Trust],
    quorum: int,
) -> _Known:
    usual = excess.rates(everything.inputs, everything.flagged)
    bound = explained_rates(everything.inputs, everything.flagged, fpr_upper, fpr)
    unknown = np.ones_like(fpr_upper)
    floor = np.maximum(bound, explained_rates(everything.inputs, everything.flagged, unknown, fpr))
    weight = np.asarray([trust[name].weight if name in trust else 1.0 for name in counts.devices])
    bar = trusts.bar(trust, quorum)
    if bar > weight.sum() > 0:
        # All devices together could not be heard. A small fleet must not be deaf for a year after one wrong rejection:
        # where nearly all were behind rejected suspicions, they count by how they compare.
        weight, bar = weight / weight.max(), float(quorum)
    return _Known(
        explained=np.where(fpr_upper < UNSEEN, np.minimum(usual, fpr_upper), usual),
        bound=np.where(recalibrated[:, None], floor, bound),
        calm=fpr_upper < (UNSEEN if fpr_upper.min() < UNSEEN else math.inf),
        weight=weight,
        bar=bar,
        cap=_CAP * math.log(1.0 / policy.alpha) / quorum,
        odd=_ALONE if quorum == 1 else 0.5,
    )


def _excesses(window: Window, known: _Known, policy: PolicyConfig) -> Iterator[_Excess]:
    """The labels that are suspicious in one window."""
    inputs, flagged = window.inputs, window.flagged
    expected = inputs * known.bound
    dispersion = _dispersion(window, known)
    rho = excess.correlation(dispersion, known.bound)
    spread = np.sqrt(expected * (1.0 + np.maximum(inputs - 1.0, 0.0) * rho))
    labels = inputs.shape[1]
    device, label = np.nonzero((flagged >= 2) & (flagged > expected + _SIGMAS * spread))
    if not device.size:
        return
    mean = known.bound[device, label] * _lift(window, known, device, label, dispersion)
    below = mean < _SATURATED
    device, label, mean = device[below], label[below], mean[below]
    n, k = inputs[device, label], flagged[device, label]
    ratio = excess.log_ratio(n, k, mean, dispersion)
    own = ratio >= -math.log(policy.device_alpha)
    support = np.bincount(label[own], known.weight[device[own]], labels)
    flags = np.bincount(label[own], k[own], labels)
    theirs = np.bincount(label[own], minlength=labels).astype(np.float64)
    odd = np.minimum(known.odd, excess.odd_share(theirs, (inputs > 0).sum(axis=0)))
    for number in np.flatnonzero((support >= known.bar - 1e-9) & (flags >= policy.min_flagged)):
        mine = label == number
        weight = known.weight[device[mine]]
        others = float(known.weight[inputs[:, number] > 0].sum() - weight.sum())
        log_evidence = excess.log_evidence(ratio[mine], weight, max(others, 0.0), odd=float(odd[number]), cap=known.cap)
        if log_evidence < -math.log(policy.alpha):
            continue
        behind = mine & own
        yield _Excess(
            label=int(number),
            epochs=window.epochs,
            log_evidence=log_evidence,
            support=float(support[number]),
            own=device[behind],
            inputs=float(n[behind].sum()),
            flagged=float(k[behind].sum()),
            explained=float((n * mean)[behind].sum()),
        )


def _dispersion(window: Window, known: _Known) -> float:
    """How much devices differ, by all classes but that of the largest excess: an attack is no difference of theirs."""
    usual = np.minimum(known.explained, known.bound.max(axis=0, initial=0.0))
    expected = (window.inputs * usual).sum(axis=0)
    worst = int(np.argmax((window.flagged.sum(axis=0) - expected) / np.sqrt(expected + 1.0)))
    others = np.arange(usual.size) != worst
    if usual.size < 2:
        others[:] = True
    return excess.dispersion(window.inputs[:, others], window.flagged[:, others], usual[others])


def _lift(
    window: Window, known: _Known, device: npt.NDArray[np.intp], label: npt.NDArray[np.intp], dispersion: float
) -> Vector:
    """How many times as often as is explained these devices' other classes are flagged, ``[K]``; at least 1.

    Few flags say little of a device: its factor is the posterior mean of a Gamma law of mean 1 and this dispersion,
    that of the fleet. Of four classes or more the largest excess among the others is left out: a backdoor may have a
    second target.
    """
    classes = np.where(known.calm, known.explained, 0.0)
    expected = window.inputs[device] * classes
    flagged = window.flagged[device] * known.calm
    each = np.arange(device.size)
    for _ in range(2 if known.calm.sum() > 3 else 1):
        expected[each, label] = flagged[each, label] = 0.0
        label = np.argmax(flagged - expected, axis=1)
    prior = 1.0 / dispersion
    return np.maximum(1.0, (flagged.sum(axis=1) + prior) / (expected.sum(axis=1) + prior))


def _suspicion(
    found: _Excess,
    counts: LabelCounts,
    everything: Window,
    guard: GuardMetadata,
    known: _Known,
    recalibrated: int,
    first: int,
) -> Suspicion:
    label, calibrated = found.label, guard.fpr_upper[found.label] < UNSEEN
    period = "all that is kept" if found.epochs is None else f"the last {found.epochs} epochs"
    known_by = f"calibration: {guard.fpr_upper[label]:.2%}" if calibrated else "calibration hardly saw this class"
    if recalibrated:
        known_by += f"; {recalibrated} devices calibrated anew"
    others = np.delete(everything.inputs[found.own], label, axis=1).sum()
    flags = np.delete(everything.flagged[found.own], label, axis=1).sum()
    reason = (
        f"{found.flagged:.0f} of {found.inputs:.0f} inputs flagged on {found.own.size} devices in {period}; "
        f"{found.explained / found.inputs:.2%} is explained ({known_by}); "
        + (f"other classes of these devices: {flags / others:.2%}; " if others else "")
        + f"e-value 1e{found.log_evidence / math.log(10.0):.1f}, weight {found.support:.1f} of {known.bar:.1f} needed"
    )
    return Suspicion(
        model_digest=guard.model_digest,
        label=label + first,
        devices=tuple(counts.devices[row] for row in found.own),
        flagged=int(everything.flagged[found.own, label].sum()),
        inputs=int(everything.inputs[found.own, label].sum()),
        p_value=math.exp(-found.log_evidence),
        excess=found.deviations,
        calibrated=calibrated and not recalibrated,
        reason=reason,
    )


def _shifts(shift: Vector, guard: GuardMetadata, count: int) -> tuple[ChannelShift, ...]:
    shifts: list[ChannelShift] = []
    for position in np.argsort(-shift, kind="stable"):
        index = int(position)
        tap = next(t for t in guard.taps if index in t.columns)
        if tap.kind != "logit":  # a logit is no channel: it moves whatever the trigger is
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


def _median(values: Vector, weight: Vector) -> Vector:
    """The weighted median of each column of ``[devices, D]``: the middle of two where they weigh the same."""
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    reached = np.cumsum(weight[order], axis=0) / weight.sum()
    below, above = (reached >= 0.5 - 1e-9).argmax(axis=0), (reached > 0.5 + 1e-9).argmax(axis=0)
    columns = np.arange(values.shape[1])
    return np.asarray((ordered[below, columns] + ordered[above, columns]) / 2.0)


def _scale(std: Vector) -> Vector:
    """Standard deviations with a floor: a channel that clean inputs never move would else give infinity."""
    floor = max(0.01 * float(np.median(std)), 1e-6)
    return np.maximum(std, floor)


__all__ = [
    "Assessment", "ChannelShift", "Finding", "Suspicion", "assess", "channels", "explained_rates", "quorum_of",
]  # fmt: skip
