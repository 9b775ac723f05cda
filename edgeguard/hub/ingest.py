"""Turns what arrives by MQTT into accepted or rejected messages, and says what to acknowledge. Pure.

Rules enforced here:

* a report is accepted only when its counts add up and its features are finite and of one width: that of the model,
  where the hub knows it;
* of a private model's report everything that speaks of channels is dropped here, before anything is stored;
* **a message that can never be accepted is acknowledged all the same**, as received and rejected, wherever boot and
  seq can still be read: a device must not send it for ever. It is kept as a dead letter and counted, never as data;
* a message of an older session than the stored one changes nothing, so that a late will never beats a new birth;
  within one session, offline and stopped are final;
* a microcontroller is online for as long as the session of its gateway that it came by: it has no will of its own;
* a device sends oldest first, and what it has under way of one boot spans at most ``MAX_GAPS`` numbers. So when more
  than that are missing, the older ones are gone: they leave the list of gaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import msgspec

from edgeguard.contract import messages, topics
from edgeguard.contract.messages import (
    MAX_GAPS,
    Ack,
    Alert,
    Birth,
    Boot,
    Health,
    LabelCount,
    LabelEvidence,
    Message,
    Moved,
    Report,
    Reported,
    Seq,
    Status,
)
from edgeguard.contract.scores import EDGES, THRESHOLD
from edgeguard.errors import LinkError

MAX_WINDOW = 1_000_000_000
"""No window holds more inputs: keeps sums far from the limits of a database's integers."""
_HEAD = 256
_TOPIC = 300
"""Longer than any topic of ours; longer ones are not remembered."""
_LARGEST = 3.4028235e38  # float32, which features are made of
_FLAGGED_BINS = EDGES.index(THRESHOLD) + 1

