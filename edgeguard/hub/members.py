"""The devices of each roll-out in the database, and what the decisions on them rest on.

Rules enforced here:

* members are written in the transaction that writes their case, so that no device is offered a release and forgotten;
* what devices say of themselves is read as it was stored: nothing here decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, insert, select

from edgeguard.hub import schema
from edgeguard.hub.rollout import Member, Traits
from edgeguard.hub.store import Store
from edgeguard.hub.tables import members as table
from edgeguard.hub.vitals import Counts

MAX_ASKED = 500
"""Devices named in one question to the database."""


class Members:
    """The members of one fleet's roll-outs. Every method may be called from any thread.

    Args:
        store: the database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, case: int) -> list[Member]:
        """The members of a case's roll-out, by device."""
        mine = (table.c.fleet == self._store.fleet, table.c.case_id == case)
        with self._store.read() as db:
            rows = db.scalars(select(table.c.detail).where(*mine).order_by(table.c.device)).all()
        return [msgspec.convert(detail, Member) for detail in rows]

    def put(self, db: Connection, case: int, members: Iterable[Member]) -> None:
        """Write members, new or known, within the caller's transaction."""
        rows = [
            {
                "fleet": self._store.fleet,
                "case_id": case,
                "device": member.device,
                "state": member.state,
                "detail": msgspec.to_builtins(member),
            }
            for member in members
        ]
        for start in range(0, len(rows), MAX_ASKED):
            some = rows[start : start + MAX_ASKED]
            names = [row["device"] for row in some]
            db.execute(
                delete(table).where(
                    table.c.fleet == self._store.fleet, table.c.case_id == case, table.c.device.in_(names)
                )
            )
            db.execute(insert(table), some)

    def traits(self, devices: Collection[str]) -> dict[str, Traits]:
        """What canaries are spread over, of those devices that said it."""
        known, names, found = schema.devices, sorted(devices), {}
        chosen = select(known.c.device, known.c.birth, known.c.health).where(known.c.fleet == self._store.fleet)
        with self._store.read() as db:
            for start in range(0, len(names), MAX_ASKED):
                some = names[start : start + MAX_ASKED]
                for row in db.execute(chosen.where(known.c.device.in_(some))):
                    found[row.device] = _traits(row.birth or {}, row.health or {})
        return found

    def counts(self, model_digest: str, guard_digest: str) -> dict[str, Counts]:
        """What each device counted under a model, by predicted label, over all that is kept."""
        told = self._store.label_counts(model_digest, guard_digest)
        found: dict[str, dict[int, tuple[int, int]]] = {}
        columns = (told.device, told.label, told.inputs, told.flagged)
        for number, label, inputs, flagged in zip(*(column.tolist() for column in columns), strict=True):
            counts = found.setdefault(told.devices[number], {})
            before = counts.get(label, (0, 0))
            counts[label] = (before[0] + inputs, before[1] + flagged)
        return dict(found)


def _traits(birth: Mapping[str, Any], health: Mapping[str, Any]) -> Traits:
    kind = " ".join(str(birth.get(name, "")) for name in ("board", "runtime", "runtime_version"))
    strained = bool(
        health.get("throttled")
        or health.get("under_voltage")
        or health.get("unwritten")
        or health.get("level", "everything") != "everything"
    )
    return Traits(kind=kind, strained=strained)
