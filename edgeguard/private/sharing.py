"""A device's values, split into three shares of which any two say nothing, and sealed for one party each. Pure.

Additive sharing in the ring of 64-bit integers: x = s0 + s1 + s2 modulo 2^64, s0 and s1 uniformly random.

Rules enforced here:

* the plain text of a sealed share names round, device and party, and its length depends on the round alone: a share of
  another round, another device or another party is refused, whoever sends it again;
* a commitment covers the whole plain text with 256 random bits in it, so that it gives nothing away, and parties who
  compare commitments know that they hold shares of the same submission;
* a device that submits two different things to one round is left out of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from edgeguard.contract.private import PARTIES, Round, Submission
from edgeguard.errors import ConfigError, TrustError
from edgeguard.private.parties import Parties

Values = npt.NDArray[np.int64]
_DOMAIN = b"edgeguard private share v1\0"
NONCE_BYTES = 32


class Asked(Protocol):
    """What values are shared for: a round, or an owner's part in an inspection; ``channels`` values each."""

    @property
    def id(self) -> str: ...
    @property
    def parties(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def digest(self) -> str: ...


class _Share(msgspec.Struct, frozen=True, array_like=True):
    """The plain text of one sealed share; ``values``: little-endian 64-bit integers, one a channel."""

    round: str
    device: str
    party: int
    nonce: bytes
    values: bytes


class Opened(NamedTuple):
    """A share that its party opened and checked: ``values`` [C], and the submission's digest."""

    values: Values
    digest: str


def values_of(asked: Round, ascending: Sequence[int]) -> Values:
    """What a device submits [C]: its votes, 0 or 1, or its ranks, from the channels in ascending order of activity.

    Raises:
        ConfigError: not each channel of the round once.
    """
    if sorted(ascending) != list(range(asked.channels)):
        raise ConfigError(
            f"channels of {asked.layer}", got=f"{len(ascending)} ranked", expected=f"each of {asked.channels} once"
        )
    values = np.zeros(asked.channels, dtype=np.int64)
    if asked.kind == "votes":
        values[list(ascending[: asked.prune])] = 1
    else:
        values[list(ascending)] = np.arange(asked.channels)
    return values


def submit(asked: Asked, device: str, values: Values, parties: Parties, random: bytes) -> Submission:
    """Split values [C] into three shares, and seal each for its party.

    Args:
        asked: the round, or the part.
        device: the id under which this device publishes; of an owner, its role.
        values: see :func:`values_of`, and :mod:`edgeguard.private.owners`.
        parties: the three that this device's owner has compared the digest of.
        random: :func:`random_bytes` fresh random bytes, used once.

    Raises:
        TrustError: the round is meant for other parties.
    """
    if asked.parties != parties.digest:
        raise TrustError(
            f"round {asked.id}",
            got=f"parties {asked.parties[:12]}",
            expected=f"{parties.digest[:12]}, which this device trusts",
            do="ask who made the round",
        )
    width = 8 * asked.channels
    masks = [np.frombuffer(random[i * width : (i + 1) * width], dtype="<u8") for i in range(PARTIES - 1)]
    last = values.astype("<u8") - masks[0] - masks[1]
    sealed, commitments = [], []
    for index, share in enumerate((*masks, last)):
        start = (PARTIES - 1) * width + index * NONCE_BYTES
        nonce = random[start : start + NONCE_BYTES]
        plain = msgspec.msgpack.encode(_Share(asked.digest, device, index, nonce, share.tobytes()))
        key = PublicKey(bytes.fromhex(parties.parties[index].sealing_key))
        sealed.append(SealedBox(key).encrypt(plain))
        commitments.append(_commitment(plain))
    return Submission(round=asked.digest, device=device, sealed=tuple(sealed), commitments=tuple(commitments))


def random_bytes(asked: Asked) -> int:
    """How many random bytes :func:`submit` needs."""
    return (PARTIES - 1) * 8 * asked.channels + PARTIES * NONCE_BYTES


def opened(asked: Asked, submission: Submission, device: str, index: int, key: PrivateKey) -> Opened:
    """A party's own share of a submission.

    Args:
        asked: the round.
        submission: as it came.
        device: who published it, as the broker or the folder says.
        index: this party's.
        key: this party's.

    Raises:
        TrustError: it is not for this round, not this device's, sealed for somebody else, or not what it commits to.
    """
    what = f"submission of {device}"
    if submission.device != device:
        raise TrustError(what, got=f"one of {submission.device}")
    if submission.round != asked.digest:
        raise TrustError(what, got="one to another round", expected=f"round {asked.id}")
    try:
        plain = SealedBox(key).decrypt(submission.sealed[index])
    except (CryptoError, ValueError) as error:
        raise TrustError(what, got="a share that this party's key does not open") from error
    if _commitment(plain) != submission.commitments[index]:
        raise TrustError(what, got="a share that does not match its commitment")
    try:
        share = msgspec.msgpack.decode(plain, type=_Share)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(what, got="a share that cannot be read") from error
    if (share.round, share.device, share.party) != (asked.digest, device, index) or len(share.nonce) != NONCE_BYTES:
        raise TrustError(what, got="a share of another round, device or party")
    if len(share.values) != 8 * asked.channels:
        raise TrustError(what, got=f"{len(share.values)} bytes", expected=f"{asked.channels} values")
    return Opened(np.frombuffer(share.values, dtype="<i8").astype(np.int64), submission.digest)


def common(views: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """The devices whose submission all parties hold, and hold alike, sorted.

    Args:
        views: of each party, the digest of the submission by device.
    """
    first, *others = views
    return tuple(sorted(d for d, digest in first.items() if all(other.get(d) == digest for other in others)))


def _commitment(plain: bytes) -> str:
    return hashlib.sha256(_DOMAIN + plain).hexdigest()
