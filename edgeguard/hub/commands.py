"""What the hub asks of devices: commands with transaction ids, repeated until they are answered, and their answers.

Rules enforced here:

* a command is in the database before it is sent, and sent again, ever less often, until a reply or its expiry comes;
  that it is executed at most once is the device's promise, and its id makes it possible;
* a reply counts only from the device that was asked, under the id that it was asked with, about the model and layer
  that it was asked for; everything else changes nothing;
* commands are forgotten 90 days after they expired; what was decided about them stays in the audit trail;
* what a person must approve first waits as "proposed" and is not sent;
* no device is asked for ranks or votes of a private model, by whomever, and no answer of that kind is stored;
* federated pruning believes no single device: ranks are averaged without the extreme fifth at either end, and of votes
  a channel needs more than half.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from sqlalchemy import Row, delete, insert, select, update

from edgeguard.contract import messages, topics
from edgeguard.contract.guard import GuardMetadata, Tap
from edgeguard.contract.messages import COMMANDS, REPLIES, Command, Message, Rank, Recalibration, Reply, Vote
from edgeguard.errors import ConfigError, LinkError
from edgeguard.hub import tables
from edgeguard.hub.casebook import HUB, Casebook
from edgeguard.hub.cases import Dormant
from edgeguard.hub.store import Store

State = Literal["proposed", "waiting", "working", "ok", "refused", "failed", "expired"]

EXPIRES_S = 24 * 3600.0
REPEAT_MS = 10_000
KEPT_MS = 90 * 86_400_000
AT_ONCE = 200
"""So many commands go out at one tick."""
LIARS = 0.2
"""The share of devices whose answers may be lies."""
DORMANT_SHARE = 0.1
"""So much of a layer the fleet is asked to name."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One command as the database has it. ``reply`` is the device's whole answer, where one came."""

    id: str
    device: str
    name: str
    case: int | None
    state: State
    command: Command
    issued_ms: int
    reason: str
    reply: Reply | None


