"""The gateway's end of a serial line: what is answered, what is repeated, what hostile bytes can do."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.agent import mcu
from edgeguard.agent.mcu import Came, Ended, Foreign, Gone, Moved, Offer, Peer, Told, Unanswered
from firmware_bridge.link import messages as wire
from firmware_bridge.link.codec import Decoder, encode, stuff

NOW_MS = 1_760_000_000_000
ZERO = bytes(32)


def hello(boot: int = 1, **more: object) -> wire.Hello:
    fields = {
        "schema": wire.SCHEMA, "boot": boot, "name": "pump", "board": "test", "library": "1.0", "detectors": "linf",
        "model_digest": ZERO, "guard_digest": ZERO, "file_digest": ZERO, "sequence": 0, "slot_bytes": 4096,
        "standing": wire.Standing.CONFIRMED,
    }  # fmt: skip
    return wire.Hello(**{**fields, **more})  # type: ignore[arg-type]


def report(number: int) -> wire.Report:
    histogram = (1, *[0] * 19)
    counts = (wire.Count(label=3, inputs=1, flagged=0),)
    return wire.Report(
        number=number, started_ms=0, ended_ms=1, unchecked=0, histogram=histogram, labels=counts,
        evidence_label=-1, evidence=0, channels=(),
    )  # fmt: skip


def frame(kind: int, payload: bytes) -> bytes:
    """A frame that is intact, whatever it holds."""
    whole = struct.pack("<BBHH", wire.VERSION, kind, len(payload), 0) + payload
    return stuff(whole + zlib.crc32(whole).to_bytes(4, "little")) + b"\0"


class Line:
    """A peer, and a microcontroller's mouth and ears at the other end."""

    def __init__(self) -> None:
        self.peer = Peer(lambda: NOW_MS)
        self._ears = Decoder("gateway")
        self._sequence = 0

    def say(self, message: wire.Message, at_s: float = 0.0, *, sequence: int | None = None) -> list[mcu.Event]:
        self._sequence += 1
        return self.peer.feed(encode(message, self._sequence if sequence is None else sequence), at_s)

    def hear(self) -> list[wire.Message]:
        return [received.message for received in self._ears.feed(self.peer.output())]

    def told(self, message: wire.Message, at_s: float = 0.0, *, sequence: int | None = None) -> Told:
        (event,) = self.say(message, at_s, sequence=sequence)
        assert isinstance(event, Told)
        return event


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def greeted(line: Line) -> Line:
    line.say(hello())
    line.hear()
    return line


def test_every_hello_is_answered_and_told_once(line: Line) -> None:
    assert line.say(hello()) == [Came(hello())]
    assert line.say(hello(), 1.0) == []
    assert line.hear() == [wire.Welcome(schema=wire.SCHEMA, boot=1, unix_ms=NOW_MS)] * 2


def test_firmware_with_other_message_definitions_is_answered_and_not_listened_to(line: Line) -> None:
    other = hello(schema=wire.SCHEMA ^ 1)
    assert line.say(other) == [Foreign(wire.SCHEMA ^ 1)]
    assert line.say(other, 1.0) == []
    assert line.say(report(1), 2.0) == []
    assert [type(message) for message in line.hear()] == [wire.Welcome] * 2


def test_firmware_that_is_replaced_by_foreign_firmware_is_gone_and_what_was_asked_of_it_ends(greeted: Line) -> None:
    greeted.peer.ask(7, wire.Order.PING)
    greeted.peer.tick(0.0)
    assert greeted.say(hello(2, schema=wire.SCHEMA ^ 1), 1.0) == [
        Foreign(wire.SCHEMA ^ 1),
        Gone(),
        Unanswered(7, "interrupted, the microcontroller started anew"),
    ]
    assert greeted.peer.tick(99.0) == []
    assert greeted.say(hello(3), 100.0) == [Came(hello(3))]


