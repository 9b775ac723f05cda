"""Applies one batch of messages inside one open transaction of the store.

Rules enforced here:

* the order of the batch is kept: what of a (device, boot) was received is folded message by message;
* a repeated message changes nothing and is acknowledged again;
* a report whose features do not have the width of the device's earlier ones for that model becomes a dead letter;
* a device's outcomes enter the timeline only as often as the caller lets them: they are kept in its row in any case;
* the timeline's numbers are in the order of the commits: whoever adds to it holds a lock until its own;
* a batch reads each table once and writes each table once, however many messages it has;
* several hubs may apply batches at once. Whoever works on a device holds its row in ``devices``; rows are first made,
  devices before models, and then held, each in one order, so that two hubs wait for one another and never both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, Row, Table, and_, delete, func, insert, or_, select

from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Alert, Birth, Health, LabelEvidence, Report, Status
from edgeguard.hub import bulk, schema, tallies
from edgeguard.hub.evidence import Vector
from edgeguard.hub.ingest import Accepted, Device, Pulse, Rejected, Stream

DEAD_LETTERS_KEPT = 1000
_DEAD_LETTERS_LOCK = 0x6465_6164
_TIMELINE_LOCK = 0x7469_6D65
_HEAD = 256
_REMEMBERED = 200_000

_Model = tuple[str, str]
_Feature = tuple[int, int, int, int]
"""Model, device, label and slot."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a batch belongs: its fleet, the epoch that its counts fall into, and which row of totals it adds to."""

    fleet: str
    epoch: int
    shard: int
    now_ms: int

    @property
    def slot(self) -> int:
        """What its feature vectors are added to."""
        return self.epoch // schema.SLOT


@dataclass(frozen=True)
class Numbers:
    """The numbers of devices and models, which never change and never leave: what was committed may be remembered."""

    devices: Mapping[str, int] = field(default_factory=dict)
    models: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def with_(self, other: Numbers) -> Numbers:
        """These and those of another, or only the other's once there are very many."""
        if len(self.devices) + len(self.models) > _REMEMBERED:
            return other
        return Numbers({**self.devices, **other.devices}, {**self.models, **other.models})


def apply(
    db: Connection,
    place: Place,
    items: Sequence[Accepted | Rejected],
    known: Numbers,
    may_tell: Callable[[str], bool] = lambda _device: True,
) -> tuple[list[tuple[str, Ack]], Numbers]:
    """Write a batch; see :meth:`edgeguard.hub.store.Store.apply`.

    Args:
        may_tell: whether the timeline may have one more entry of a device.

    Returns:
        The acknowledgements, and the numbers that were not among the ``known`` ones: for use after the commit.
    """
    work = _Batch(db, place, items, known, may_tell)
    for item in items:
        work.take(item)
    work.write()
    return work.acks(), work.learned


