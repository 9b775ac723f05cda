"""Reports on disk until the hub has stored them, in one SQLite file.

Rules enforced here:

* a report and the names of the input files that it counts are committed together: that is what makes counting
  exact when the agent is killed;
* ``seq`` counts from 1 without holes within one boot, and is given by the commit itself;
* an entry leaves on the hub's ack alone, whichever boot it is of;
* the size is bounded: beyond it the oldest report is dropped, and an alert only when there is no other report; the
  message that was put last stays. What is dropped is counted, never silent;
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from edgeguard.contract.messages import MAX_GAPS, Ack, Alert, Report, encode
from edgeguard.errors import ConfigError

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    boot TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, payload BLOB NOT NULL,
    UNIQUE (boot, seq)
);
CREATE INDEX outbox_kind ON outbox (kind);
CREATE TABLE counters (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    session INTEGER NOT NULL, reports_total INTEGER NOT NULL, alerts_total INTEGER NOT NULL,
    reports_dropped INTEGER NOT NULL, alerts_dropped INTEGER NOT NULL
);
CREATE TABLE consumed (name TEXT PRIMARY KEY);
"""

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
            if version == 0:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute("INSERT INTO counters VALUES (1, ?, 0, 0, 0, 0)", (max(0, int(clock())),))
                    self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise ConfigError(
                    f"spool {path}",
                    got=f"version {version}",
                    expected=f"version {_SCHEMA_VERSION}",
                    do="move the file away; what waits in it can be sent by an agent of that version",
                )
            row = self._db.execute("SELECT COUNT(*), TOTAL(LENGTH(payload)) FROM outbox").fetchone()
            self.pending_count, self._bytes = int(row[0]), int(row[1])

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
        message = build(self._boot, seq)
        payload = encode(message)
        is_report = isinstance(message, Report)
        with self._errors(), self._transaction():
            position = self._db.execute(
                "INSERT INTO outbox (boot, seq, kind, payload) VALUES (?, ?, ?, ?)",
                (self._boot, seq, "report" if is_report else "alert", payload),
            ).lastrowid
            self._db.execute(
                "UPDATE counters SET reports_total = reports_total + ?, alerts_total = alerts_total + ?",
                (int(is_report), int(not is_report)),
            )
            self._db.executemany("INSERT OR IGNORE INTO consumed VALUES (?)", ((name,) for name in consumed))
            dropped, freed = self._make_room(self._bytes + len(payload), position)
        self._next_seq = seq + 1
        self._bytes += len(payload) - freed
        self.pending_count += 1 - dropped
        if dropped:
            log.warning("spool full: %d messages dropped, the hub will never see them", dropped)
        return seq

    def pending(self, after: int = 0, limit: int = 100) -> list[Entry]:
        """At most ``limit`` entries behind a position, oldest first, as far as the hub's acks can tell them apart."""
        with self._errors():
            rows = self._db.execute(
                "SELECT position, boot, seq, kind, payload,"
                " seq - (SELECT MIN(seq) FROM outbox AS held WHERE held.boot = outbox.boot)"
                " FROM outbox WHERE position > ? ORDER BY position LIMIT ?",
                (after, limit),
            ).fetchall()
        return [Entry(*row[:-1]) for row in takewhile(lambda row: row[-1] <= MAX_GAPS, rows)]

    def forget(self, ack: Ack) -> frozenset[int]:
        """Delete what the hub has stored: all of the ack's boot up to ``through_seq``, but its gaps.

        Returns:
            The positions that were deleted; empty for a repeated ack.
        """
        with self._errors(), self._transaction():
            rows = self._db.execute(
                "SELECT position, seq, LENGTH(payload) FROM outbox WHERE boot = ? AND seq <= ?",
                (ack.boot, ack.through_seq),
            ).fetchall()
            gaps = frozenset(ack.gaps)
            stored = [(position, size) for position, seq, size in rows if seq not in gaps]
            self._db.executemany("DELETE FROM outbox WHERE position = ?", ((position,) for position, _ in stored))
        self._bytes -= sum(size for _, size in stored)
        self.pending_count -= len(stored)
        return frozenset(position for position, _ in stored)

    def positions(self, boot: str, seqs: Sequence[int]) -> frozenset[int]:
        """Where those of ``seqs`` lie that still wait."""
        marks = ",".join("?" * len(seqs))
        with self._errors():
            rows = self._db.execute(f"SELECT position FROM outbox WHERE boot = ? AND seq IN ({marks})", (boot, *seqs))
            return frozenset(position for (position,) in rows)

    def consumed(self) -> list[str]:
        """Names of input files that are counted and may still lie in the source."""
        with self._errors():
            return [name for (name,) in self._db.execute("SELECT name FROM consumed ORDER BY name")]

    def clear_consumed(self) -> None:
        """Forget these names, once the files are deleted."""
        with self._errors(), self._transaction():
            self._db.execute("DELETE FROM consumed")

    def _make_room(self, size: int, newest: int | None) -> tuple[int, int]:
        """Drop until ``size`` fits: reports, then alerts, oldest first, never ``newest``. Returns (entries, bytes)."""
        dropped = freed = 0
        for kind in ("report", "alert"):
            if size - freed <= self._max_bytes:
                break
            positions = []
            rows = self._db.execute(
                "SELECT position, LENGTH(payload) FROM outbox WHERE kind = ? AND position < ? ORDER BY position",
                (kind, newest),
            )
            while size - freed > self._max_bytes and (row := rows.fetchone()):
                positions.append(row[:1])
                freed += row[1]
            rows.close()
            self._db.executemany("DELETE FROM outbox WHERE position = ?", positions)
            self._db.execute(f"UPDATE counters SET {kind}s_dropped = {kind}s_dropped + ?", (len(positions),))
            dropped += len(positions)
        return dropped, freed

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
