"""The messages on the wire, as frozen msgspec structs in JSON, and the only way to decode them.

Rules enforced here:

* every message carries ``v``, the version of its kind; another version is refused by number, never guessed at;
* unknown fields are ignored, so that a newer peer may say more;
* sizes and ranges are bounded before anything is stored: a peer may be hostile;
* a report is identified by (fleet, device, boot, seq); ``boot`` is a random 64-bit id per process start and ``seq``
  counts from 1 within it, over reports and alerts together. Fleet and device come from the topic, not the payload.

Example:
    >>> decode(Ack, encode(Ack(boot="00000000000000ab", through_seq=7)))
    Ack(boot='00000000000000ab', through_seq=7, gaps=(), v=1)
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from edgeguard.contract.scores import BINS
from edgeguard.errors import LinkError

MAX_PAYLOAD = 512 * 1024
MAX_FEATURES = 4096
MAX_LABELS = 4096
MAX_EVIDENCE = 64
MAX_GAPS = 256

Version = Literal[1]
Boot = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Seq = Annotated[int, Meta(ge=1, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Milliseconds = Annotated[int, Meta(ge=0, le=2**53)]
Label = Annotated[int, Meta(ge=-1, lt=MAX_LABELS)]
"""A class index; -1 for a model without classes."""
Text = Annotated[str, Meta(max_length=512)]
Features = Annotated[tuple[float, ...], Meta(max_length=MAX_FEATURES)]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages."""

    v: Version = 1


class Status(Message, frozen=True, kw_only=True):
    """Retained, and the last will. ``session`` counts connections, so that a late will never beats a new birth."""

    state: Literal["online", "offline", "stopped"]
    session: Count
    boot: Boot


class Birth(Message, frozen=True, kw_only=True):
    """Retained, sent after each connection: what this device is and what it runs."""

    session: Count
    boot: Boot
    edgeguard: Text
    python: Text
    board: Text
    runtime: Text
    runtime_version: Text
    model_digest: Digest
    guard_digest: Digest
    file_digest: Digest
    sequence: Count
    detectors: Annotated[tuple[Text, ...], Meta(max_length=64)]
    capabilities: Annotated[tuple[Text, ...], Meta(max_length=64)] = ()


class Health(Message, frozen=True, kw_only=True):
    """Every now and then, lossy: how the device fares."""

    session: Count
    boot: Boot
    rss_bytes: Count
    spooled: Count
    inputs: Count
    p50_us: float


class LabelCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many inputs of a window were predicted as ``label``, and how many of these were flagged."""

    label: Label
    inputs: Count
    flagged: Count


class LabelEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """Per-channel evidence for one predicted label of a window: flagged against unflagged inputs.

    ``flagged_mean``, ``unflagged_mean`` and ``unflagged_std`` have the length and order of ``edgeguard_features``;
    the latter two are empty where no input of this label was unflagged.
    """

    label: Label
    flagged: Annotated[int, Meta(ge=1, le=2**53)]
    unflagged: Count
    flagged_mean: Features
    unflagged_mean: Features = ()
    unflagged_std: Features = ()


class ActivationMean(msgspec.Struct, frozen=True, kw_only=True):
    """Mean features of the unflagged inputs of a window: the activation statistics that federated pruning needs."""

    inputs: Annotated[int, Meta(ge=1, le=2**53)]
    mean: Features


class Report(Message, frozen=True, kw_only=True):
    """One window. Counts add up: ``inputs`` = sum over ``labels`` + ``unchecked``; the histogram counts the checked.

    Times are the device's own clock, for people to read; no decision rests on them.
    """

    boot: Boot
    seq: Seq
    model_digest: Digest
    guard_digest: Digest
    started_ms: Milliseconds
    ended_ms: Milliseconds
    inputs: Count
    unchecked: Count
    labels: Annotated[tuple[LabelCount, ...], Meta(max_length=MAX_LABELS)]
    histogram: Annotated[tuple[Count, ...], Meta(min_length=BINS, max_length=BINS)]
    evidence: Annotated[tuple[LabelEvidence, ...], Meta(max_length=MAX_EVIDENCE)] = ()
    activation: ActivationMean | None = None


class Alert(Message, frozen=True, kw_only=True):
    """One flagged input, sent at once and rate-limited. It is also counted in the window's report."""

    boot: Boot
    seq: Seq
    model_digest: Digest
    guard_digest: Digest
    at_ms: Milliseconds
    label: Label
    score: float
    scores: dict[Text, float]
    p_value: float | None = None


class Ack(Message, frozen=True, kw_only=True):
    """Hub to device, after the database commit: all of ``boot`` up to ``through_seq`` is stored, but ``gaps``.

    Only this lets a device forget a report; what it still holds of ``gaps`` it sends again.
    """

    boot: Boot
    through_seq: Count
    gaps: Annotated[tuple[Seq, ...], Meta(max_length=MAX_GAPS)] = ()


class Desired(Message, frozen=True, kw_only=True):
    """Hub to device, retained: a *hint* that a signed model waits. It carries no authority of its own."""

    target: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._/-]{0,199}$")]
    sequence: Seq


class Reported(Message, frozen=True, kw_only=True):
    """Device to hub, retained: what runs, and what became of the last hint.

    ``running`` no hint is open; ``updated`` the hinted model runs; ``refused`` a check of trust failed and the old
    model keeps running; ``failed`` the network or disk failed and the device will try again.
    """

    session: Count
    boot: Boot
    state: Literal["running", "fetching", "updated", "refused", "failed"]
    model_digest: Digest
    guard_digest: Digest
    file_digest: Digest
    sequence: Count
    desired_sequence: Count | None = None
    reason: Text = ""


M = TypeVar("M", bound=Message)


class _Probe(msgspec.Struct):
    v: int


def encode(message: Message) -> bytes:
    """The message as JSON."""
    return msgspec.json.encode(message)


def decode(kind: type[M], payload: bytes) -> M:
    """Decode and check one message.

    Raises:
        LinkError: too large, not JSON, another version, a missing field, a wrong type or a value out of range.
    """
    if len(payload) > MAX_PAYLOAD:
        raise LinkError(f"{kind.__name__} message", got=f"{len(payload)} bytes", expected=f"at most {MAX_PAYLOAD}")
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        version = _version_of(payload)
        if version not in (None, 1):
            raise LinkError(f"{kind.__name__} message", got=f"version {version}", expected="version 1") from error
        raise LinkError(f"{kind.__name__} message", got=str(error)[:300]) from error


def _version_of(payload: bytes) -> int | None:
    try:
        return msgspec.json.decode(payload, type=_Probe).v
    except (msgspec.DecodeError, RecursionError):
        return None