@pytest.mark.parametrize("size", [12, 13, 240])
def test_foreign_firmware_whose_hello_has_another_length_is_known_as_such(line: Line, size: int) -> None:
    payload = (struct.pack("<IQ", wire.SCHEMA ^ 1, 5) + bytes(range(256)))[:size]
    assert line.peer.feed(frame(wire.Hello.TYPE, payload), 0.0) == [Foreign(wire.SCHEMA ^ 1)]
    assert line.hear() == [wire.Welcome(schema=wire.SCHEMA, boot=5, unix_ms=NOW_MS)]


def test_a_hello_of_this_schema_still_has_its_length(line: Line) -> None:
    payload = struct.pack("<IQ", wire.SCHEMA, 5) + bytes(1)
    assert line.peer.feed(frame(wire.Hello.TYPE, payload), 0.0) == []
    assert line.peer.damaged == 1


def test_a_microcontroller_that_was_not_greeted_is_made_to_say_hello(line: Line) -> None:
    assert line.say(report(1), 5.0) == []
    assert line.hear() == [wire.Welcome(schema=wire.SCHEMA, boot=0, unix_ms=NOW_MS)]


def test_starts_faster_than_one_a_second_are_not_heard(greeted: Line) -> None:
    assert greeted.say(hello(2), 0.5) == []
    assert greeted.hear() == []
    assert greeted.say(hello(2), 1.0) == [Came(hello(2))]


def test_a_report_is_acknowledged_once_it_is_kept_and_a_copy_again_but_told_once(greeted: Line) -> None:
    told = greeted.told(report(1), sequence=9)
    assert greeted.say(report(1), sequence=9) == []
    assert greeted.hear() == []
    greeted.peer.keep(told.ticket)
    assert greeted.say(report(1), sequence=9) == []
    assert greeted.hear() == [wire.Ack(sequence=9)] * 2


def test_what_an_earlier_start_said_is_not_acknowledged_to_the_next(greeted: Line) -> None:
    before = greeted.told(report(1), sequence=1)
    greeted.say(hello(2), 2.0)
    greeted.hear()
    after = greeted.told(report(1), 2.0, sequence=1)
    greeted.peer.keep(before.ticket)
    assert greeted.hear() == []
    greeted.peer.keep(after.ticket)
    assert greeted.hear() == [wire.Ack(sequence=1)]


def test_no_more_wait_to_be_kept_than_an_honest_peer_has_under_way(greeted: Line) -> None:
    assert sum(len(greeted.say(report(number))) for number in range(1, 100)) == mcu.UNKEPT


def test_silence_is_told_once_and_its_end_too(greeted: Line) -> None:
    assert greeted.peer.tick(15.0) == []
    assert greeted.peer.tick(15.1) == [Gone()]
    assert greeted.peer.tick(99.0) == []
    health = wire.Health(
        uptime_ms=1, inputs=0, unchecked=0, lost=0, alerts_lost=0, damaged=0, inference_us=None
    )  # fmt: skip
    assert greeted.say(health, 100.0) == [Came(hello()), mcu.Alive(health)]


def test_the_clock_is_told_every_few_seconds(greeted: Line) -> None:
    clocks = 0
    for second in range(1, 15):
        greeted.peer.tick(float(second))
        clocks += greeted.hear().count(wire.Clock(unix_ms=NOW_MS))
    assert clocks == 2


def asked(line: Line, seconds: float, *, answer: Callable[[wire.Command], None] = lambda _: None) -> int:
    """So often a command is sent in so many seconds."""
    count = 0
    for step in range(int(seconds * 10)):
        line.peer.tick(step / 10)
        for message in line.hear():
            if isinstance(message, wire.Command):
                count += 1
                answer(message)
    return count


def test_a_command_is_repeated_until_it_is_acknowledged_so_often_at_most(greeted: Line) -> None:
    greeted.peer.ask(7, wire.Order.PING)
    events: list[mcu.Event] = []
    sent = 0
    for step in range(80):
        events += greeted.peer.tick(step / 10)
        sent += sum(isinstance(message, wire.Command) for message in greeted.hear())
    assert sent == mcu.SENDINGS
    assert events == [Unanswered(7, "the microcontroller did not answer")]