_KINDS: Mapping[str, type[Message]] = {
    topics.STATUS: Status,
    topics.BIRTH: Birth,
    topics.HEALTH: Health,
    topics.REPORT: Report,
    topics.ALERT: Alert,
    topics.MODEL_REPORTED: Reported,
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the hub knows of a model's reports: D, the number of classes (0 for a model without), who may see them.

    ``private``: no features of it are stored.
    """

    width: int
    classes: int
    private: bool = False


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A message that holds together. ``retained`` when the broker repeated it rather than the device sent it now."""

    device: str
    message: Message
    payload: bytes
    retained: bool = False


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was not taken. ``identity``: device, boot and seq, where they could be read nevertheless.

    ``listed`` is False where the device has too many dead letters already: then it is acknowledged and no more.
    """

    topic: str
    reason: str
    head: bytes
    identity: tuple[str, str, int] | None = None
    listed: bool = True


_address = lru_cache(maxsize=65536)(topics.parse)


class _Identity(msgspec.Struct):
    boot: Boot
    seq: Seq


def read(
    topic: str, payload: bytes, *, fleet: str, models: Mapping[str, ModelShape], retained: bool = False
) -> Accepted | Rejected:
    """Decode and check one message.

    Args:
        topic: where it arrived.
        payload: what arrived.
        fleet: the fleet of this hub.
        models: what is known of models, by model digest.
        retained: the broker's retain flag.
    """
    device = None
    try:
        address = _address(topic) if len(topic) <= _TOPIC else topics.parse(topic)
        if address.fleet == fleet and address.channel in _KINDS:
            device = address.device
        else:
            return reject(topic, payload, f"topic {topic[:200]!r} is not a channel of fleet {fleet}", device=None)
        message = messages.decode(_KINDS[address.channel], payload)
        if isinstance(message, Report):
            model = models.get(message.model_digest)
            _check_report(message, model)
            if model is not None and model.private:
                message = msgspec.structs.replace(message, evidence=(), activation=None, moved=None)
                payload = messages.encode(message)
        elif isinstance(message, Alert):
            _require(all(map(math.isfinite, (message.score, *message.scores.values()))), "a score is not finite")
    except (LinkError, ValueError) as error:
        return reject(topic, payload, str(error), device=device)
    return Accepted(device=device, message=message, payload=payload, retained=retained)


def reject(topic: str, payload: bytes, reason: str, *, device: str | None) -> Rejected:
    """A dead letter, with the identity of a report or alert where it can be read."""
    identity = None
    if device is not None and topic.endswith((f"/{topics.REPORT}", f"/{topics.ALERT}")):
        try:
            found = msgspec.json.decode(payload, type=_Identity)
            identity = (device, found.boot, found.seq)
        except (msgspec.DecodeError, ValueError, RecursionError):
            pass
    return Rejected(topic=topic[:512], reason=reason[:512], head=payload[:_HEAD], identity=identity)


def _check_report(report: Report, model: ModelShape | None) -> None:
    """Raise ValueError with the rule that a report breaks. Plain loops: this runs for every report of the fleet."""
    counts: dict[int, LabelCount] = {}
    inputs = flagged = 0
    for count in report.labels:
        counts[count.label] = count
        inputs += count.inputs
        flagged += count.flagged
        if count.flagged > count.inputs:
            raise ValueError("more flagged inputs than inputs of a label")
    histogram = report.histogram
    if report.inputs > MAX_WINDOW:
        raise ValueError(f"more than {MAX_WINDOW} inputs in one window")
    _require(len(counts) == len(report.labels), "a label is counted twice")
    _require(inputs + report.unchecked == report.inputs, "inputs are not the sum over labels and unchecked")
    _require(sum(histogram) == inputs, "the histogram does not count the checked inputs")
    _require(sum(histogram[_FLAGGED_BINS:]) == flagged, "flagged inputs are not those above 1 in the histogram")
    widths: set[int] = set()
    if report.evidence:
        _require(len({e.label for e in report.evidence}) == len(report.evidence), "evidence for a label stands twice")
        for evidence in report.evidence:
            _check_evidence(evidence, counts.get(evidence.label))
            _check_vector(evidence.flagged_mean, widths)
            if evidence.unflagged:
                _check_vector(evidence.unflagged_mean, widths)
                _check_vector(evidence.unflagged_std, widths)
    if report.activation is not None:
        _require(report.activation.inputs <= report.inputs, "activation means of more inputs than were counted")
        _check_vector(report.activation.mean, widths)
    if report.moved is not None:
        _check_moved(report.moved, counts.get(report.moved.label), model)
    _require(len(widths) <= 1 and 0 not in widths, "feature vectors of unequal or no length")
    if model is not None:
        if not widths <= {model.width}:
            raise ValueError(f"features of width {widths}, the model has {model.width}")
        known = range(model.classes) if model.classes else (-1,)
        for label in counts:
            _require(label in known, "a label that the model does not have")


def _check_evidence(evidence: LabelEvidence, count: LabelCount | None) -> None:
    _require(
        count is not None and evidence.flagged <= count.flagged and evidence.unflagged <= count.inputs - count.flagged,
        "evidence for more inputs than were counted",
    )
    described = len(evidence.unflagged_mean) if evidence.unflagged else 0
    _require(
        len(evidence.unflagged_mean) == len(evidence.unflagged_std) == described
        and bool(described) == bool(evidence.unflagged),
        "unflagged features do not match their count",
    )
    _require(not evidence.unflagged_std or min(evidence.unflagged_std) >= 0, "a standard deviation is negative")


def _check_moved(moved: Moved, count: LabelCount | None, model: ModelShape | None) -> None:
    _require(count is not None and moved.inputs <= count.flagged, "channels of more inputs than were flagged")
    _require(all(c.inputs <= moved.inputs for c in moved.channels), "a channel of more inputs than were looked at")
    known = {c.channel for c in moved.channels if model is None or c.channel < model.width}
    _require(len(known) == len(moved.channels), "a channel that stands twice, or that the model does not have")


def _check_vector(vector: tuple[float, ...], widths: set[int]) -> None:
    """Note its length; JSON has no NaN, so that the extremes say that all of it is a finite float32."""
    widths.add(len(vector))
    if vector and not (min(vector) >= -_LARGEST and max(vector) <= _LARGEST):
        raise ValueError("a feature is not a finite float32")


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


class Stream(msgspec.Struct, frozen=True):
    """What of one (device, boot) was received: all up to ``through``, but ``gaps``."""

    through: int = 0
    gaps: tuple[int, ...] = ()

    def take(self, seq: int) -> tuple[bool, Stream]:
        """Whether ``seq`` is new, and the stream after it."""
        if seq == self.through + 1:
            return True, Stream(seq, self.gaps)
        if seq > self.through:
            missing = range(max(self.through + 1, seq - MAX_GAPS), seq)
            return True, Stream(seq, (*self.gaps, *missing)[-MAX_GAPS:])
        if seq in self.gaps:
            return True, Stream(self.through, tuple(gap for gap in self.gaps if gap != seq))
        return False, self

    def ack(self, boot: str) -> Ack:
        """What the device may forget."""
        return Ack(boot=boot, through_seq=self.through, gaps=self.gaps)


class Acks:
    """Acknowledgements that wait to be sent: the latest for each (device, boot), which stands for those before it.

    All leave together, at most once in ``every_s`` seconds: a device in a hurry costs no message for each report.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_s = -math.inf
        self._waiting: dict[tuple[str, str], Ack] = {}

    def add(self, acks: Iterable[tuple[str, Ack]]) -> None:
        """Let these wait."""
        for device, ack in acks:
            self._waiting[device, ack.boot] = ack

    def due_in_s(self, now_s: float) -> float:
        """Seconds until something is to be sent, infinite where nothing waits."""
        return max(self._next_s - now_s, 0.0) if self._waiting else math.inf

    def take(self, now_s: float) -> list[tuple[str, Ack]]:
        """What is to be sent now, by device. ``now_s`` is a clock of any origin."""
        if self.due_in_s(now_s) > 0:
            return []
        self._next_s = now_s + self._every_s
        return self.take_all()

    def take_all(self) -> list[tuple[str, Ack]]:
        """Everything that waits."""
        taken = [(device, ack) for (device, _), ack in self._waiting.items()]
        self._waiting.clear()
        return taken


READINGS = 16
"""So many of a device's last latencies are kept."""


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """What a device's own words say of how it fares.

    Attributes:
        boot: the process that it runs in.
        starts: how many processes it was heard from, since ``since_ms`` by the hub's clock.
        readings: how many latencies it has told.
        latencies: the last of them, in microseconds, the oldest first.
    """

    boot: str
    starts: int = 0
    since_ms: int
    readings: int = 0
    latencies: tuple[float, ...] = ()

    def after(self, message: Status | Birth | Health | Reported) -> Pulse:
        """The pulse after one more message."""
        pulse = self
        if message.boot != self.boot:
            pulse = msgspec.structs.replace(pulse, boot=message.boot, starts=self.starts + 1)
        if isinstance(message, Health) and message.p50_us > 0:
            told = (*self.latencies, message.p50_us)[-READINGS:]
            pulse = msgspec.structs.replace(pulse, readings=self.readings + 1, latencies=told)
        return pulse


Outcome = Literal["updated", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What is known of one device. ``outcome`` is what became of the hint with ``outcome_sequence``."""

    device: str
    session: int = 0
    state: Literal["online", "offline", "stopped", "unknown"] = "unknown"
    model_digest: str | None = None
    guard_digest: str | None = None
    sequence: int = 0
    outcome: Outcome | None = None
    outcome_sequence: int | None = None
    reason: str = ""
    last_seen_ms: int = 0
    pulse: Pulse | None = None

    @property
    def online(self) -> bool:
        """True when its last word was that it is there."""
        return self.state == "online"

    def after(self, message: Message, *, now_ms: int | None) -> Device:
        """This device after a message of its own; ``now_ms`` None for one that the broker repeated."""
        seen = self if now_ms is None else replace(self, last_seen_ms=max(self.last_seen_ms, now_ms))
        if isinstance(message, Status | Birth | Health | Reported) and message.session >= self.session and now_ms:
            before = self.pulse or Pulse(boot=message.boot, since_ms=now_ms)
            seen = replace(seen, pulse=before.after(message))
        if not isinstance(message, Status | Birth | Reported) or message.session < self.session:
            return seen
        if isinstance(message, Status):
            if message.session == self.session and self.state in ("offline", "stopped"):
                return seen
            return replace(seen, session=message.session, state=message.state)
        if message.session > self.session:
            # Its status is on the way; that of an older session says nothing of this one.
            seen = replace(seen, session=message.session, state="unknown")
        seen = replace(
            seen,
            model_digest=message.model_digest,
            guard_digest=message.guard_digest,
            sequence=message.sequence,
        )
        if isinstance(message, Reported) and message.state in ("updated", "refused", "failed"):
            seen = replace(
                seen, outcome=message.state, outcome_sequence=message.desired_sequence, reason=message.reason
            )
        return seen

    def behind(self, gateway: Device, *, via: int | None = None) -> Device:
        """This microcontroller, given what is known of its gateway.

        Args:
            gateway: the gateway.
            via: the session of the gateway that a status names; None for what was known before the gateway's status.
        """
        has_ended = gateway.state in ("offline", "stopped") and (via is None or via <= gateway.session)
        return replace(self, state=gateway.state) if self.online and has_ended else self
