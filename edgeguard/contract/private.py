"""What devices, owners, computing parties and hub agree on: rounds of private aggregation and private inspections.

A round is one question to the fleet about one layer of one model, an inspection one about one owner's model and
another's clean inputs. Their digests are what sealed shares are bound to, and what the parties sign a finding under.
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

MAX_WIDTH, MAX_CLASSES, MAX_INPUTS, MAX_STEPS = 8192, 256, 1024, 1000
MIN_CLASSES = 4
"""Of fewer labels none can stand out."""

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Kind = Literal["votes", "ranks"]
Role = Literal["model-owner", "data-owner"]
Space = Literal["pixels", "features"]
Verdict = Literal["backdoored", "no_sign", "could_not_check"]

_FINDING = b"edgeguard private inspection: what this party found, and nothing that a connection could ask it to sign\n"


class Party(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a party shows: name, where the two others reach it, its certificate (PEM), its sealing key (X25519)."""

    name: Annotated[str, Meta(min_length=1, max_length=63)]
    host: Annotated[str, Meta(min_length=1, max_length=253)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    certificate: Annotated[str, Meta(max_length=10_000)]
    sealing_key: Digest


class Parties(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All three, in the order that they agreed on."""

    parties: Annotated[tuple[Party, ...], Meta(min_length=PARTIES, max_length=PARTIES)]

    @property
    def digest(self) -> str:
        """SHA-256 over the three descriptions: what participants compare with each other."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


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


class Inspection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One private inspection: what everybody knows of it.

    Attributes:
        id: names the inspection; never used twice.
        parties: digest of the three parties' descriptions.
        model_digest: the guarded model that the owner says it is, as a hub names it; None where no hub asked.
        space: ``pixels``: the shared layers are the whole network; ``features``: they are its last ones, and the data
            owner computes what goes into them.
        layers: values into the first shared layer, of the hidden layer if there is one, and classes.
        scale: value of an input, pixel or feature, that counts as 1; larger ones are cut off there.
        sought: clean inputs that triggers are recovered on.
        held_out: others that they are tried on.
        steps: of the search.
        every: steps after which each party keeps its shares, so that a run can go on there.
        prune: hidden units that a mending takes out, those that the triggers lift most.
        mending_steps: of the last layer.
    """

    v: Literal[1] = 1
    id: Annotated[str, Meta(pattern="^[0-9a-z][0-9a-z._-]{7,63}$")]
    parties: Digest
    model_digest: Digest | None = None
    space: Space = "pixels"
    layers: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_WIDTH)], ...],
        Meta(min_length=2, max_length=3),
    ]
    scale: Annotated[float, Meta(gt=0, le=1e6)] = 255.0
    sought: Annotated[int, Meta(ge=8, le=MAX_INPUTS)] = 64
    held_out: Annotated[int, Meta(ge=8, le=MAX_INPUTS)] = 64
    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] = 60
    every: Annotated[int, Meta(ge=1, le=MAX_STEPS)] = 10
    prune: Annotated[int, Meta(ge=0, le=MAX_WIDTH)] = 0
    mending_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] = 40

    def __post_init__(self) -> None:
        if not MIN_CLASSES <= self.classes <= MAX_CLASSES:
            raise ValueError(f"{self.classes} classes; {MIN_CLASSES} to {MAX_CLASSES} can be inspected")
        if self.prune and (len(self.layers) == 2 or self.prune >= self.layers[1]):
            raise ValueError("prune must be less than the hidden units")

    @property
    def inputs(self) -> int:
        """Values of one input, D."""
        return self.layers[0]

    @property
    def classes(self) -> int:
        """Classes, and labels to inspect, L."""
        return self.layers[-1]

    @property
    def weights(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the shared layers' arrays: kernel and bias in turn."""
        pairs = zip(self.layers, self.layers[1:], strict=False)
        return tuple(shape for before, after in pairs for shape in ((before, after), (after,)))

    @property
    def digest(self) -> str:
        """SHA-256 of the inspection, key by key."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one owner shares for an inspection: ``channels`` 64-bit integers. Its digest binds the shares."""

    id: str
    parties: Digest
    inspection: Digest
    role: Role
    channels: int

    @property
    def digest(self) -> str:
        """SHA-256 of the part, key by key."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an inspection opened to everybody; triggers are not in it. ``labels``: the flagged ones, ascending.

    ``given``: what it was computed from, as the parties compare it; ``inspection``: its digest.
    """

    inspection: Digest
    given: Annotated[str, Meta(min_length=1, max_length=200)]
    verdict: Verdict
    labels: Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_CLASSES)], ...], Meta(max_length=MAX_CLASSES)]

    def __post_init__(self) -> None:
        if list(self.labels) != sorted(set(self.labels)) or bool(self.labels) != (self.verdict == "backdoored"):
            raise ValueError(f"labels {self.labels} with the verdict {self.verdict}")

    @property
    def signed_bytes(self) -> bytes:
        """What a party signs: the finding, key by key, behind words that no other protocol of its key signs."""
        return _FINDING + msgspec.json.encode(self)


class Signed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A finding under one party's signature, ECDSA with SHA-256 by the key of its certificate, in hex.

    ``party``: its place among the three.
    """

    finding: Finding
    party: Annotated[int, Meta(ge=0, lt=PARTIES)]
    signature: Annotated[str, Meta(pattern="^([0-9a-f]{2}){8,80}$")]