def test_an_acknowledged_command_is_not_sent_again_and_the_next_waits_for_its_reply(line: Line) -> None:
    line.say(hello())
    line.hear()
    line.peer.ask(7, wire.Order.PING)
    line.peer.ask(8, wire.Order.RESTART)
    line.peer.tick(0.0)
    wired = line.peer.output()
    ((sequence, command),) = Decoder("gateway").feed(wired)
    assert command == wire.Command(transaction=7, order=wire.Order.PING)
    line.say(wire.Ack(sequence=sequence))
    assert asked(line, 5) == 0
    line.told(wire.Reply(transaction=7, outcome=wire.Outcome.OK, uptime_ms=1), 5.0)
    line.peer.tick(5.0)
    assert wire.Command(transaction=8, order=wire.Order.RESTART) in line.hear()


def test_a_command_under_way_ends_with_the_start_that_it_was_sent_to(greeted: Line) -> None:
    greeted.peer.ask(7, wire.Order.PING)
    greeted.peer.tick(1.0)
    events = greeted.say(hello(2), 1.5)
    assert Unanswered(7, "interrupted, the microcontroller started anew") in events
    greeted.hear()
    assert asked(greeted, 5) == 0


def test_a_command_to_nobody_is_refused(line: Line) -> None:
    line.peer.ask(7, wire.Order.PING)
    assert line.peer.tick(0.0) == [Unanswered(7, "the microcontroller is not there; send it again later")]


CONTENT = bytes(range(256)) * 4
OFFER = Offer(content=CONTENT, model_digest="a" * 64, guard_digest="b" * 64, sequence=3)
DIGEST = hashlib.sha256(CONTENT).digest()


def status(phase: wire.Phase, offset: int = 0, cause: wire.Cause = wire.Cause.NONE) -> wire.TransferStatus:
    return wire.TransferStatus(file_digest=DIGEST, phase=phase, offset=offset, cause=cause)


class Slot:
    """A microcontroller's second slot that does what the definition says; it starts with what it has."""

    def __init__(self, line: Line, has: bytes = b"") -> None:
        self.line, self.content = line, has
        self.events: list[mcu.Event] = []

    def run(self, seconds: int, *, deaf: Callable[[wire.Message], bool] = lambda _: False) -> None:
        for step in range(seconds * 10):
            at_s = step / 10
            self.events += self.line.peer.tick(at_s)
            for message in self.line.hear():
                if not deaf(message):
                    self.answer(message, at_s)

    def answer(self, message: wire.Message, at_s: float) -> None:
        if isinstance(message, wire.TransferBegin):
            assert (message.size, message.sequence) == (len(CONTENT), 3)
        elif isinstance(message, wire.TransferChunk):
            if message.offset == len(self.content):
                self.content += message.data
        elif not isinstance(message, wire.TransferEnd):
            return
        done = isinstance(message, wire.TransferEnd) and self.content == CONTENT
        phase = wire.Phase.STAGED if done else wire.Phase.RECEIVING
        self.events += self.line.say(status(phase, len(self.content)), at_s)


def test_a_transfer_sends_what_was_offered(greeted: Line) -> None:
    slot = Slot(greeted)
    greeted.peer.offer(OFFER)
    slot.run(1)
    assert slot.content == CONTENT
    assert slot.events == [Moved(0, len(CONTENT)), Ended("staged", OFFER.file_digest)]


def test_a_transfer_goes_on_where_the_microcontroller_says(greeted: Line) -> None:
    slot = Slot(greeted, CONTENT[:448])
    greeted.peer.offer(OFFER)
    slot.run(1)
    assert slot.events == [Moved(448, len(CONTENT)), Ended("staged", OFFER.file_digest)]


