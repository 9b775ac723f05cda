"""How much a device counts after inspections on the hub contradicted its reports. Pure.

Rules enforced here:

* a device counts fully until a suspicion that it stood behind is rejected; each rejection halves its weight;
* a confirmation takes back one rejection: then the earlier one was the inspection's mistake, not the device's;
* after a year without a rejection the earlier ones are forgotten;
* a suspicion needs devices of a weight together that is no less than a fixed quorum, nor than ``BAR`` times all the
  weight that devices have lost: the more reports proved wrong, the more devices it takes to be heard.

What follows: each rejected suspicion costs the devices behind it half of their weight, that is at least half of the
quorum, and what was lost raises the quorum of the next. ``L`` devices that lie can therefore cause at most
:func:`most_rejections` rejected suspicions of one model within a year, whatever they report and whenever: a number that
grows with the logarithm of ``L``. Honest devices that happen to stand beside them count as liars here.

Proof. Let D be the weight that the L devices have lost in the year, W the rest; W <= L - D at all times, since
forgetting needs a year without a rejection and so comes before a device's first rejection within the year. A
suspicion needs a weight w with max(quorum, BAR * D) <= w <= W. Its rejection adds w / 2 to D. The count is largest
where each w is as small as it may be, which is what the function adds up; weight lost by others only raises the bar.
Confirmed suspicions are left out: they are no false alarms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

BAR = 0.5
MEMORY_MS = 365 * 86_400_000


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one device and model: rejected suspicions that it stood behind, and when the last one was."""

    rejections: Annotated[int, Meta(ge=0)] = 0
    rejected_ms: Annotated[int, Meta(ge=0)] = 0

    @property
    def weight(self) -> float:
        """From 1, counts fully, towards 0."""
        return 0.5**self.rejections

    def at(self, now_ms: int) -> Trust:
        """The same as it stands at a time of the hub's clock: after a year the past is forgotten."""
        return Trust() if now_ms - self.rejected_ms > MEMORY_MS else self

    def rejected(self, at_ms: int) -> Trust:
        """A suspicion that it stood behind was rejected by an inspection."""
        return Trust(rejections=self.at(at_ms).rejections + 1, rejected_ms=at_ms)

    def confirmed(self) -> Trust:
        """A suspicion that it stood behind was confirmed."""
        return msgspec.structs.replace(self, rejections=max(0, self.rejections - 1))


def standing(trust: Mapping[str, Trust], now_ms: int) -> dict[str, Trust]:
    """The trust in each device as it stands now; what :func:`edgeguard.hub.policy.assess` is given."""
    return {device: known.at(now_ms) for device, known in trust.items()}


def after_rejection(trust: Mapping[str, Trust], devices: Iterable[str], at_ms: int) -> dict[str, Trust]:
    """The new values of these devices once a suspicion that they stood behind was rejected."""
    return {device: trust.get(device, Trust()).rejected(at_ms) for device in devices}


def after_confirmation(trust: Mapping[str, Trust], devices: Iterable[str]) -> dict[str, Trust]:
    """The new values of these devices once a suspicion that they stood behind was confirmed."""
    return {device: trust.get(device, Trust()).confirmed() for device in devices}


def bar(trust: Mapping[str, Trust], quorum: int) -> float:
    """The weight of devices that a suspicion needs."""
    return max(float(quorum), BAR * sum(1.0 - known.weight for known in trust.values()))


def most_rejections(liars: int, quorum: int) -> int:
    """How many rejected suspicions of one model so many devices can cause in a year; see the proof above.

    Args:
        liars: devices that report whatever they like.
        quorum: the fixed one, at least 1.
    """
    lost, count = 0.0, 0
    while (needed := max(float(quorum), BAR * lost)) <= liars - lost:
        lost += needed / 2
        count += 1
    return count


__all__ = ["BAR", "MEMORY_MS", "Trust", "after_confirmation", "after_rejection", "bar", "most_rejections", "standing"]