class _Batch:
    """The rows that a batch touches, read once, folded in memory, written once."""

    def __init__(
        self,
        db: Connection,
        place: Place,
        items: Sequence[Accepted | Rejected],
        known: Numbers,
        may_tell: Callable[[str], bool],
    ) -> None:
        self._db = db
        self._place = place
        self._may_tell = may_tell
        self._outcomes: list[Device] = []
        self._told: dict[str, dict[str, bytes]] = {"birth": {}, "health": {}}
        self._reports: list[tuple[Any, ...]] = []
        self._alerts: list[tuple[Any, ...]] = []
        self._dead: list[Rejected] = []
        self._unlisted = 0
        self._tallies: dict[tuple[int, int], int] = {}
        self._counts: list[tuple[int, int, int, int]] = []
        self._features: list[tuple[_Feature, LabelEvidence]] = []
        self._read(items, known)

    def _read(self, items: Sequence[Accepted | Rejected], known: Numbers) -> None:
        names: set[str] = set()
        streams: dict[tuple[str, str], None] = {}
        models: set[_Model] = set()
        speaking: set[str] = set()
        featured: set[tuple[str, _Model]] = set()
        for item in items:
            if isinstance(item, Rejected):
                if item.identity is not None:
                    device, boot, _ = item.identity
                    names.add(device)
                    streams[device, boot] = None
                continue
            message = item.message
            names.add(item.device)
            if isinstance(message, Report | Alert):
                streams[item.device, message.boot] = None
                model = (message.model_digest, message.guard_digest)
                models.add(model)
                if isinstance(message, Report) and message.evidence:
                    featured.add((item.device, model))
            else:
                speaking.add(item.device)
        names |= (related := self._related(items))
        speaking |= related
        self.learned = self._learn(sorted(names - known.devices.keys()), sorted(models - known.models.keys()))
        self._ids = {name: self.learned.devices.get(name) or known.devices[name] for name in names}
        self._models = {model: self.learned.models.get(model) or known.models[model] for model in models}
        bulk.lock(self._db, schema.devices, "id", sorted(self._ids.values()))
        self._boots = {boot: _to_int(boot) for _, boot in streams}
        self._streams = self._read_streams(streams)
        self._states = self._read_devices(speaking)
        keys = [(self._models[model], self._ids[device]) for device, model in featured]
        found = bulk.read(
            self._db, schema.features, ("model_id", "device_id"), keys, ("model_id", "device_id", "width")
        )
        self._widths: dict[tuple[int, int], int] = {(row.model_id, row.device_id): row.width for row in found}

    def take(self, item: Accepted | Rejected) -> None:
        """Fold one message in."""
        if isinstance(item, Rejected):
            if item.identity is None or self._is_new(*item.identity):
                self._reject(item)
            return
        message = item.message
        if not isinstance(message, Report | Alert):
            self._update_device(item)
            return
        if not self._is_new(item.device, message.boot, message.seq):
            return
        device = self._ids[item.device]
        model = self._models[message.model_digest, message.guard_digest]
        row = (self._boots[message.boot], message.seq, self._place.now_ms, device, model)
        if isinstance(message, Alert):
            self._alerts.append((*row, message.at_ms, message.score, message.label, item.payload))
            return
        if message.evidence:
            width = len(message.evidence[0].flagged_mean)
            known = self._widths.setdefault((model, device), width)
            if known != width:
                reason = f"features of width {width}, this device's earlier ones had {known}"
                self._reject(Rejected(topic=f"{item.device}/report", reason=reason, head=item.payload[:_HEAD]))
                return
            slot = self._place.slot
            self._features += [((model, device, part.label, slot), part) for part in message.evidence]
        tally = self._tallies.setdefault((model, device), len(self._tallies))
        counts = [(tally, count.label, count.inputs, count.flagged) for count in message.labels]
        self._counts += counts
        flagged = sum([count[3] for count in counts])
        self._reports.append((*row, message.inputs, message.unchecked, flagged, item.payload))

    def write(self) -> None:
        """Write what was folded."""
        bulk.insert(self._db, schema.reports, _REPORT, self._reports)
        bulk.insert(self._db, schema.alerts, _ALERT, self._alerts)
        rows = [
            (self._ids[device], self._boots[boot], stream.through, self._place.now_ms, _from_gaps(stream.gaps))
            for (device, boot), stream in self._streams.items()
        ]
        bulk.insert(
            self._db, schema.streams, ("device_id", "boot", "through_seq", "last_ms", "gaps"), rows, conflict="replace"
        )
        self._write_counts()
        self._write_features()
        self._write_devices()
        self._write_dead()
        self._write_totals()
        self._write_outcomes()

    def acks(self) -> list[tuple[str, Ack]]:
        """One for every (device, boot) that a message of the batch belonged to."""
        return [(device, stream.ack(boot)) for (device, boot), stream in self._streams.items()]

    def _learn(self, names: list[str], models: list[_Model]) -> Numbers:
        """The numbers of devices and models, which are made where there are none yet."""
        fleet = self._place.fleet
        by_name = [(fleet, name) for name in names]
        by_digest = [(fleet, *model) for model in models]
        devices = self._read_numbers(schema.devices, _BY_NAME, by_name)
        new = [(fleet, name, 0, "unknown", 0, "", 0) for _, name in by_name if (name,) not in devices]
        bulk.insert(self._db, schema.devices, _NEW_DEVICE, new, conflict="ignore")
        if new:
            devices = self._read_numbers(schema.devices, _BY_NAME, by_name)
        numbers = self._read_numbers(schema.models, _BY_DIGEST, by_digest)
        if len(numbers) < len(models):
            bulk.insert(self._db, schema.models, _BY_DIGEST, by_digest, conflict="ignore")
            numbers = self._read_numbers(schema.models, _BY_DIGEST, by_digest)
        return Numbers({name: devices[name,] for name in names}, {model: numbers[model] for model in models})

    def _read_numbers(self, table: Table, key: bulk.Names, values: bulk.Rows) -> dict[tuple[Any, ...], int]:
        rows = bulk.read(self._db, table, key, values, ("id", *key[1:]))
        return {tuple(row[1:]): row.id for row in rows}

    def _read_streams(self, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Stream]:
        keys = {(self._ids[device], self._boots[boot]): (device, boot) for device, boot in wanted}
        streams = dict.fromkeys(keys.values(), Stream())
        columns = ("device_id", "boot", "through_seq", "gaps")
        for row in bulk.read(self._db, schema.streams, columns[:2], list(keys), columns):
            streams[keys[row.device_id, row.boot]] = Stream(row.through_seq, _to_gaps(row.gaps))
        return streams

    def _read_devices(self, names: Iterable[str]) -> dict[str, Device]:
        keys = [(self._ids[name],) for name in names]
        return {row.device: to_device(row) for row in bulk.read(self._db, schema.devices, ("id",), keys, _DEVICE)}

    def _related(self, items: Iterable[Accepted | Rejected]) -> set[str]:
        """Devices of which a status in this batch says something too: gateways and what is behind them, as known."""
        said = {item.device for item in items if isinstance(item, Accepted) and isinstance(item.message, Status)}
        if not said:
            return set()
        above = {gateway for device in said if (gateway := topics.gateway_of(device)) is not None}
        table = schema.devices
        either = or_(table.c.device.contains("~", autoescape=True), table.c.device.in_(sorted(above)))
        known = self._db.scalars(select(table.c.device).where(table.c.fleet == self._place.fleet, either))
        return {device for device in known if device in above or topics.gateway_of(device) in said}

    def _is_new(self, device: str, boot: str, seq: int) -> bool:
        new, self._streams[device, boot] = self._streams[device, boot].take(seq)
        return new

    def _reject(self, item: Rejected) -> None:
        if item.listed:
            self._dead.append(item)
        else:
            self._unlisted += 1

    def _update_device(self, item: Accepted) -> None:
        name, message = item.device, item.message
        before = self._states[name]
        after = before.after(message, now_ms=None if item.retained else self._place.now_ms)
        if isinstance(message, Status):
            gateway = self._states.get(topics.gateway_of(name) or "")
            if gateway is not None:
                after = after.behind(gateway, via=message.via)
            for other in [other for other in self._states if topics.gateway_of(other) == name]:
                self._states[other] = self._states[other].behind(after)
        if isinstance(message, Birth | Health) and message.session >= before.session:
            self._told["birth" if isinstance(message, Birth) else "health"][name] = msgspec.json.encode(message)
        told = (after.outcome, after.outcome_sequence)
        if told != (before.outcome, before.outcome_sequence) and after.outcome is not None and self._may_tell(name):
            self._outcomes.append(after)
        self._states[name] = after

    def _write_outcomes(self) -> None:
        """Last of all: whoever adds to the timeline keeps others waiting until its commit."""
        for one in self._outcomes:
            add_event(
                self._db, self._place.fleet, at_ms=self._place.now_ms, kind=f"device_{one.outcome}", subject=one.device,
                text=f"{one.device}: release {one.outcome_sequence} {one.outcome}"
                + (f", {one.reason}" if one.reason else ""),
                detail={"device": one.device, "sequence": one.outcome_sequence, "model_digest": one.model_digest},
            )  # fmt: skip

    def _write_counts(self) -> None:
        keys = [(model, self._place.epoch, device) for model, device in self._tallies]
        columns = ("model_id", "epoch", "device_id", "labels")
        found = bulk.read(self._db, schema.label_counts, columns[:3], keys, columns)
        before = {row[:3]: row[3] for row in map(tuple, found)}
        after = tallies.add([before.get(key, b"") for key in keys], self._counts)
        rows = [(*key, labels) for key, labels in zip(keys, after, strict=True)]
        bulk.insert(self._db, schema.label_counts, columns, rows, conflict="replace")

    def _write_features(self) -> None:
        key: bulk.Names = ("model_id", "device_id", "label", "slot")
        wanted = list(dict.fromkeys(feature for feature, _ in self._features))
        found = bulk.read(self._db, schema.features, key, wanted, (*key, *_SUMS))
        before = {row[:4]: row[4:] for row in map(tuple, found)}
        for width in sorted({self._widths[feature[:2]] for feature in wanted}):
            keys = [feature for feature in wanted if self._widths[feature[:2]] == width]
            parts = [(feature, part) for feature, part in self._features if self._widths[feature[:2]] == width]
            sums = _add_features([before.get(feature) for feature in keys], keys, parts, width)
            rows = [(*feature, width, *total) for feature, total in zip(keys, sums, strict=True)]
            bulk.insert(self._db, schema.features, (*key, "width", *_SUMS), rows, conflict="replace")

    def _write_devices(self) -> None:
        rows = [
            (
                *(getattr(state, field) for field in _STATE),
                plain(state.reason),
                _from_pulse(state.pulse),
                self._ids[name],
            )
            for name, state in self._states.items()
        ]
        bulk.update(self._db, schema.devices, "id", (*_STATE, "reason", "pulse"), rows)
        for column, told in self._told.items():
            values = [(content.decode(), self._ids[name]) for name, content in told.items()]
            bulk.update(self._db, schema.devices, "id", (column,), values)

    def _write_dead(self) -> None:
        if not self._dead:
            return
        if self._db.dialect.name == "postgresql":
            self._db.execute(select(func.pg_advisory_xact_lock(_DEAD_LETTERS_LOCK)))
        table, fleet = schema.dead_letters, self._place.fleet
        rows = [
            (fleet, self._place.now_ms, plain(letter.topic), plain(letter.reason), letter.head) for letter in self._dead
        ]
        bulk.insert(self._db, table, ("fleet", "at_ms", "topic", "reason", "head"), rows)
        mine = table.c.fleet == fleet
        oldest = select(table.c.id).where(mine).order_by(table.c.id.desc()).offset(DEAD_LETTERS_KEPT).limit(1)
        self._db.execute(delete(table).where(mine, table.c.id <= oldest.scalar_subquery()))

    def _write_totals(self) -> None:
        inputs, unchecked, flagged = (sum(row[i] for row in self._reports) for i in (5, 6, 7))
        counted = (len(self._reports), inputs, unchecked, flagged, len(self._alerts), len(self._dead) + self._unlisted)
        if any(counted):
            row = (self._place.fleet, self._place.shard, *counted)
            bulk.insert(self._db, schema.totals, ("fleet", "shard", *TOTALS), [row], conflict="add")


