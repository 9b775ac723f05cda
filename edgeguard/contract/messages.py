"""The messages on the wire, as frozen msgspec structs in JSON, and the only way to decode them.

Rules enforced here:

* every message carries ``v``, the version of its kind; another version is refused by number, never guessed at;
* unknown fields are ignored, so that a newer peer may say more;
* sizes and ranges are bounded before anything is stored: a peer may be hostile;
* a report is identified by (fleet, device, boot, seq); ``boot`` is a random 64-bit id per process start and ``seq``
  counts from 1 within it, over reports and alerts together. Fleet and device come from the topic, not the payload;
* a command and its reply share a transaction id. Its first 12 hex digits are the hub's time, so that a device can
  tell an id that it may have forgotten from a new one. A reply has a result when it is "ok", and only then.

Example:
    >>> decode(Ack, encode(Ack(boot="00000000000000ab", through_seq=7)))
    Ack(boot='00000000000000ab', through_seq=7, gaps=(), v=1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from edgeguard.contract.scores import BINS
from edgeguard.errors import LinkError

MAX_PAYLOAD = 512 * 1024
MAX_COMMAND = 4096
MAX_FEATURES = 4096
MAX_LABELS = 4096
MAX_EVIDENCE = 64
MAX_GAPS = 256

Version = Literal[1]
# Python's "$" alone would let a line feed follow.
Boot = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}$(?!\n)")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Seq = Annotated[int, Meta(ge=1, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Milliseconds = Annotated[int, Meta(ge=0, le=2**53)]
Label = Annotated[int, Meta(ge=-1, lt=MAX_LABELS)]
"""A class index; -1 for a model without classes."""
Text = Annotated[str, Meta(max_length=512)]
Features = Annotated[tuple[float, ...], Meta(max_length=MAX_FEATURES)]
Transaction = Annotated[str, Meta(pattern=r"^[0-9a-f]{16,64}$(?!\n)")]
Layer = Annotated[str, Meta(min_length=1, max_length=512)]
"""A tap: the source layer of its activation, or its tensor."""
Channels = Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_FEATURES)], ...], Meta(max_length=MAX_FEATURES)]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages."""

    v: Version = 1


class Status(Message, frozen=True, kw_only=True):
    """Retained, and the last will. ``session`` counts connections, so that a late will never beats a new birth.

    ``via``: of a microcontroller, the session of its gateway under which this holds: it is not online for longer.
    """

    state: Literal["online", "offline", "stopped"]
    session: Count
    boot: Boot
    via: Count | None = None


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
    """Every now and then, lossy: how the device fares. What it does not know is None.

    ``dropped``: inputs, results and foreign scores that there was no room for. ``level``: what the guard's budget lets
    it do, and ``reason`` why it is not everything. ``unwritten``: windows that the disk does not take. ``drift``: is
    the site still what the guard was calibrated to? "steady", "recalibrate" or "too early".
    """

    session: Count
    boot: Boot
    rss_bytes: Count | None
    spooled: Count
    inputs: Count
    p50_us: float
    anonymous_bytes: Count | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    under_voltage: bool | None = None
    dropped: Count = 0
    unwritten: Count = 0
    quarantined: Count | None = None
    level: Text = "everything"
    reason: Text = ""
    drift: Text | None = None


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


class MovedChannel(msgspec.Struct, frozen=True, kw_only=True):
    """One feature in ``Moved``: in how many of the inputs at least it stood out, and how far in these on average.

    ``excess``: beyond what the guard expects of the class; 1 is the deviation that alone would reach a threshold.
    """

    channel: Annotated[int, Meta(ge=0, lt=MAX_FEATURES)]
    inputs: Annotated[int, Meta(ge=1, le=2**53)]
    excess: float


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """Instead of evidence, of a device too small for whole vectors: the features that moved most.

    Gathered over ``inputs`` flagged inputs of the label that most of them were predicted as.
    """

    label: Label
    inputs: Annotated[int, Meta(ge=1, le=2**53)]
    channels: Annotated[tuple[MovedChannel, ...], Meta(max_length=64)]


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
    moved: Moved | None = None


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

    target: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._/-]{0,199}$(?!\n)")]
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


class Command(Message, frozen=True, kw_only=True):
    """Base of what the hub asks of a device. ``name`` is the last part of its topic."""

    name: ClassVar[str]
    id: Transaction


class Ping(Command, frozen=True, kw_only=True):
    """Say that you are there."""

    name: ClassVar[str] = "ping"


class Restart(Command, frozen=True, kw_only=True):
    """End the agent, so that what supervises it starts it again. The reply comes first."""

    name: ClassVar[str] = "restart"


class Rank(Command, frozen=True, kw_only=True):
    """Order the channels of one tap, or of all taps, by mean activation: federated pruning by rank aggregation (RAP).

    Wu et al., "Mitigating Backdoor Attacks in Federated Learning", 2020.
    """

    name: ClassVar[str] = "rank"
    model_digest: Digest
    layer: Layer | None = None


