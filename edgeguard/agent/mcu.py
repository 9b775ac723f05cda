"""A gateway's end of one serial line: what is said to the microcontroller at the other end, and when. Pure.

Bytes and the time are passed in; bytes to send and events come out. Rules enforced here:

* every hello is answered; a microcontroller whose message definitions differ gets that answer and nothing else, and
  one that was not greeted is not listened to;
* a report, alert, confirmation or reply is acknowledged on :meth:`Peer.keep` alone: once it is kept. What comes again
  meanwhile is not told twice;
* a command is sent until it is acknowledged, so many times at most, then waited for; one after the other. Where the
  microcontroller starts anew it ends as interrupted, and is never sent to the new start;
* a transfer goes on where the microcontroller says that it stopped, after a lost line or power as well. What it may
  ask for again is bounded;
* silence for ``SILENCE_S`` means that it is gone, and so do other message definitions.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from firmware_bridge.link import messages as link
from firmware_bridge.link.codec import Decoder, Received, encode

SILENCE_S = 15.0
CLOCK_S = 5.0
GREET_S = 1.0
RESEND_S = 0.5
SENDINGS = 5
REPLY_S = 10.0
ASK_AGAIN_S = 1.0
ASKS = 12
"""So often the same question of a transfer is asked in vain."""
PIECES = (link.CHUNK, link.CHUNK, 96, 96, 32)
"""Bytes of a chunk that is sent for the first time, the second and so on: on a bad line short frames get through."""
UNKEPT = 4
"""Messages that may wait to be kept: an honest peer has one under way."""
COMMANDS = 8
"""Commands that may wait."""


Reliable = link.Report | link.Alert | link.TransferConfirm | link.Reply
"""What a microcontroller says until it is acknowledged."""


@dataclass(frozen=True)
class Came:
    """A microcontroller is there: it started, or was away, or says something new of itself."""

    hello: link.Hello


@dataclass(frozen=True)
class Foreign:
    """A microcontroller is there that was built with other message definitions."""

    schema: int


@dataclass(frozen=True)
class Gone:
    """Nothing was heard of it for too long, or it came back with other message definitions."""


@dataclass(frozen=True)
class Told:
    """Something to be kept, and then acknowledged by :meth:`Peer.keep` with this ticket."""

    ticket: int
    message: Reliable


@dataclass(frozen=True)
class Alive:
    """Its heartbeat."""

    health: link.Health


@dataclass(frozen=True)
class Unanswered:
    """No reply to this command will come."""

    transaction: int
    reason: str


@dataclass(frozen=True)
class Moved:
    """A transfer began, or goes on, at this byte."""

    offset: int
    size: int


@dataclass(frozen=True)
class Ended:
    """A transfer is over: all is there and on trial, or it was refused, or came to nothing for now."""

    state: Literal["staged", "refused", "failed"]
    file_digest: str
    reason: str = ""


Event = Came | Foreign | Gone | Told | Alive | Unanswered | Moved | Ended


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model for the microcontroller's other slot. Whoever makes one has verified it."""

    content: bytes = field(repr=False)
    model_digest: str
    guard_digest: str
    sequence: int

    @property
    def file_digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(kw_only=True)
class _Asked:
    """The command under way."""

    command: link.Command
    sequence: int
    sendings: int = 0
    acknowledged: bool = False
    due_s: float = 0.0


@dataclass(kw_only=True)
class _Transfer:
    """The transfer under way.

    ``at``: where the chunk begins that waits for its answer, None while the begin does; ``asks``: how often that was
    sent; ``left``: how much may be sent in all.
    """

    offer: Offer
    digest: bytes
    at: int | None = None
    asks: int = 0
    due_s: float = 0.0
    left: int


