"""Reports on disk until the hub has stored them, in one SQLite file.

Rules enforced here:

* a report and the names of the input files that it counts are committed together: that is what makes counting
  exact when the agent is killed;
* ``seq`` counts from 1 without holes within one boot, and is given by the commit itself;
* an entry leaves on the hub's ack alone, whichever boot it is of, and on an ack for its own device;
* messages of microcontrollers lie beside this device's own, under their device, with the boot and seq that they came
  with: one that comes again while it waits is not kept twice;
* the size is bounded: beyond it, of the device that has most waiting, so that none pushes out the others, the oldest
  report is dropped, and an alert only when it has no other report. The message that was put last stays. What is
  dropped is counted, never silent;
* an ack can name ``MAX_GAPS`` gaps, so what waits for one spans no more numbers of a boot than that, however many were
  dropped in between: :meth:`Spool.pending` ends there;
* a commit is on disk when it returns. SQLite appends its pages to a log, each with a checksum that goes on from the one
  before, and syncs the log (``synchronous=FULL``); after 1000 pages it syncs them into the database, then the log
  begins anew. After a power cut the log counts up to its last whole commit, and nothing behind that;
* a commit that fails, as on a full disk, changed nothing and may be tried again;
* session numbers start from the time at which the spool was made, so that a device whose state was erased counts
  above its earlier self, and its new birth is not taken for an old one.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from edgeguard.contract.messages import MAX_GAPS, Ack, Alert, Report, encode
from edgeguard.errors import ConfigError

_SCHEMA_VERSION = 3
_OUTBOX = """
CREATE TABLE outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL,
    boot TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, payload BLOB NOT NULL,
    UNIQUE (device, boot, seq)
);
CREATE INDEX outbox_device ON outbox (device, kind)
"""
_SCHEMA = f"""{_OUTBOX};
CREATE TABLE counters (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    session INTEGER NOT NULL, reports_total INTEGER NOT NULL, alerts_total INTEGER NOT NULL,
    reports_dropped INTEGER NOT NULL, alerts_dropped INTEGER NOT NULL
);
CREATE TABLE consumed (name TEXT PRIMARY KEY)
"""
_FROM_2 = f"""
ALTER TABLE outbox RENAME TO outbox_2;
DROP INDEX outbox_kind;
{_OUTBOX};
INSERT INTO outbox SELECT position, '', boot, seq, kind, payload FROM outbox_2;
DROP TABLE outbox_2
"""
"""Version 2 knew one device only. What waited in it goes on waiting."""

OWN = ""
"""What this device is called here; a microcontroller has the name that it has at the hub."""

Kind = Literal["report", "alert"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One message that waits for its ack. ``position`` orders the entries of all boots."""

    position: int
    boot: str
    seq: int
    kind: Kind
    payload: bytes


@dataclass(frozen=True)
class Counters:
    """Totals since the spool was made. ``reports_total`` counts each report put: acknowledged, dropped or waiting."""

    session: int
    reports_total: int
    alerts_total: int
    reports_dropped: int
    alerts_dropped: int
    pending: int

    @property
    def dropped_total(self) -> int:
        """Messages that the hub will never see."""
        return self.reports_dropped + self.alerts_dropped


