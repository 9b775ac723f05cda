"""Applies one batch of messages inside one open transaction of the store.

Rules enforced here:

* the order of the batch is kept: what of a (device, boot) was received is folded message by message;
* a repeated message changes nothing and is acknowledged again;
* a report whose features do not have the width of the device's earlier ones for that model becomes a dead letter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Connection, Row, Table, delete, func, insert, select, update

from edgeguard.contract.messages import Ack, Alert, Birth, Health, Report
from edgeguard.hub import schema
from edgeguard.hub.evidence import DeviceEvidence, Vector
from edgeguard.hub.ingest import Accepted, Device, Rejected, Stream

DEAD_LETTERS_KEPT = 1000

_Sums = dict[int, DeviceEvidence]


def apply(db: Connection, fleet: str, items: Sequence[Accepted | Rejected], *, now_ms: int) -> list[tuple[str, Ack]]:
    """Write a batch; see :meth:`edgeguard.hub.store.Store.apply`."""
    work = _Batch(db, fleet, now_ms)
    for item in items:
        work.take(item)
    work.write()
    return work.acks()


class _Batch:
    """The rows that a batch touches, read once, folded in memory, written once."""

    def __init__(self, db: Connection, fleet: str, now_ms: int) -> None:
        self._db = db
        self._fleet = fleet
        self._now_ms = now_ms
        self._streams: dict[tuple[str, str], tuple[bool, Stream]] = {}
        self._devices: dict[str, tuple[bool, Device, dict[str, Any]]] = {}
        self._sums: dict[tuple[str, str, str], tuple[frozenset[int], _Sums]] = {}
        self._reports: list[dict[str, Any]] = []
        self._alerts: list[dict[str, Any]] = []
        self._dead: list[Rejected] = []

    def take(self, item: Accepted | Rejected) -> None:
        """Fold one message in."""
        if isinstance(item, Rejected):
            identity = item.identity
            if identity is None or self._is_new(*identity):
                self._dead.append(item)
            return
        message = item.message
        if not isinstance(message, Report | Alert):
            self._update_device(item)
            return
        if not self._is_new(item.device, message.boot, message.seq):
            return
        self._update_device(item)
        row = {
            "fleet": self._fleet,
            "device": item.device,
            "boot": message.boot,
            "seq": message.seq,
            "model_digest": message.model_digest,
            "guard_digest": message.guard_digest,
            "stored_ms": self._now_ms,
            "payload": item.payload,
        }
        if isinstance(message, Alert):
            self._alerts.append(row | {"at_ms": message.at_ms, "label": message.label, "score": message.score})
            return
        problem = self._add_evidence(item.device, message)
        if problem:
            self._dead.append(Rejected(topic=f"{item.device}/report", reason=problem, head=item.payload[:256]))
            return
        self._reports.append(
            row
            | {
                "inputs": message.inputs,
                "unchecked": message.unchecked,
                "flagged": sum(count.flagged for count in message.labels),
                "started_ms": message.started_ms,
                "ended_ms": message.ended_ms,
            }
        )

    def write(self) -> None:
        """Write what was folded."""
        for table, rows in ((schema.reports, self._reports), (schema.alerts, self._alerts)):
            if rows:
                self._db.execute(insert(table), rows)
        for (device, boot), (exists, stream) in self._streams.items():
            key = {"fleet": self._fleet, "device": device, "boot": boot}
            self._put(schema.streams, key, {"through_seq": stream.through, "gaps": list(stream.gaps)}, exists=exists)
        for (model, guard, device), (existing, sums) in self._sums.items():
            for label, total in sums.items():
                entry: dict[str, Any] = {
                    "fleet": self._fleet,
                    "model_digest": model,
                    "guard_digest": guard,
                    "device": device,
                    "label": label,
                }
                self._put(schema.evidence, entry, _from_evidence(total), exists=label in existing)
        for name, (exists, state, extra) in self._devices.items():
            values = {field: getattr(state, field) for field in _DEVICE_FIELDS} | extra
            self._put(schema.devices, {"fleet": self._fleet, "device": name}, values, exists=exists)
        self._write_dead()

    def acks(self) -> list[tuple[str, Ack]]:
        """One for every (device, boot) that a message of the batch belonged to."""
        return [(device, stream.ack(boot)) for (device, boot), (_, stream) in self._streams.items()]

    def _is_new(self, device: str, boot: str, seq: int) -> bool:
        if (device, boot) not in self._streams:
            row = self._row(schema.streams, {"fleet": self._fleet, "device": device, "boot": boot})
            self._streams[device, boot] = (
                row is not None,
                Stream(row.through_seq, tuple(row.gaps)) if row else Stream(),
            )
        exists, stream = self._streams[device, boot]
        new, stream = stream.take(seq)
        self._streams[device, boot] = (exists, stream)
        return new

    def _update_device(self, item: Accepted) -> None:
        name, message = item.device, item.message
        if name not in self._devices:
            row = self._row(schema.devices, {"fleet": self._fleet, "device": name})
            self._devices[name] = (row is not None, to_device(row) if row else Device(device=name), {})
        exists, before, extra = self._devices[name]
        after = before.after(message, now_ms=None if item.retained else self._now_ms)
        if isinstance(message, Birth) and message.session >= before.session:
            extra = extra | {"birth": msgspec.to_builtins(message)}
        elif isinstance(message, Health) and message.session >= before.session:
            extra = extra | {"health": msgspec.to_builtins(message)}
        told = (after.outcome, after.outcome_sequence)
        if told != (before.outcome, before.outcome_sequence) and after.outcome is not None:
            add_event(
                self._db, self._fleet, at_ms=self._now_ms, kind=f"device_{after.outcome}", subject=name,
                text=f"{name}: release {after.outcome_sequence} {after.outcome}"
                + (f", {after.reason}" if after.reason else ""),
                detail={"device": name, "sequence": after.outcome_sequence, "model_digest": after.model_digest},
            )  # fmt: skip
        self._devices[name] = (exists, after, extra)

    def _add_evidence(self, device: str, report: Report) -> str:
        """Add a report's counts and features to the device's sums. Returns what is wrong with them, or nothing."""
        key = (report.model_digest, report.guard_digest, device)
        if key not in self._sums:
            table = schema.evidence
            rows = self._db.execute(
                select(table)
                .where(
                    table.c.fleet == self._fleet,
                    table.c.model_digest == report.model_digest,
                    table.c.guard_digest == report.guard_digest,
                    table.c.device == device,
                )
                .with_for_update()
            )
            sums = {row.label: to_evidence(row) for row in rows}
            self._sums[key] = (frozenset(sums), sums)
        _, sums = self._sums[key]
        known = max((total.width for total in sums.values()), default=0)
        width = len(report.evidence[0].flagged_mean) if report.evidence else 0
        if known and width and known != width:
            return f"features of width {width}, this device's earlier ones had {known}"
        features = {evidence.label: evidence for evidence in report.evidence}
        for count in report.labels:
            total = sums.get(count.label) or DeviceEvidence(device=device, label=count.label)
            sums[count.label] = total.add(count, features.get(count.label))
        return ""

    def _write_dead(self) -> None:
        if not self._dead:
            return
        table = schema.dead_letters
        mine = table.c.fleet == self._fleet
        last = self._db.scalar(select(func.max(table.c.number)).where(mine)) or 0
        rows = [
            {
                "fleet": self._fleet,
                "number": last + i,
                "at_ms": self._now_ms,
                "topic": _plain(letter.topic),
                "reason": _plain(letter.reason),
                "head": letter.head,
            }
            for i, letter in enumerate(self._dead, start=1)
        ]
        self._db.execute(insert(table), rows)
        self._db.execute(delete(table).where(mine, table.c.number <= last + len(rows) - DEAD_LETTERS_KEPT))

    def _row(self, table: Table, key: Mapping[str, str]) -> Row[Any] | None:
        where = (table.c[name] == value for name, value in key.items())
        return self._db.execute(select(table).where(*where).with_for_update()).one_or_none()

    def _put(self, table: Table, key: Mapping[str, Any], values: Mapping[str, Any], *, exists: bool) -> None:
        if exists:
            where = (table.c[name] == value for name, value in key.items())
            self._db.execute(update(table).where(*where).values(**values))
        else:
            self._db.execute(insert(table).values(**key, **values))


_DEVICE_FIELDS = (
    "session", "state", "model_digest", "guard_digest", "sequence", "outcome", "outcome_sequence", "reason",
    "last_seen_ms",
)  # fmt: skip


def to_device(row: Row[Any]) -> Device:
    """A row of ``devices``."""
    return Device(device=row.device, **{field: getattr(row, field) for field in _DEVICE_FIELDS})


def to_evidence(row: Row[Any]) -> DeviceEvidence:
    """A row of ``evidence``."""
    return DeviceEvidence(
        device=row.device,
        label=row.label,
        inputs=row.inputs,
        flagged=row.flagged,
        flagged_vectors=row.flagged_vectors,
        flagged_sum=_to_vector(row.flagged_sum),
        unflagged=row.unflagged,
        unflagged_sum=_to_vector(row.unflagged_sum),
        unflagged_squares=_to_vector(row.unflagged_squares),
    )


def add_event(
    db: Connection, fleet: str, *, at_ms: int, kind: str, subject: str, text: str, detail: Mapping[str, Any]
) -> None:
    """Write one entry of the timeline."""
    row = {"at_ms": at_ms, "kind": kind, "subject": subject, "text": _plain(text), "detail": dict(detail)}
    db.execute(insert(schema.events), {"fleet": fleet, **row})


def _from_evidence(total: DeviceEvidence) -> dict[str, Any]:
    return {
        "inputs": total.inputs,
        "flagged": total.flagged,
        "flagged_vectors": total.flagged_vectors,
        "flagged_sum": _from_vector(total.flagged_sum),
        "unflagged": total.unflagged,
        "unflagged_sum": _from_vector(total.unflagged_sum),
        "unflagged_squares": _from_vector(total.unflagged_squares),
    }


def _from_vector(vector: Vector) -> bytes:
    return vector.astype("<f8").tobytes()


def _to_vector(content: bytes) -> Vector:
    return np.frombuffer(content, dtype="<f8").astype(np.float64)


def _plain(text: str) -> str:
    """Text that every database takes: no control characters, no halves of surrogate pairs."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
