"""l-infinity pruning: silence the channels that triggered inputs move most.

Cheng, Xu, Liu, Chen, Zhao, Lin: Defending against Backdoor Attack on Deep Neural Networks, 2020 (arXiv 2002.12162).
There the norm is compared on clean inputs and on such with a recovered trigger; here the shift may also be what devices
reported of flagged inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from edgeguard.contract.guard import Tap
from edgeguard.repair.methods.base import Bench, Channel, Dormant, Floats, Knowledge, makers, prune, said
from edgeguard.repair.target import Target

MAX_SHARE = 0.15
MIN_SHIFT = 2.0


class LinfPruning:
    """Channels by the upward shift of their norm, and after them those that the fleet finds dormant."""

    name: ClassVar[str] = "linf"
    paper: ClassVar[str] = "Cheng et al., 2020 (arXiv 2002.12162)"
    cost: ClassVar[int] = 2
    trains: ClassVar[bool] = False

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return "" if known.shift is not None else "no evidence and no recovered trigger to rank channels by"

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        assert known.shift is not None
        ranked = with_dormant(rank(target, known.taps, known.shift), known.dormant, target, known.taps)
        return said(prune(target, ranked, bench, max_share=MAX_SHARE))


def rank(target: Target, taps: Sequence[Tap], shift: Floats) -> list[Channel]:
    """Channels by the upward shift [D] of their l-infinity norm, largest first; those below MIN_SHIFT are left out."""
    channels = [
        Channel(layer, i, float(shift[tap.offset + i]))
        for layer, tap in makers(target, taps, "linf").items()
        for i in range(tap.channels)
    ]
    return sorted((c for c in channels if c.shift >= MIN_SHIFT), key=lambda c: -c.shift)


def with_dormant(
    ranked: Sequence[Channel], dormant: Sequence[Dormant], target: Target, taps: Sequence[Tap]
) -> list[Channel]:
    """The ranked channels, and after them dormant ones: a backdoor may live where clean inputs are quiet."""
    known = {(channel.layer, channel.channel) for channel in ranked}
    layers = makers(target, taps, "l1")
    more = [
        Channel(layer, channel, 0.0)
        for layer, tap in layers.items()
        for entry in dormant
        if entry.layer in {tap.source_layer, tap.tensor}
        for channel in dict.fromkeys(entry.channels)
        if 0 <= channel < tap.channels and (layer, channel) not in known
    ]
    return [*ranked, *more]