class Spool:
    """The spool of one agent process, for one thread at a time.

    Args:
        path: the database file; made when missing.
        boot: id of this process, 16 hex digits.
        max_bytes: bound on the payloads that wait.
        clock: seconds since 1970; read once, when the file is made.

    Raises:
        ConfigError: the file cannot be made, is damaged or of another version.
    """

    def __init__(self, path: Path, *, boot: str, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._boot = boot
        self._max_bytes = max_bytes
        self._next_seq = 1
        with self._errors():
            # Transactions are opened and ended by hand, in _transaction.
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version in (0, 2):
                with self._transaction():
                    for statement in (_FROM_2 if version else _SCHEMA).split(";"):
                        self._db.execute(statement)
                    if not version:
                        self._db.execute("INSERT INTO counters VALUES (1, ?, 0, 0, 0, 0)", (max(0, int(clock())),))
                    self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise ConfigError(
                    f"spool {path}",
                    got=f"version {version}",
                    expected=f"version {_SCHEMA_VERSION}",
                    do="move the file away; what waits in it can be sent by an agent of that version",
                )
            rows = self._db.execute(
                "SELECT device, kind, COUNT(*), SUM(LENGTH(payload)) FROM outbox GROUP BY device, kind"
            ).fetchall()
        self.pending_count = sum(count for _, _, count, _ in rows)
        self._bytes: Counter[tuple[str, str]] = Counter({(device, kind): size for device, kind, _, size in rows})

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def next_session(self) -> int:
        """Count one more connection attempt and return its number; numbers are never given twice."""
        with self._errors(), self._transaction():
            self._db.execute("UPDATE counters SET session = session + 1")
            (session,) = self._db.execute("SELECT session FROM counters").fetchone()
        return int(session)

    def put(self, build: Callable[[str, int], Report | Alert], consumed: Iterable[str] = ()) -> int:
        """Commit one message, and with it the names of the input files that it counts.

        Args:
            build: makes the message for (boot, seq).
            consumed: names of files that must not be counted again.

        Returns:
            The message's seq.

        Raises:
            ConfigError: the disk is full or refuses to write; nothing was changed.
        """
        seq = self._next_seq
        self._insert(OWN, build(self._boot, seq), consumed)
        self._next_seq = seq + 1
        return seq

    def keep(self, device: str, message: Report | Alert) -> bool:
        """Commit a message of another device, under the boot and seq that it came with.

        Returns:
            False where it waits already: then nothing was changed.

        Raises:
            ConfigError: the disk is full or refuses to write; nothing was changed.
        """
        if self.positions(message.boot, (message.seq,), device=device):
            return False
        self._insert(device, message, ())
        return True

    def devices(self) -> list[str]:
        """Whose messages wait."""
        return sorted({device for (device, _), size in self._bytes.items() if size})

    def pending_of(self, device: str) -> int:
        """How many messages of a device wait."""
        with self._errors():
            (count,) = self._db.execute("SELECT COUNT(*) FROM outbox WHERE device = ?", (device,)).fetchone()
        return int(count)

    def pending(self, after: int = 0, limit: int = 100, *, device: str = OWN) -> list[Entry]:
        """At most ``limit`` entries of a device behind a position, oldest first, as far as acks can tell them apart."""
        with self._errors():
            rows = self._db.execute(
                "SELECT position, boot, seq, kind, payload, seq - (SELECT MIN(seq) FROM outbox AS held"
                " WHERE held.device = outbox.device AND held.boot = outbox.boot)"
                " FROM outbox WHERE device = ? AND position > ? ORDER BY position LIMIT ?",
                (device, after, limit),
            ).fetchall()
        return [Entry(*row[:-1]) for row in takewhile(lambda row: row[-1] <= MAX_GAPS, rows)]

    def forget(self, ack: Ack, *, device: str = OWN) -> frozenset[int]:
        """Delete what the hub has stored of a device: all of the ack's boot up to ``through_seq``, but its gaps.

        Returns:
            The positions that were deleted; empty for a repeated ack.
        """
        with self._errors(), self._transaction():
            rows = self._db.execute(
                "SELECT position, seq, kind, LENGTH(payload) FROM outbox WHERE device = ? AND boot = ? AND seq <= ?",
                (device, ack.boot, ack.through_seq),
            ).fetchall()
            gaps = frozenset(ack.gaps)
            stored = [(position, kind, size) for position, seq, kind, size in rows if seq not in gaps]
            self._db.executemany("DELETE FROM outbox WHERE position = ?", ((position,) for position, _, _ in stored))
        for _, kind, size in stored:
            self._bytes[device, kind] -= size
        self.pending_count -= len(stored)
        return frozenset(position for position, _, _ in stored)

    def positions(self, boot: str, seqs: Sequence[int], *, device: str = OWN) -> frozenset[int]:
        """Where those of a device's ``seqs`` lie that still wait."""
        marks = ",".join("?" * len(seqs))
        with self._errors():
            rows = self._db.execute(
                f"SELECT position FROM outbox WHERE device = ? AND boot = ? AND seq IN ({marks})", (device, boot, *seqs)
            )
            return frozenset(position for (position,) in rows)

    def consumed(self) -> list[str]:
        """Names of input files that are counted and may still lie in the source."""
        with self._errors():
            return [name for (name,) in self._db.execute("SELECT name FROM consumed ORDER BY name")]

    def clear_consumed(self) -> None:
        """Forget these names, once the files are deleted."""
        with self._errors(), self._transaction():
            self._db.execute("DELETE FROM consumed")

    def _insert(self, device: str, message: Report | Alert, consumed: Iterable[str]) -> None:
        payload = encode(message)
        kind = "report" if isinstance(message, Report) else "alert"
        bytes_after = self._bytes.copy()
        bytes_after[device, kind] += len(payload)
        with self._errors(), self._transaction():
            position = self._db.execute(
                "INSERT INTO outbox (device, boot, seq, kind, payload) VALUES (?, ?, ?, ?, ?)",
                (device, message.boot, message.seq, kind, payload),
            ).lastrowid
            self._db.execute(f"UPDATE counters SET {kind}s_total = {kind}s_total + 1")
            self._db.executemany("INSERT OR IGNORE INTO consumed VALUES (?)", ((name,) for name in consumed))
            dropped = self._make_room(bytes_after, position)
        self._bytes = bytes_after
        self.pending_count += 1 - dropped
        if dropped:
            log.warning("spool full: %d messages dropped, the hub will never see them", dropped)

    def _make_room(self, sizes: Counter[tuple[str, str]], newest: int | None) -> int:
        """Drop until ``sizes`` fit, which become smaller, and never ``newest``.

        Of the device that has most: reports, then alerts, oldest first. So none pushes out what another one said.
        """
        dropped = 0
        devices = {device for device, _ in sizes}
        while devices and sizes.total() > self._max_bytes:
            most = max(devices, key=lambda device: (sizes[device, "report"] + sizes[device, "alert"], device))
            row = self._oldest(most, "report", newest) or self._oldest(most, "alert", newest)
            if row is None:
                devices.remove(most)
                continue
            position, kind, size = row
            self._db.execute("DELETE FROM outbox WHERE position = ?", (position,))
            self._db.execute(f"UPDATE counters SET {kind}s_dropped = {kind}s_dropped + 1")
            sizes[most, kind] -= size
            dropped += 1
        return dropped

    def _oldest(self, device: str, kind: Kind, before: int | None) -> tuple[int, Kind, int] | None:
        """Position, kind and size of a device's first message of a kind, if it lies before a position."""
        row: tuple[int, Kind, int] | None = self._db.execute(
            "SELECT position, kind, LENGTH(payload) FROM outbox WHERE device = ? AND kind = ? AND position < ?"
            " ORDER BY position LIMIT 1",
            (device, kind, before),
        ).fetchone()
        return row

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _config_error(self._path, error) from error


def read_counters(path: Path) -> Counters:
    """The totals of a spool that an agent may be writing to; nothing is changed.

    Raises:
        ConfigError: there is no such spool, or it cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            row = db.execute(
                "SELECT session, reports_total, alerts_total, reports_dropped, alerts_dropped,"
                " (SELECT COUNT(*) FROM outbox) FROM counters"
            ).fetchone()
    except sqlite3.Error as error:
        raise _config_error(path, error) from error
    return Counters(*row)


def _config_error(path: Path, error: sqlite3.Error) -> ConfigError:
    return ConfigError(
        f"spool {path}",
        got=str(error),
        expected="a file that can be read and written",
        do="free disk space or check the folder; move the file away if it is damaged",
    )
