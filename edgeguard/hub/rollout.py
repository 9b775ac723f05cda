"""Decides which devices get the hint to a release, and when a roll-out is done. Pure.

Rules enforced here:

* nobody is hinted before the time to object has passed;
* first the canaries, chosen among the online devices that run the replaced model; then everyone, but only when every
  canary runs the release. A canary that refuses, fails or disappears holds the roll-out: the next device is not put
  at risk to find out why;
* offline devices get the hint too (it is retained), but a roll-out does not wait for them;
* a device that runs neither the replaced model nor the release is none of its business;
* a hint stands as long as its device runs the replaced model, also after the case is closed;
* a hint has no authority, so whoever may write to the topic can replace it: it is repeated until its device answers
  for it, and rarely after that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeguard.hub.cases import Released
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.ingest import Device

REPEAT_S = 10.0
"""A hint is repeated this often to a device that has not answered for it."""
REPEAT_ANSWERED_S = 600.0
"""... and to one that has, where it still does not run the release: each repetition makes it try again at once."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done now.

    Attributes:
        hints: devices on whose topic the hint must stand.
        canaries: the canaries, once chosen never changed.
        everyone: whether all canaries made it.
        updated: devices that run the release.
        held: devices that were hinted and do not run it yet, with the reason.
        done: every online device of the replaced model runs the release, and at least one does.
    """

    hints: tuple[str, ...] = ()
    canaries: tuple[str, ...] = ()
    everyone: bool = False
    updated: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    done: bool = False


def next_hints(devices: Sequence[Device], release: Released, policy: PolicyConfig, now_ms: int) -> Plan:
    """The plan for one release.

    Args:
        devices: all devices of the fleet.
        release: the release, with the canaries and progress of the plan before.
        policy: ``canaries`` and ``veto_s``.
        now_ms: the hub's clock.
    """
    if now_ms < release.at_ms + policy.veto_s * 1000:
        return Plan(canaries=release.canaries, everyone=release.everyone)
    waiting = {d.device: d for d in sorted(devices, key=lambda d: d.device) if d.model_digest == release.replaces}
    updated = tuple(sorted(d.device for d in devices if _has(d, release)))
    online = tuple(name for name, device in waiting.items() if device.online)
    canaries = release.canaries or online[: policy.canaries]
    everyone = release.everyone or (bool(canaries) and set(canaries) <= set(updated))
    hints = tuple(waiting) if everyone else tuple(name for name in canaries if name in waiting)
    return Plan(
        hints=hints,
        canaries=canaries,
        everyone=everyone,
        updated=updated,
        held=tuple(f"{name}: {_reason(waiting[name], release)}" for name in hints),
        done=everyone and bool(updated) and not online,
    )


def repeat_after_s(device: Device, release: Released) -> float:
    """How long a hint may stand before it is published again, infinite for a device that is not there to hear it.

    An answer under the number of the release may still be one to somebody else's hint that bore this number.
    """
    if not device.online:
        return math.inf
    return REPEAT_ANSWERED_S if device.outcome_sequence == release.sequence else REPEAT_S


def _has(device: Device, release: Released) -> bool:
    """True for a device that runs the release or one that came after it."""
    return device.model_digest == release.model_digest or (
        device.model_digest != release.replaces and device.sequence > release.sequence
    )


def _reason(device: Device, release: Released) -> str:
    if device.outcome in ("refused", "failed") and device.outcome_sequence == release.sequence:
        return f"{device.outcome} ({device.reason})"
    return "hinted" if device.online else device.state
