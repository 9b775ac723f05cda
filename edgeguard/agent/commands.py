"""Commands from the hub: each transaction id is executed at most once, whatever is repeated, whenever power fails.

Rules enforced here:

* an id is on disk as begun before its command is executed, and its reply is on disk before it is sent;
* a repeated id gets the stored reply, byte for byte, and nothing is executed. What was begun and had no last reply
  when the agent ended is answered "failed: interrupted, not repeated", for good;
* the store is bounded: replies leave by count, those with the oldest time in their id first, and by age. The latest
  time that left is kept, and an unknown id of that time or before it is refused: it may be one that left. So no id
  is executed twice, whatever the clocks say; they only decide how long a reply can be had again;
* an id from more than a day ahead of this device's clock is refused: once it left, it would bar all before it;
* commands a minute are limited. One too many is refused and not begun, so that the same id may come again; a repeated
  one too many gets no answer, because "refused" would be wrong;
* a command that goes wrong fails, and never ends the agent. A disk that cannot be written does.

What is remembered is this one file: a device whose state folder was erased remembers nothing.

Example:
    >>> commands = Commands(folder / "commands.sqlite", {"ping": ping})  # doctest: +SKIP
    >>> answer = commands.take(event)  # doctest: +SKIP
    >>> if answer is not None:  # doctest: +SKIP
    ...     link.publish(answer.channel, answer.payload)
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeguard.agent.window import AlertLimit
from edgeguard.contract import topics
from edgeguard.contract.messages import Command, Reply, encode, issued_ms
from edgeguard.errors import ConfigError, EdgeGuardError

FILE = "commands.sqlite"
PER_MINUTE = 30
KEPT = 256
KEPT_MS = 7 * 86_400_000
AHEAD_MS = 86_400_000
INTERRUPTED = "interrupted, not repeated"

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE commands (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, issued_ms INTEGER NOT NULL, begun_ms INTEGER NOT NULL,
    reply BLOB, final INTEGER NOT NULL
);
CREATE TABLE forgotten (id INTEGER PRIMARY KEY CHECK (id = 1), through_ms INTEGER NOT NULL);
INSERT INTO forgotten VALUES (1, -1)
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a handler says. ``result`` is the one of the command's reply, and goes with "ok" only.

    ``final`` False: the command is at work, and its last outcome comes by :meth:`Commands.finish`.
    """

    state: Literal["ok", "refused", "failed"]
    reason: str = ""
    result: msgspec.Struct | None = None
    final: bool = True

    def __post_init__(self) -> None:
        if (self.state == "ok") != (self.result is not None):
            raise ValueError(f"a command that is {self.state} with result {self.result}")


Handler = Callable[[Any], Outcome | None]
"""What executes a command; None where there is nothing to say before its last outcome comes."""
"""Executes one kind of command, and is given no other."""


@dataclass(frozen=True)
class Answer:
    """A reply as it is published."""

    channel: str
    payload: bytes


def refusal(
    issued_ms: int, *, forgotten_ms: int, now_ms: int, has_room: bool, per_minute: int = PER_MINUTE
) -> str | None:
    """Why a command with an unknown id is not begun, None when it may be.

    Args:
        issued_ms: the time in its id, in milliseconds since 1970, as all times here.
        forgotten_ms: the latest time in an id that left the store, -1 when none did.
        now_ms: this device's clock.
        has_room: the limit per minute is not reached.
        per_minute: that limit.
    """
    if issued_ms <= forgotten_ms:
        return "an id from a time of which this device has forgotten commands; send it under a new id"
    if issued_ms > now_ms + AHEAD_MS:
        return "an id from more than a day ahead; its first 12 digits are the time, or this device's clock is wrong"
    if not has_room:
        return f"more than {per_minute} commands a minute; send it again later"
    return None


