"""What devices and computing parties agree on: a round of private aggregation, and what a device submits to it.

A round is one question to the fleet about one layer of one model. Its digest is what sealed shares are bound to.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract.topics import DEVICE_ID, FLEET_ID

PARTIES = 3
MAX_CHANNELS = 4096
MIN_DEVICES = 3
"""Fewer are never added up: what is opened would say too much of one of them."""

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Kind = Literal["votes", "ranks"]


class Round(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question.

    Attributes:
        id: names the round; never used twice.
        fleet: whose devices are asked.
        parties: digest of the three parties' descriptions.
        model_digest: the model in question.
        layer: source layer or tensor of its tap.
        channels: of that tap.
        kind: ``votes``: each device names ``prune`` channels that it finds least active (MVP); ``ranks``: each gives
            the rank of every channel, the least active 0, and the median over devices counts (RAP).
        prune: so many channels are opened at the end, and nothing else.
        min_devices: fewer valid submissions open nothing.
    """

    v: Literal[1] = 1
    id: Annotated[str, Meta(pattern="^[0-9a-z][0-9a-z._-]{7,63}$")]
    fleet: Annotated[str, Meta(pattern=f"^{FLEET_ID}$")]
    parties: Digest
    model_digest: Digest
    layer: Annotated[str, Meta(min_length=1, max_length=200)]
    channels: Annotated[int, Meta(ge=2, le=MAX_CHANNELS)]
    kind: Kind
    prune: Annotated[int, Meta(ge=1, lt=MAX_CHANNELS)]
    min_devices: Annotated[int, Meta(ge=MIN_DEVICES, le=1_000_000)] = MIN_DEVICES

    def __post_init__(self) -> None:
        if self.prune >= self.channels:
            raise ValueError("prune must be less than channels")

    @property
    def digest(self) -> str:
        """SHA-256 of the round, key by key."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """What a device publishes: a sealed share for each party, and a commitment to each that everybody sees.

    ``sealed``: libsodium sealed boxes; ``commitments``: SHA-256 of what is in them.
    """

    v: Literal[1] = 1
    round: Digest
    device: Annotated[str, Meta(pattern=f"^{DEVICE_ID}$")]
    sealed: Annotated[tuple[bytes, ...], Meta(min_length=PARTIES, max_length=PARTIES)]
    commitments: Annotated[tuple[Digest, ...], Meta(min_length=PARTIES, max_length=PARTIES)]

    @property
    def digest(self) -> str:
        """SHA-256 over the commitments: two parties that hold the same one hold shares of the same values."""
        text = "\n".join((self.round, self.device, *self.commitments))
        return hashlib.sha256(text.encode()).hexdigest()