TOTALS = ("reports", "inputs", "unchecked", "flagged", "alerts", "dead_letters")
_BY_NAME, _BY_DIGEST = ("fleet", "device"), ("fleet", "model_digest", "guard_digest")
_NEW_DEVICE = ("fleet", "device", "session", "state", "sequence", "reason", "last_seen_ms")
_STATE = (
    "session", "state", "model_digest", "guard_digest", "sequence", "outcome", "outcome_sequence", "last_seen_ms",
)  # fmt: skip
_DEVICE = ("device", "reason", "pulse", *_STATE)
_REPORT = ("boot", "seq", "stored_ms", "device_id", "model_id", "inputs", "unchecked", "flagged", "payload")
_ALERT = ("boot", "seq", "stored_ms", "device_id", "model_id", "at_ms", "score", "label", "payload")
VECTORS = ("flagged_sum", "unflagged_sum", "unflagged_squares")
_SUMS = ("flagged", "unflagged", *VECTORS)


def _add_features(
    before: Sequence[tuple[Any, ...] | None],
    keys: Sequence[_Feature],
    parts: Sequence[tuple[_Feature, LabelEvidence]],
    width: int,
) -> list[tuple[int, int, bytes, bytes, bytes]]:
    """Add feature vectors of one width to the sums ``before`` of each key, ``_SUMS`` of its row or None."""
    numbers = {key: number for number, key in enumerate(keys)}
    flagged = [row[0] if row else 0 for row in before]
    unflagged = [row[1] if row else 0 for row in before]
    nothing = bytes(8 * width)
    sums = [
        np.frombuffer(b"".join((row[i] if row else b"") or nothing for row in before)).reshape(-1, width).copy()
        for i in (2, 3, 4)
    ]
    for key, part in parts:
        flagged[numbers[key]] += part.flagged
        unflagged[numbers[key]] += part.unflagged
    rows = np.array([numbers[key] for key, _ in parts])
    np.add.at(sums[0], rows, _weighted([(part.flagged, part.flagged_mean) for _, part in parts]))
    described = [(numbers[key], part) for key, part in parts if part.unflagged]
    if described:
        rows = np.array([number for number, _ in described])
        weight = np.array([part.unflagged for _, part in described], dtype=np.float64)[:, None]
        mean = np.array([part.unflagged_mean for _, part in described], dtype=np.float64)
        std = np.array([part.unflagged_std for _, part in described], dtype=np.float64)
        np.add.at(sums[1], rows, weight * mean)
        np.add.at(sums[2], rows, weight * (std**2 + mean**2))
    return [
        (f, u, sums[0][i].tobytes(), sums[1][i].tobytes() if u else b"", sums[2][i].tobytes() if u else b"")
        for i, (f, u) in enumerate(zip(flagged, unflagged, strict=True))
    ]