class Peer:
    """One line.

    Args:
        clock_ms: milliseconds since 1970, for the microcontroller's own times.
    """

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._decoder = Decoder("mcu")
        self._out = bytearray()
        self._events: list[Event] = []
        self._sequence = 0
        self._hello: link.Hello | None = None
        self._foreign: int | None = None
        self.present = False
        self._heard_s = self._clock_s = 0.0
        self._greeted_s = -GREET_S
        self._came_s = -GREET_S
        self._tickets = 0
        self._unkept: dict[int, tuple[int, link.Message]] = {}
        self._kept: tuple[int, link.Message] | None = None
        self._waiting: deque[link.Command] = deque()
        self._asked: _Asked | None = None
        self._transfer: _Transfer | None = None

    @property
    def damaged(self) -> int:
        """Frames that did not arrive as they were sent, or said nothing that this gateway knows."""
        return self._decoder.damaged + self._decoder.refused

    def feed(self, piece: bytes, now_s: float) -> list[Event]:
        """Take what the line brought; what happened."""
        for received in self._decoder.feed(piece):
            self._take(received, now_s)
        return self._drained()

    def tick(self, now_s: float) -> list[Event]:
        """Look at the clock; what happened."""
        if self.present and now_s - self._heard_s > SILENCE_S:
            self.present = False
            self._events.append(Gone())
        if self.present and now_s - self._clock_s >= CLOCK_S:
            self._clock_s = now_s
            self._send(link.Clock(unix_ms=self._clock_ms()))
        if self.present:
            self._press_command(now_s)
            self._press_transfer(now_s)
        return self._drained()

    def output(self) -> bytes:
        """What is to be sent now."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def keep(self, ticket: int) -> None:
        """What came under this ticket is kept: acknowledge it, unless it is of an earlier start."""
        found = self._unkept.pop(ticket, None)
        if found is not None:
            self._kept = found
            self._acknowledge(found[0])

    def ask(self, transaction: int, order: link.Order) -> None:
        """Have a command executed, once."""
        if self.present and len(self._waiting) < COMMANDS:
            self._waiting.append(link.Command(transaction=transaction, order=order))
        else:
            why = "too many commands wait" if self.present else "the microcontroller is not there"
            self._events.append(Unanswered(transaction, f"{why}; send it again later"))

    def offer(self, offer: Offer) -> None:
        """Begin to transfer a model, in the place of any other."""
        # Each chunk once, as many again, and what a flaky line may cost.
        left = 4 * -(-len(offer.content) // link.CHUNK) + 1000
        self._transfer = _Transfer(offer=offer, digest=bytes.fromhex(offer.file_digest), left=left)

    def withdraw(self) -> None:
        """Stop a transfer; the microcontroller keeps what it has."""
        self._transfer = None

    def _take(self, received: Received, now_s: float) -> None:
        sequence, message = received
        if isinstance(message, link.Hello):
            self._greet(message, now_s)
            return
        if self._hello is None:
            if self._foreign is None and now_s - self._greeted_s >= GREET_S:
                self._greeted_s = now_s
                self._welcome(0)
            return
        self._heard_s = now_s
        if not self.present:
            self.present = True
            self._events.append(Came(self._hello))
        if isinstance(message, link.Ack):
            if self._asked is not None and message.sequence == self._asked.sequence and not self._asked.acknowledged:
                self._asked.acknowledged, self._asked.due_s = True, now_s + REPLY_S
        elif isinstance(message, link.Health):
            self._events.append(Alive(message))
        elif isinstance(message, link.TransferStatus):
            self._follow(message, now_s)
        elif isinstance(message, Reliable):
            self._tell(sequence, message)

    def _greet(self, hello: link.Hello, now_s: float) -> None:
        if hello != self._hello and now_s - self._came_s < GREET_S:
            return  # one a second, as it is repeated: each costs the gateway a write to its disk
        self._welcome(hello.boot)
        if hello.schema != link.SCHEMA:
            if self._foreign != hello.schema:
                self._foreign = hello.schema
                self._events.append(Foreign(hello.schema))
            if self.present:
                self._events.append(Gone())
            if self._hello is not None:
                self._interrupt()
            self._hello, self.present = None, False
            return
        before, self._hello, self._foreign = self._hello, hello, None
        self._heard_s = self._clock_s = now_s
        if before is not None and before.boot != hello.boot:
            self._interrupt()
        if self._transfer is not None and hello.file_digest == self._transfer.digest:
            self._end_transfer("staged", "")  # it runs there: that all of it had arrived was said, and not heard
        if not self.present or before != hello:
            self.present, self._came_s = True, now_s
            self._events.append(Came(hello))

    def _interrupt(self) -> None:
        """It started anew: what was under way is not."""
        if self._asked is not None:
            self._end_command("interrupted, the microcontroller started anew")
        self._unkept.clear()
        self._kept = None
        if self._transfer is not None:
            self._transfer.at, self._transfer.asks, self._transfer.due_s = None, 0, 0.0

    def _tell(self, sequence: int, message: Reliable) -> None:
        if self._kept == (sequence, message):
            self._acknowledge(sequence)
        elif (sequence, message) not in self._unkept.values() and len(self._unkept) < UNKEPT:
            self._tickets += 1
            self._unkept[self._tickets] = (sequence, message)
            self._events.append(Told(self._tickets, message))
            asked = self._asked
            if isinstance(message, link.Reply) and asked and message.transaction == asked.command.transaction:
                self._asked = None

    def _press_command(self, now_s: float) -> None:
        """Send the command again, give it up, or begin the next."""
        asked = self._asked
        if asked is None:
            if not self._waiting:
                return
            asked = self._asked = _Asked(command=self._waiting.popleft(), sequence=self._next())
        if now_s < asked.due_s:
            return
        if asked.acknowledged:
            self._end_command("it was taken and not answered in time")
        elif asked.sendings >= SENDINGS:
            self._end_command("the microcontroller did not answer")
        else:
            asked.sendings += 1
            asked.due_s = now_s + RESEND_S
            self._out += encode(asked.command, asked.sequence)

    def _end_command(self, reason: str) -> None:
        assert self._asked is not None
        self._events.append(Unanswered(self._asked.command.transaction, reason))
        self._asked = None

    def _press_transfer(self, now_s: float) -> None:
        """Ask the question of the transfer, for the first time or again."""
        transfer = self._transfer
        if transfer is None or now_s < transfer.due_s:
            return
        if transfer.asks >= ASKS or transfer.left <= 0:
            self._end_transfer("failed", "the microcontroller does not answer" if transfer.left > 0 else "no progress")
            return
        offer = transfer.offer
        question: link.Message
        if transfer.at is None:
            question = link.TransferBegin(
                file_digest=transfer.digest,
                model_digest=bytes.fromhex(offer.model_digest),
                guard_digest=bytes.fromhex(offer.guard_digest),
                sequence=offer.sequence,
                size=len(offer.content),
            )
        elif transfer.at < len(offer.content):
            size = PIECES[min(transfer.asks, len(PIECES) - 1)]
            question = link.TransferChunk(offset=transfer.at, data=offer.content[transfer.at : transfer.at + size])
        else:
            question = link.TransferEnd(file_digest=transfer.digest)
        transfer.asks += 1
        transfer.left -= 1
        transfer.due_s = now_s + ASK_AGAIN_S
        self._send(question)

    def _follow(self, status: link.TransferStatus, now_s: float) -> None:
        """Go on as the microcontroller says."""
        transfer = self._transfer
        if transfer is None or status.file_digest != transfer.digest:
            return
        content = transfer.offer.content
        if status.phase is link.Phase.STAGED:
            self._end_transfer("staged", "")
        elif status.phase is link.Phase.REFUSED:
            damaged = status.cause in (link.Cause.DIGEST, link.Cause.FLASH)
            why = status.cause.name.lower().replace("_", " ")
            self._end_transfer("failed" if damaged else "refused", f"the microcontroller says: {why}")
        elif status.phase is link.Phase.VERIFYING:
            transfer.asks = 0
        elif status.phase is link.Phase.RECEIVING and status.offset <= len(content):
            if transfer.at is None:
                self._events.append(Moved(status.offset, len(content)))
            # A late answer to a question that was asked twice must not double the questions from here on.
            if status.offset != transfer.at:
                transfer.at, transfer.asks, transfer.due_s = status.offset, 0, now_s
                self._press_transfer(now_s)

    def _end_transfer(self, state: Literal["staged", "refused", "failed"], reason: str) -> None:
        assert self._transfer is not None
        self._events.append(Ended(state, self._transfer.offer.file_digest, reason))
        self._transfer = None

    def _welcome(self, boot: int) -> None:
        self._send(link.Welcome(schema=link.SCHEMA, boot=boot, unix_ms=self._clock_ms()))

    def _acknowledge(self, sequence: int) -> None:
        self._send(link.Ack(sequence=sequence))

    def _send(self, message: link.Message) -> None:
        self._out += encode(message, self._next())

    def _next(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFF
        return self._sequence

    def _drained(self) -> list[Event]:
        events, self._events = self._events, []
        return events
