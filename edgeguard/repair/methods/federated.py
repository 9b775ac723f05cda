"""Federated pruning: devices say which channels are quiet on their own clean inputs; those are pruned.

Wu, Yang, Zhu, Mitra: Mitigating Backdoor Attacks in Federated Learning, 2020 (arXiv 2011.01767). RAP: devices rank the
channels of the last convolution, the mean or the median of the ranks orders them. MVP: each device votes for the
channels that it finds least active; most votes first.

Rules enforced here:

* a ranking that does not name every channel once, and a vote for a channel that is not there, do not count;
* a device has one vote a channel, and votes for no more than ``VOTE_SHARE`` of them;
* the mean leaves out the extreme fifth of the devices at either end of each channel: a fifth may lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from edgeguard.repair.methods.base import Bench, Channel, Knowledge, makers, prune, said

LIARS = 0.2
VOTE_SHARE = 0.5


class _Federated:
    """Prune the last tapped layer in the fleet's order."""

    paper: ClassVar[str] = "Wu et al., 2020 (arXiv 2011.01767)"
    cost: ClassVar[int] = 3
    trains: ClassVar[bool] = False

    def order(self, known: Knowledge, names: set[str], channels: int) -> tuple[int, ...]:
        """The channels of a layer that goes by these names, the first to be pruned first."""
        raise NotImplementedError

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        layers = makers(target, known.taps, "l1")
        for layer in reversed(target.layers()):
            if layer in layers:
                tap = layers[layer]
                order = self.order(known, {layer, tap.source_layer, tap.tensor}, tap.channels)
                if order:
                    return said(prune(target, [Channel(layer, c, 0.0) for c in order], bench))
        return ()


class RankAggregation(_Federated):
    """RAP. ``how``: the trimmed mean, or the median."""

    name: ClassVar[str] = "rap"

    def __init__(self, how: Literal["mean", "median"] = "median") -> None:
        self.how = how

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return "" if known.rankings or known.dormant else "no ranks from devices"

    def order(self, known: Knowledge, names: set[str], channels: int) -> tuple[int, ...]:
        """See :class:`_Federated`."""
        given = [r for layer, ranks in known.rankings.items() if layer in names for r in ranks]
        if given:
            return aggregate_ranks(given, channels, how=self.how)
        dormant = [entry.channels for entry in known.dormant if entry.layer in names]
        return tuple(c for c in dict.fromkeys(dormant[0]) if 0 <= c < channels) if dormant else ()


class MajorityVote(_Federated):
    """MVP."""

    name: ClassVar[str] = "mvp"

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return "" if known.ballots else "no votes from devices"

    def order(self, known: Knowledge, names: set[str], channels: int) -> tuple[int, ...]:
        """See :class:`_Federated`."""
        given = [b for layer, ballots in known.ballots.items() if layer in names for b in ballots]
        return aggregate_votes(given, channels)


def aggregate_ranks(
    rankings: Sequence[Sequence[int]], channels: int, *, how: Literal["mean", "median"]
) -> tuple[int, ...]:
    """Channels by their mean or median place, the least active first; empty where no ranking is one.

    Args:
        rankings: one a device, the least active first.
        channels: how many the layer has.
        how: the mean of the middle three fifths, or the median.
    """
    whole = [list(r) for r in rankings if sorted(r) == list(range(channels))]
    if not whole:
        return ()
    places = np.sort(np.argsort(np.asarray(whole), axis=1), axis=0)
    cut = min(math.ceil(LIARS * len(whole)), (len(whole) - 1) // 2)
    middle = np.median(places, axis=0) if how == "median" else places[cut : len(whole) - cut].mean(axis=0)
    return tuple(int(c) for c in np.argsort(middle, kind="stable"))


def aggregate_votes(ballots: Sequence[Sequence[int]], channels: int) -> tuple[int, ...]:
    """Channels that more than half of the devices vote for, most votes first; equal ones by number.

    Args:
        ballots: one a device; of a longer one the first ``VOTE_SHARE`` of the channels count.
        channels: how many the layer has.
    """
    votes = np.zeros(channels, dtype=int)
    for ballot in ballots:
        named = [c for c in dict.fromkeys(ballot) if 0 <= c < channels]
        votes[named[: int(VOTE_SHARE * channels)]] += 1
    return tuple(int(c) for c in np.argsort(-votes, kind="stable") if 2 * votes[c] > len(ballots))