def _weighted(parts: Sequence[tuple[int, tuple[float, ...]]]) -> npt.NDArray[np.float64]:
    weights = np.array([weight for weight, _ in parts], dtype=np.float64)
    return weights[:, None] * np.array([vector for _, vector in parts], dtype=np.float64)


def merge_features(db: Connection, key: tuple[int, int, int], old: ColumnElement[bool], width: int) -> None:
    """Add the feature sums of a model, device and label that are ``old`` to those of slot 0."""
    table = schema.features
    mine = and_(table.c.model_id == key[0], table.c.device_id == key[1], table.c.label == key[2])
    rows = db.execute(select(table).where(mine, or_(old, table.c.slot == 0))).all()
    sums = [sum(row.flagged for row in rows), sum(row.unflagged for row in rows)]
    vectors = [to_sum(getattr(row, name) for row in rows).tobytes() for name in VECTORS]
    db.execute(delete(table).where(mine, old))
    columns = ("model_id", "device_id", "label", "slot", "width", *_SUMS)
    bulk.insert(db, table, columns, [(*key, 0, width, *sums, *vectors)], conflict="replace")


def to_device(row: Row[Any]) -> Device:
    """A row of ``devices``."""
    pulse = None if row.pulse is None else msgspec.json.decode(row.pulse, type=Pulse)
    return Device(device=row.device, reason=row.reason, pulse=pulse, **{field: getattr(row, field) for field in _STATE})