def test_a_question_without_an_answer_is_asked_again_in_smaller_pieces(greeted: Line) -> None:
    slot = Slot(greeted)
    greeted.peer.offer(OFFER)
    slot.run(9, deaf=lambda message: isinstance(message, wire.TransferChunk) and len(message.data) > 32)
    assert slot.content[:32] == CONTENT[:32]
    assert not any(isinstance(event, Ended) for event in slot.events)


def test_a_start_in_the_middle_begins_the_transfer_again(greeted: Line) -> None:
    greeted.peer.offer(OFFER)
    greeted.peer.tick(0.0)
    greeted.say(status(wire.Phase.RECEIVING, 224), 0.1)
    assert [m.offset for m in greeted.hear() if isinstance(m, wire.TransferChunk)] == [224]
    greeted.say(hello(2), 2.0)
    slot = Slot(greeted, CONTENT[:32])
    slot.run(1)
    assert Ended("staged", OFFER.file_digest) in slot.events


def test_a_model_that_runs_is_staged_though_that_was_never_heard(greeted: Line) -> None:
    greeted.peer.offer(OFFER)
    greeted.peer.tick(0.0)
    trial = hello(2, file_digest=DIGEST, standing=wire.Standing.TRIAL)
    assert greeted.say(trial, 2.0) == [Ended("staged", OFFER.file_digest), Came(trial)]
    greeted.hear()
    greeted.peer.tick(9.0)
    assert not any(isinstance(message, wire.TransferBegin) for message in greeted.hear())


@pytest.mark.parametrize(
    ("cause", "state"),
    [(wire.Cause.NOT_NEWER, "refused"), (wire.Cause.TOO_LARGE, "refused"), (wire.Cause.DIGEST, "failed")],
)
def test_a_refusal_ends_the_transfer(greeted: Line, cause: wire.Cause, state: str) -> None:
    greeted.peer.offer(OFFER)
    (ended,) = greeted.say(status(wire.Phase.REFUSED, cause=cause))
    assert isinstance(ended, Ended)
    assert (ended.state, ended.file_digest) == (state, OFFER.file_digest)


def test_a_microcontroller_that_never_has_enough_ends_the_transfer(greeted: Line) -> None:
    greeted.peer.offer(OFFER)
    ends: list[mcu.Event] = []
    for step in range(5000):
        ends += greeted.say(status(wire.Phase.RECEIVING, 32 * (step % 2)), 0.001 * step)
        ends += greeted.peer.tick(0.001 * step)
        greeted.hear()
    assert [event for event in ends if isinstance(event, Ended)] == [Ended("failed", OFFER.file_digest, "no progress")]


frames = st.one_of(
    st.binary(max_size=300),
    st.sampled_from(
        [
            encode(hello(boot), 1) for boot in (1, 2)
        ]
        + [encode(report(number), number) for number in (1, 2, 3)]
        + [encode(status(phase, 96), 1) for phase in wire.Phase]
        + [encode(wire.Ack(sequence=sequence), 1) for sequence in range(4)]
        + [encode(wire.Reply(transaction=7, outcome=wire.Outcome.OK, uptime_ms=2**64 - 1), 3)]
        + [encode(wire.TransferConfirm(number=1, file_digest=DIGEST, sequence=3, standing=wire.Standing.REVERTED), 3)]
    ),
)  # fmt: skip


@given(st.lists(st.tuples(frames, st.floats(0, 20)), max_size=60), st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_whatever_a_line_brings_no_more_is_said_than_asked_for_and_nothing_is_raised(
    pieces: list[tuple[bytes, float]], size: int
) -> None:
    peer = Peer(lambda: NOW_MS)
    peer.offer(OFFER)
    peer.ask(7, wire.Order.PING)
    ears, at_s = Decoder("gateway"), 0.0
    for piece, wait_s in pieces:
        at_s += wait_s
        for start in range(0, len(piece), size):
            peer.feed(piece[start : start + size], at_s)
        peer.tick(at_s)
        ears.feed(peer.output())
    assert (ears.damaged, ears.refused) == (0, 0)
