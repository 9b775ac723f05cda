"""Tells a changed fleet, a changed site and a broken sensor from an attack. Pure.

A backdoor raises the flag rate of one class. Here are the other ways in which rates rise:

* the fleet has drifted when most of its classes are flagged more often than before, or than the calibration explains;
* a site has drifted when most of its devices are flagged much more often than the fleet, outside their worst class;
* a sensor is broken when one device is, by far. It may also lie: counts cannot tell.

None of these is a reason to inspect a model. A site is what a device's name says before its last hyphen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import gammainc

from edgeguard.detection.statistics import SLACK
from edgeguard.hub import excess
from edgeguard.hub.evidence import Window
from edgeguard.hub.excess import Floats

RECENT = 8
"""Epochs that are compared with those before."""
MIN_PEERS = 3
_DRIFTED = 2.0  # times the usual rate
_BROKEN = 5.0
_SURE = 3.0  # standard deviations
_SEEN = 5.0  # expected flags below which a class is not judged
_UNBOUNDED = 0.5
_CHANCE = 1e-6  # that a sensor is called broken that is flagged twice as often as the fleet


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Rates that rose without pointing at a label. ``subject`` is "fleet", "site NAME" or a device."""

    kind: Literal["drift", "sensor"]
    subject: str
    text: str


def findings(
    devices: Sequence[str], recent: Window, everything: Window, *, fpr_upper: Floats, fpr: float
) -> tuple[Finding, ...]:
    """What has changed in the last epochs.

    Args:
        devices: their names, in the order of the windows' rows.
        recent: the last ``RECENT`` epochs.
        everything: all that is kept, these included.
        fpr_upper: of the calibration, ``[C]``.
        fpr: the promise for all inputs together.
    """
    if fpr_upper.size < 2:
        return ()
    now = excess.rates(recent.inputs, recent.flagged)
    found = list(_of_fleet(now, recent, everything, fpr_upper, fpr))
    if len(devices) < MIN_PEERS:
        return tuple(found)
    calm = fpr_upper < (_UNBOUNDED if (fpr_upper < _UNBOUNDED).sum() > 1 else np.inf)
    flagged, expected = _without_worst(recent.inputs[:, calm] * now[calm], recent.flagged[:, calm])
    lift = (flagged + 1.0) / (expected + 1.0)
    sites, site = np.unique([name.rpartition("-")[0] for name in devices], return_inverse=True)
    drifted = _drifted(site, lift, flagged, expected)
    for index in np.flatnonzero(drifted):
        mine = site == index
        times = float(flagged[mine].sum() / max(expected[mine].sum(), 1.0))
        text = f"{mine.sum()} devices of this site are flagged {times:.1f} times as often as the fleet, in all classes"
        found.append(Finding(kind="drift", subject=f"site {sites[index]}", text=text))
    tail = gammainc(np.maximum(flagged, 1.0), _DRIFTED * np.maximum(expected, 1e-9))
    broken = (lift >= _BROKEN) & (tail < _CHANCE) & ~drifted[site]
    for index in np.flatnonzero(broken):
        text = (
            f"flagged {flagged[index]:.0f} inputs where the fleet's rate gives {expected[index]:.1f}, in several "
            f"classes: the sensor is broken, or the device lies"
        )
        found.append(Finding(kind="sensor", subject=devices[index], text=text))
    return tuple(found)


def _of_fleet(now: Floats, recent: Window, everything: Window, fpr_upper: Floats, fpr: float) -> list[Finding]:
    inputs = recent.inputs.sum(axis=0)
    older = everything.inputs - recent.inputs
    limit, known = fpr_upper, "the calibration explains"
    if older.sum() >= inputs.sum():
        then = excess.rates(older, everything.flagged - recent.flagged)
        limit = np.minimum(fpr_upper, np.maximum(_DRIFTED * then, SLACK * fpr))
        known = "the calibration or the past explains"
    judged = (limit < _UNBOUNDED) & (inputs * limit >= _SEEN)
    risen = judged & (inputs * now > inputs * limit + _SURE * np.sqrt(inputs * limit))
    if judged.sum() < 2 or 2 * risen.sum() <= judged.sum():
        return []
    rate = float((now * inputs).sum() / inputs.sum())
    text = f"{risen.sum()} of {judged.sum()} classes are flagged more often than {known}; over all classes {rate:.2%}"
    return [Finding(kind="drift", subject="fleet", text=f"{text}: recalibrate")]


def _without_worst(expected: Floats, flagged: Floats) -> tuple[Floats, Floats]:
    """Flags and expected flags of each device ``[devices]``, each without the class of its largest excess."""
    worst = np.argmax(flagged - expected, axis=1)[:, None]
    return (
        flagged.sum(axis=1) - np.take_along_axis(flagged, worst, axis=1)[:, 0],
        expected.sum(axis=1) - np.take_along_axis(expected, worst, axis=1)[:, 0],
    )


def _drifted(site: npt.NDArray[np.intp], lift: Floats, flagged: Floats, expected: Floats) -> npt.NDArray[np.bool_]:
    """Which sites ``[sites]`` have drifted, of those that are some devices but no half of the fleet."""
    size = np.bincount(site)
    lifted = np.bincount(site, weights=lift >= _DRIFTED)
    explained = _DRIFTED * np.bincount(site, weights=expected)
    sure = np.bincount(site, weights=flagged) > explained + _SURE * np.sqrt(explained + 1.0)
    return np.asarray((size >= MIN_PEERS) & (2 * size < len(site)) & (2 * lifted > size) & sure)


__all__ = ["MIN_PEERS", "RECENT", "Finding", "findings"]