def _from_pulse(pulse: Pulse | None) -> bytes | None:
    return None if pulse is None else msgspec.json.encode(pulse)


def to_sum(contents: Iterable[bytes]) -> Vector:
    """Sums of feature vectors of one width, added up; empty ones add nothing."""
    total = np.zeros(0)
    for content in filter(None, contents):
        vector = np.frombuffer(content, dtype="<f8").astype(np.float64)
        total = total + vector if total.size else vector
    return total


def add_event(
    db: Connection, fleet: str, *, at_ms: int, kind: str, subject: str, text: str, detail: Mapping[str, Any]
) -> None:
    """Write one entry of the timeline.

    PostgreSQL gives out numbers before the commit: a reader that goes on from the last one that it saw would miss a
    lower one that is committed later. SQLite has one writer at a time.
    """
    if db.dialect.name == "postgresql":
        db.execute(select(func.pg_advisory_xact_lock(_TIMELINE_LOCK)))
    row = {"at_ms": at_ms, "kind": kind, "subject": subject, "text": plain(text), "detail": dict(detail)}
    db.execute(insert(schema.events), {"fleet": fleet, **row})


def _to_int(boot: str) -> int:
    """The 64 bits of a boot id, read as a signed number: what databases have."""
    number = int(boot, 16)
    return number - (1 << 64) if number >> 63 else number


def _from_gaps(gaps: tuple[int, ...]) -> str | None:
    return msgspec.json.encode(gaps).decode() if gaps else None


def _to_gaps(gaps: str | None) -> tuple[int, ...]:
    return tuple(msgspec.json.decode(gaps)) if gaps else ()


def plain(text: str) -> str:
    """Text that every database takes: no control characters, no halves of surrogate pairs."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