class Commands:
    """Executes commands and remembers that it did.

    Args:
        path: the database file; made when missing. One process may use it.
        handlers: by the command's name.
        per_minute: so many commands a minute.
        kept: so many replies are kept at most.
        clock: seconds since 1970.
        steady: seconds of a clock that is never set.

    Raises:
        ConfigError: the file cannot be made, is damaged or of another version. So do all methods, on a disk that is
            full or refuses to write.
    """

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        *,
        per_minute: int = PER_MINUTE,
        kept: int = KEPT,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._handlers = handlers
        self._per_minute = per_minute
        self._kept = kept
        self._clock = clock
        self._steady = steady
        self._limit = AlertLimit.full(per_minute, steady())
        with self._errors():
            # One thread opens it, another one uses it.
            self._db = sqlite3.connect(path, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise ConfigError(f"commands {path}", got=f"version {version}", expected=f"version {_SCHEMA_VERSION}")
            interrupted = self._db.execute("SELECT id FROM commands WHERE NOT final").fetchall()
        for (transaction,) in interrupted:
            log.warning("command %s was interrupted by the end of the agent", transaction)
            self.finish(transaction, Outcome(state="failed", reason=INTERRUPTED))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def take(self, command: Command) -> Answer | None:
        """Execute a command, unless its id was begun before; what to send, None for nothing.

        An answer that gets lost needs no care: the hub sends the command again.
        """
        has_room, self._limit = self._limit.take(self._steady())
        with self._errors():
            known = self._db.execute("SELECT name, reply FROM commands WHERE id = ?", (command.id,)).fetchone()
            (forgotten_ms,) = self._db.execute("SELECT through_ms FROM forgotten").fetchone()
        if known is not None:
            name, reply = known
            return Answer(topics.reply(name), reply) if has_room and reply is not None else None
        now_ms = int(self._clock() * 1000)
        reason = refusal(
            issued_ms(command.id),
            forgotten_ms=forgotten_ms,
            now_ms=now_ms,
            has_room=has_room,
            per_minute=self._per_minute,
        )
        handler = self._handlers.get(command.name)
        if reason is None and handler is None:
            reason = "not a command that this device takes"
        if reason is not None or handler is None:
            return _answer(command.id, command.name, Outcome(state="refused", reason=reason or ""))
        self._begin(command, now_ms)
        log.info("command %s %s", command.name, command.id)
        outcome = _executed(handler, command)
        return None if outcome is None else self.finish(command.id, outcome)

    def finish(self, transaction: str, outcome: Outcome) -> Answer:
        """Store what became of a command that was begun, and return what to send.

        Raises:
            ValueError: it was not begun, or had its last outcome.
        """
        with self._errors(), self._db:
            row = self._db.execute("SELECT name FROM commands WHERE id = ? AND NOT final", (transaction,)).fetchone()
            if row is None:
                raise ValueError(f"command {transaction} is not at work")
            answer = _answer(transaction, row[0], outcome)
            self._db.execute(
                "UPDATE commands SET reply = ?, final = ? WHERE id = ?", (answer.payload, outcome.final, transaction)
            )
        return answer

    def _begin(self, command: Command, now_ms: int) -> None:
        with self._errors(), self._db:
            self._db.execute(
                "INSERT INTO commands VALUES (?, ?, ?, ?, NULL, 0)",
                (command.id, command.name, issued_ms(command.id), now_ms),
            )
            leaving = self._db.execute(
                "SELECT id, issued_ms FROM commands WHERE final AND (begun_ms < ? OR id IN"
                " (SELECT id FROM commands WHERE final ORDER BY issued_ms DESC LIMIT -1 OFFSET ?))",
                (now_ms - KEPT_MS, self._kept - 1),
            ).fetchall()
            self._db.executemany("DELETE FROM commands WHERE id = ?", ((transaction,) for transaction, _ in leaving))
            self._db.executemany(
                "UPDATE forgotten SET through_ms = MAX(through_ms, ?)", ((issued,) for _, issued in leaving)
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"commands {self._path}",
                got=str(error),
                expected="a file that can be read and written",
                do="free disk space or check the folder; move the file away if it is damaged",
            ) from error


def _executed(handler: Handler, command: Command) -> Outcome | None:
    try:
        return handler(command)
    except EdgeGuardError as error:
        return Outcome(state="failed", reason=str(error))
    except Exception as error:
        log.exception("command %s %s", command.name, command.id)
        return Outcome(state="failed", reason=f"internal error: {type(error).__name__}")


def _answer(transaction: str, name: str, outcome: Outcome) -> Answer:
    reply = Reply(id=transaction, state=outcome.state, reason=outcome.reason[:512], result=outcome.result)
    return Answer(topics.reply(name), encode(reply))