class Commands:
    """The commands of one fleet.

    Args:
        store: the database.
        book: writes the audit trail and the timeline.
        publish: hands a message for a device's channel to the broker; False where there is no connection.
        clock_ms: the hub's clock, which stands in the ids.
        private: the digests of the models that are private now.
    """

    def __init__(
        self,
        store: Store,
        book: Casebook,
        *,
        publish: Callable[[str, str, Message], bool],
        clock_ms: Callable[[], int],
        private: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._store = store
        self._book = book
        self._publish = publish
        self._clock_ms = clock_ms
        self._private = private

    def issue(
        self,
        device: str,
        name: str,
        *,
        who: str = HUB,
        why: str = "",
        case: int | None = None,
        propose: bool = False,
        expires_s: float = EXPIRES_S,
        **fields: Any,
    ) -> str:
        """Ask a device; the question goes out at the next tick.

        Args:
            device: its id.
            name: of the command, such as ``ping``.
            who: for the audit trail, as ``why``.
            case: the case that it belongs to.
            propose: a person must approve it first.
            expires_s: after so many seconds no answer is waited for.
            fields: those of the command but its id.

        Returns:
            The transaction id.

        Raises:
            ConfigError: no such command, device id or field.
        """
        topics.check_device(device)
        now = self._clock_ms()
        key = messages.transaction(now, secrets.token_hex(8))
        try:
            command = msgspec.convert({"id": key, **fields}, COMMANDS[name])
        except (KeyError, msgspec.ValidationError) as error:
            raise ConfigError(f"command {name}", got=error, expected=f"one of {', '.join(COMMANDS)}") from error
        if self._is_private(command):
            raise ConfigError(f"command {name}", got="a private model", do="ask in a private round")
        state: State = "proposed" if propose else "waiting"
        row = {
            "fleet": self._store.fleet,
            "id": key,
            "device": device,
            "name": name,
            "case_id": case,
            "payload": messages.encode(command),
            "state": state,
            "issued_ms": now,
            "expires_ms": now + round(expires_s * 1000),
            "sent_ms": 0,
            "reason": "",
        }
        with self._store.write() as db:
            db.execute(insert(tables.commands).values(**row))
            self._book.add_audit(db, f"command {key}", who, None, state, f"{name} to {device}: {why}" if why else name)
        return key

    def decide(self, key: str, approve: bool, who: str, why: str = "") -> None:
        """Record a person's decision on a proposed command.

        Raises:
            ConfigError: there is no such command that waits for a decision.
        """
        state: State = "waiting" if approve else "refused"
        table = tables.commands
        with self._store.write() as db:
            proposed = self._row(key).where(table.c.state == "proposed")
            values = {"state": state, "reason": "" if approve else f"{who} said no"}
            if not db.execute(proposed.values(**values)).rowcount:
                raise ConfigError(f"command {key}", got="nothing to decide", expected="a proposed command")
            self._book.add_audit(db, f"command {key}", who, "proposed", state, why)

    def tick(self) -> None:
        """Send what is due, and expire what nobody answered."""
        now, table = self._clock_ms(), tables.commands
        mine = table.c.fleet == self._store.fleet
        unanswered = table.c.state.in_(("waiting", "working"))
        with self._store.read() as db:
            # A repetition comes after as long again as the command has waited so far: a device that is away for a
            # week finds a handful at the broker.
            due = table.c.sent_ms + (table.c.sent_ms - table.c.issued_ms) + REPEAT_MS <= now
            first = table.c.sent_ms == 0
            chosen = select(table).where(mine, unanswered, first | due).order_by(table.c.issued_ms).limit(AT_ONCE)
            rows = db.execute(chosen).all()
            stale = table.c.state.in_(("proposed", "waiting", "working")) & (table.c.expires_ms <= now)
            expired = db.execute(select(table.c.id).where(mine, stale)).all()
        sent = [
            row.id
            for row in rows
            if row.expires_ms > now
            and not self._is_private(command := _command(row))
            and self._publish(row.device, topics.command(row.name), command)
        ]
        if sent or expired:
            with self._store.write() as db:
                db.execute(update(table).where(mine, table.c.id.in_(sent)).values(sent_ms=now))
                db.execute(update(table).where(mine, stale).values(state="expired", reason="no answer in time"))
                db.execute(delete(table).where(mine, table.c.expires_ms < now - KEPT_MS))

    def heard(self, device: str, name: str, payload: bytes) -> None:
        """Take a device's reply. Whatever is wrong with it is logged and changes nothing."""
        if name not in REPLIES:
            log.info("a reply of %s is not taken: to no command", device)
            return
        try:
            reply = messages.decode(REPLIES[name], payload)
            with self._store.read() as db:
                row = self._asked(db.execute(self._select(reply.id)).one_or_none(), device, name)
            command = _command(row)
            _check(command, reply)
        except (LinkError, ValueError) as error:
            log.info("a reply of %s is not taken: %s", device, error)
            return
        if self._is_private(command):
            log.info("a reply of %s is not taken: channels of a private model", device)
            return
        working = isinstance(reply.result, Recalibration) and reply.result.guard_digest is None
        values = {
            "state": "working" if working else reply.state,
            "reason": reply.reason,
            "reply": messages.encode(reply),
            "replied_ms": self._clock_ms(),
        }
        with self._store.write() as db:
            table = tables.commands
            db.execute(self._row(reply.id).where(table.c.state.in_(("waiting", "working"))).values(**values))

    def of_case(self, case: int) -> list[Entry]:
        """The commands that belong to a case, oldest first."""
        return self._entries(tables.commands.c.case_id == case)

    def latest(self, *, device: str | None = None, limit: int = 100) -> list[Entry]:
        """The last ones, oldest first; of one device, or of all."""
        table = tables.commands
        return self._entries(*([] if device is None else [table.c.device == device]), limit=limit)

    def _is_private(self, command: Command) -> bool:
        """Whether an answer would show a private model's activations."""
        return isinstance(command, Rank | Vote) and command.model_digest in self._private()

    def _entries(self, *conditions: Any, limit: int = 10_000) -> list[Entry]:
        table = tables.commands
        chosen = select(table).where(table.c.fleet == self._store.fleet, *conditions)
        with self._store.read() as db:
            rows = db.execute(chosen.order_by(table.c.issued_ms.desc(), table.c.id.desc()).limit(limit)).all()
        return [_to_entry(row) for row in reversed(rows)]

    def _row(self, key: str) -> Any:
        table = tables.commands
        return update(table).where(table.c.fleet == self._store.fleet, table.c.id == key)

    def _select(self, key: str) -> Any:
        table = tables.commands
        return select(table).where(table.c.fleet == self._store.fleet, table.c.id == key)

    def _asked(self, row: Row[Any] | None, device: str, name: str) -> Row[Any]:
        if row is None or (row.device, row.name) != (device, name) or row.state not in ("waiting", "working"):
            raise LinkError("reply", got="an id that this device was not asked under, or has answered")
        return row


def questions(guard: GuardMetadata, how: Literal["ranks", "votes"]) -> list[tuple[str, dict[str, Any]]]:
    """Name and fields of the commands that ask a device which channels are least active on its unflagged inputs."""
    if how == "ranks":
        return [(Rank.name, {"model_digest": guard.model_digest})]
    return [
        (Vote.name, {"model_digest": guard.model_digest, "layer": layer, "share": DORMANT_SHARE})
        for layer in dict.fromkeys(_layer(tap) for tap in _tapped(guard))
    ]


def dormant(guard: GuardMetadata, entries: Sequence[Entry]) -> tuple[Dormant, ...]:
    """What the fleet's answers say: per layer the least active channels, the least active first.

    An answer that does not fit the layer's number of channels is left out. Wu, Yang, Zhu, Mitra, "Mitigating Backdoor
    Attacks in Federated Learning", arXiv 2011.01767: rank aggregation (RAP) and majority vote (MVP).
    """
    found: list[Dormant] = []
    for layer, channels in {_layer(tap): tap.channels for tap in _tapped(guard)}.items():
        ranks: dict[str, tuple[int, ...]] = {}
        ballots: dict[str, tuple[int, ...]] = {}
        for entry in entries:
            if not entry.reply or entry.state != "ok":
                continue
            result = entry.reply.result
            if isinstance(result, messages.Ranking):
                ranks.update(
                    (entry.device, tap.channels)
                    for tap in result.taps
                    if layer == (tap.source_layer or tap.tensor) and len(tap.channels) == channels
                )
            elif isinstance(result, messages.Ballot) and result.layer == layer:
                named = [channel for channel in result.channels if channel < channels]
                ballots[entry.device] = tuple(named[: round(DORMANT_SHARE * channels)])
        order = mean_ranks(list(ranks.values()))[: round(DORMANT_SHARE * channels)] or majority(list(ballots.values()))
        if order:
            found.append(Dormant(layer=layer, channels=order))
    return tuple(found)


def mean_ranks(rankings: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The channels by their mean place, without the extreme fifth of the devices at either end of each channel.

    Args:
        rankings: one a device; each names every channel once, the least active first.
    """
    if not rankings:
        return ()
    places = np.sort(np.argsort(np.asarray(rankings), axis=1), axis=0)
    cut = min(math.ceil(LIARS * len(rankings)), (len(rankings) - 1) // 2)
    means = places[cut : len(rankings) - cut].mean(axis=0)
    return tuple(int(channel) for channel in np.argsort(means, kind="stable"))


def majority(ballots: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The channels that more than half of the devices name, those with most votes first."""
    votes: dict[int, int] = {}
    for ballot in ballots:
        for channel in set(ballot):
            votes[channel] = votes.get(channel, 0) + 1
    chosen = [channel for channel, count in votes.items() if 2 * count > len(ballots)]
    return tuple(sorted(chosen, key=lambda channel: (-votes[channel], channel)))


def _tapped(guard: GuardMetadata) -> list[Tap]:
    """The taps whose channels devices rank: by their l1 feature."""
    return [tap for tap in guard.taps if tap.kind == "l1"]


def _layer(tap: Tap) -> str:
    return tap.source_layer or tap.tensor


def _check(command: Command, reply: Reply) -> None:
    """Raise ValueError where an answer is about something else than was asked."""
    result = reply.result
    if isinstance(result, messages.Ranking | messages.Ballot):
        assert isinstance(command, Rank | Vote)
        if result.model_digest != command.model_digest:
            raise ValueError("an answer about another model")
    if isinstance(result, messages.Ballot) and isinstance(command, Vote) and result.layer != command.layer:
        raise ValueError("an answer about another layer")


def _command(row: Row[Any]) -> Command:
    return messages.decode(COMMANDS[row.name], row.payload)


def _to_entry(row: Row[Any]) -> Entry:
    return Entry(
        id=row.id,
        device=row.device,
        name=row.name,
        case=row.case_id,
        state=row.state,
        command=_command(row),
        issued_ms=row.issued_ms,
        reason=row.reason,
        reply=messages.decode(REPLIES[row.name], row.reply) if row.reply else None,
    )
