"""Turns what arrives by MQTT into accepted or rejected messages, and says what to acknowledge. Pure.

Rules enforced here:

* a report is accepted only when its counts add up and its features are finite and of one width: that of the model,
  where the hub knows it;
* **a message that can never be accepted is acknowledged all the same**, as received and rejected, wherever boot and
  seq can still be read: a device must not send it for ever. It is kept as a dead letter and counted, never as data;
* a message of an older session than the stored one changes nothing, so that a late will never beats a new birth;
  within one session, offline and stopped are final;
* a device sends oldest first, and what it has under way of one boot spans at most ``MAX_GAPS`` numbers. So when more
  than that are missing, the older ones are gone: they leave the list of gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    Message,
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
    """What the hub knows of a model's reports: D, and the number of classes (0 for a model without)."""

    width: int
    classes: int


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A message that holds together. ``retained`` when the broker repeated it rather than the device sent it now."""

    device: str
    message: Message
    payload: bytes
    retained: bool = False


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A message that was not taken. ``identity``: device, boot and seq, where they could be read nevertheless."""

    topic: str
    reason: str
    head: bytes
    identity: tuple[str, str, int] | None = None


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
        address = topics.parse(topic)
        ours = address.fleet == fleet and address.channel in _KINDS
        _require(ours, f"topic {topic[:200]!r} is not a device's channel in fleet {fleet}")
        device = address.device
        message = messages.decode(_KINDS[address.channel], payload)
        if isinstance(message, Report):
            _check_report(message, models.get(message.model_digest))
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
    """Raise ValueError with the rule that a report breaks."""
    labels = {count.label: count for count in report.labels}
    flagged = sum(count.flagged for count in report.labels)
    _require(report.inputs <= MAX_WINDOW, f"more than {MAX_WINDOW} inputs in one window")
    _require(len(labels) == len(report.labels), "a label is counted twice")
    _require(all(c.flagged <= c.inputs for c in report.labels), "more flagged inputs than inputs of a label")
    _require(
        sum(c.inputs for c in report.labels) + report.unchecked == report.inputs,
        "inputs are not the sum over labels and unchecked",
    )
    _require(
        sum(report.histogram) == report.inputs - report.unchecked, "the histogram does not count the checked inputs"
    )
    _require(sum(report.histogram[_FLAGGED_BINS:]) == flagged, "flagged inputs are not those above 1 in the histogram")
    _require(len({e.label for e in report.evidence}) == len(report.evidence), "evidence for a label stands twice")
    for evidence in report.evidence:
        count = labels.get(evidence.label)
        _require(
            count is not None
            and evidence.flagged <= count.flagged
            and evidence.unflagged <= count.inputs - count.flagged,
            "evidence for more inputs than were counted",
        )
        described = len(evidence.unflagged_mean) if evidence.unflagged else 0
        _require(
            len(evidence.unflagged_mean) == len(evidence.unflagged_std) == described
            and bool(described) == bool(evidence.unflagged),
            "unflagged features do not match their count",
        )
        _require(all(value >= 0 for value in evidence.unflagged_std), "a standard deviation is negative")
    if report.activation is not None:
        _require(report.activation.inputs <= report.inputs, "activation means of more inputs than were counted")
    vectors = _vectors(report)
    widths = {len(vector) for vector in vectors}
    _require(len(widths) <= 1 and 0 not in widths, "feature vectors of unequal or no length")
    _require(all(abs(v) <= _LARGEST for vector in vectors for v in vector), "a feature is not a finite float32")
    if model is not None:
        _require(widths <= {model.width}, f"features of width {widths}, the model has {model.width}")
        known = range(model.classes) if model.classes else (-1,)
        _require(all(label in known for label in labels), "a label that the model does not have")


def _vectors(report: Report) -> list[tuple[float, ...]]:
    vectors = [e.flagged_mean for e in report.evidence]
    vectors += [v for e in report.evidence if e.unflagged for v in (e.unflagged_mean, e.unflagged_std)]
    return vectors + ([report.activation.mean] if report.activation is not None else [])


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


@dataclass(frozen=True)
class Stream:
    """What of one (device, boot) was received: all up to ``through``, but ``gaps``."""

    through: int = 0
    gaps: tuple[int, ...] = ()

    def take(self, seq: int) -> tuple[bool, Stream]:
        """Whether ``seq`` is new, and the stream after it."""
        if seq > self.through:
            missing = range(max(self.through + 1, seq - MAX_GAPS), seq)
            return True, Stream(seq, (*self.gaps, *missing)[-MAX_GAPS:])
        if seq in self.gaps:
            return True, Stream(self.through, tuple(gap for gap in self.gaps if gap != seq))
        return False, self

    def ack(self, boot: str) -> Ack:
        """What the device may forget."""
        return Ack(boot=boot, through_seq=self.through, gaps=self.gaps)


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

    @property
    def online(self) -> bool:
        """True when its last word was that it is there."""
        return self.state == "online"

    def after(self, message: Message, *, now_ms: int | None) -> Device:
        """This device after a message of its own; ``now_ms`` None for one that the broker repeated."""
        seen = self if now_ms is None else replace(self, last_seen_ms=max(self.last_seen_ms, now_ms))
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