class Vote(Command, frozen=True, kw_only=True):
    """Name the ``round(share * channels)`` least active channels of one tap: federated pruning by vote (MVP).

    ``round`` is Python's, half to even. Wu et al., as for :class:`Rank`.
    """

    name: ClassVar[str] = "vote"
    model_digest: Digest
    layer: Layer
    share: Annotated[float, Meta(gt=0, lt=1)]


class Recalibrate(Command, frozen=True, kw_only=True):
    """Fit the guard anew to clean data that lies on the device: the signed sidecar's, or the owner's own.

    Where the owner's data lies is the device's configuration; no command can name a place.
    """

    name: ClassVar[str] = "recalibrate"
    source: Literal["sidecar", "owner"]


COMMANDS: Mapping[str, type[Command]] = {kind.name: kind for kind in (Ping, Restart, Rank, Vote, Recalibrate)}


class Reply(Message, frozen=True, kw_only=True):
    """Base of replies. ``refused``: nothing was done, and why; ``failed``: it was begun and did not succeed."""

    id: Transaction
    state: Literal["ok", "refused", "failed"]
    reason: Text = ""
    result: Any = None

    def __post_init__(self) -> None:
        if (self.state == "ok") != (self.result is not None):
            raise ValueError(f"a reply that is {self.state} with{'out' if self.result is None else ''} a result")


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a ping."""

    boot: Boot
    session: Count
    uptime_s: Annotated[float, Meta(ge=0)]


class PingReply(Reply, frozen=True, kw_only=True):
    """Reply to :class:`Ping`."""

    result: Alive | None = None


class Restarting(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a restart: the process that ends now. The next birth comes from another boot."""

    boot: Boot


class RestartReply(Reply, frozen=True, kw_only=True):
    """Reply to :class:`Restart`."""

    result: Restarting | None = None


class TapRanking(msgspec.Struct, frozen=True, kw_only=True):
    """All channels of one tap, the least active first."""

    tensor: Text
    source_layer: Text
    channels: Channels

    def __post_init__(self) -> None:
        if sorted(self.channels) != list(range(len(self.channels))):
            raise ValueError("a ranking that does not name each channel once")


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a rank: ``inputs`` is how many unflagged inputs the mean activations rest on."""

    model_digest: Digest
    inputs: Count
    taps: Annotated[tuple[TapRanking, ...], Meta(min_length=1, max_length=64)]


class RankReply(Reply, frozen=True, kw_only=True):
    """Reply to :class:`Rank`."""

    result: Ranking | None = None


class Ballot(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a vote: the channels that this device would prune, ascending; ``inputs`` as in :class:`Ranking`."""

    model_digest: Digest
    layer: Layer
    inputs: Count
    channels: Channels

    def __post_init__(self) -> None:
        if sorted(set(self.channels)) != list(self.channels):
            raise ValueError("channels that do not ascend")


class VoteReply(Reply, frozen=True, kw_only=True):
    """Reply to :class:`Vote`."""

    result: Ballot | None = None


class Recalibration(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a recalibration: None while it is at work; a second reply of the same id brings the digest."""

    guard_digest: Digest | None


class RecalibrateReply(Reply, frozen=True, kw_only=True):
    """Reply to :class:`Recalibrate`: "ok" once it is accepted, and again, or "failed", once it is done."""

    result: Recalibration | None = None


REPLIES: Mapping[str, type[Reply]] = {
    Ping.name: PingReply,
    Restart.name: RestartReply,
    Rank.name: RankReply,
    Vote.name: VoteReply,
    Recalibrate.name: RecalibrateReply,
}


def transaction(at_ms: int, salt: str) -> str:
    """The id of a new command: the hub's time in milliseconds since 1970, and 4 to 52 random hex digits."""
    return f"{at_ms:012x}{salt}"


def issued_ms(transaction: str) -> int:
    """The time that stands in a transaction id, in milliseconds since 1970."""
    return int(transaction[:12], 16)


M = TypeVar("M", bound=Message)


class _Probe(msgspec.Struct):
    v: int


def encode(message: Message) -> bytes:
    """The message as JSON."""
    return msgspec.json.encode(message)


def decode(kind: type[M], payload: bytes, *, limit: int = MAX_PAYLOAD) -> M:
    """Decode and check one message of at most ``limit`` bytes.

    Raises:
        LinkError: too large, not JSON, another version, a missing field, a wrong type or a value out of range.
    """
    if len(payload) > limit:
        raise LinkError(f"{kind.__name__} message", got=f"{len(payload)} bytes", expected=f"at most {limit}")
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        version = _version_of(payload)
        if version not in (None, 1):
            raise LinkError(f"{kind.__name__} message", got=f"version {version}", expected="version 1") from error
        raise LinkError(f"{kind.__name__} message", got=str(error)[:300]) from error


def _version_of(payload: bytes) -> int | None:
    try:
        return msgspec.json.decode(payload, type=_Probe).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
