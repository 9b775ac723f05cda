"""The C99 library on this machine, under AddressSanitizer and UndefinedBehaviorSanitizer, driven byte for byte.

Every test checks, when its microcontroller ends, that no sanitizer had anything to say, and everything that the C wrote
onto the line is written again by the Python codec, to the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.contract import scores as rule
from firmware_bridge import c99
from firmware_bridge.link import messages
from firmware_bridge.link.codec import Decoder, Received, encode
from firmware_bridge.link.messages import (
    Ack,
    Alert,
    Cause,
    Clock,
    Command,
    Health,
    Hello,
    Message,
    Order,
    Outcome,
    Phase,
    Reply,
    Report,
    Standing,
    TransferBegin,
    TransferChunk,
    TransferConfirm,
    TransferEnd,
    TransferStatus,
    Welcome,
)
from tests.firmware_bridge import firmware
from tests.firmware_bridge.firmware import CLASSES, DETECTORS, FEATURES, FIRMWARE, Microcontroller
from tests.simulators import needs

M = TypeVar("M", bound=Message)

BUILT_IN, SLOT_A, SLOT_B = 2, 0, 1
CLEAN, FLAGGED, NOT_CHECKED = 0, 1, 2
PAGE = 256
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return firmware.write(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return firmware.build(folder, "harness.c", "-DEDGEGUARD_CHECKPOINT_PAGES=1U")


class Gateway:
    """The other end of the line: greets, hears, and may acknowledge."""

    def __init__(self, mcu: Microcontroller) -> None:
        self.mcu = mcu
        self._decoder = Decoder("mcu")
        self._sequence = 0
        self.heard: list[Received] = []

    def hear(self) -> list[Received]:
        line = self.mcu.sent()
        found = self._decoder.feed(line)
        written = b"".join(encode(message, sequence) for sequence, message in found)
        assert [part for part in line.split(b"\0") if part] == [part for part in written.split(b"\0") if part]
        self.heard += found
        return found

    def say(self, message: Message) -> None:
        self._sequence += 1
        self.mcu.receive(encode(message, self._sequence))

    def only(self, kind: type[M]) -> list[M]:
        return [message for _, message in self.heard if isinstance(message, kind)]

    def wait(self, ms: int, *, acknowledge: bool = True) -> None:
        """Let time pass, as a gateway does that is there and says so every ten seconds."""
        for start in range(0, ms, 100):
            self.mcu.wait(min(100, ms - start), step=100)
            for sequence, message in self.hear():
                if acknowledge and message.RELIABLE:
                    self.say(Ack(sequence=sequence))
            if start % 10_000 == 9900:
                self.say(Clock(unix_ms=1_800_000_000_000 + self.mcu.now))

    def greet(self, boot: int = 1) -> None:
        self.mcu.wait(50)
        self.hear()
        self.say(Welcome(schema=messages.SCHEMA, boot=boot, unix_ms=1_800_000_000_000))
        self.heard.clear()


Start = Callable[..., Gateway]


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Start:
    def begin(**keywords: int) -> Gateway:
        return Gateway(Microcontroller(program, tmp_path / "flash", **keywords))

    return begin


def floats(values: Sequence[float]) -> str:
    return struct.pack(f"<{len(values)}f", *values).hex()


def observe(
    gateway: Gateway, score: float, *, label: int = 0, features: Sequence[float] = (0.0,) * FEATURES, us: int = 10
) -> int:
    return int(gateway.mcu.call("o", label, floats((score, *(0.0,) * (DETECTORS - 1))), floats(features), us)[0])


# -- verdict


scores = st.floats(width=32) | st.sampled_from([1.0, NAN, INFINITY, -INFINITY, -0.0, *map(np.float32, rule.EDGES)])


def test_the_verdict_and_the_bin_are_those_of_every_other_device(start: Start) -> None:
    with start().mcu as mcu:

        @settings(max_examples=150, deadline=None)
        @given(st.tuples(scores, scores))
        def check(pair: tuple[float, float]) -> None:
            status, _, bin_of = (int(n) for n in mcu.call("j", 0, floats(pair), floats((0.0,) * FEATURES)))
            joint = rule.joint(pair)
            if math.isnan(joint):
                assert status == NOT_CHECKED
            else:
                assert status == (FLAGGED if rule.is_flagged(joint) else CLEAN)
                assert bin_of == rule.bin_of(joint)

        check()


@pytest.mark.parametrize(
    ("label", "feature", "expected"),
    [
        (0, 1e14, CLEAN),
        (0, 1.1e15, NOT_CHECKED),
        (0, -1.1e15, NOT_CHECKED),
        (0, INFINITY, NOT_CHECKED),
        (0, NAN, NOT_CHECKED),
        (CLASSES - 1, 0.0, CLEAN),
        (CLASSES, 0.0, NOT_CHECKED),
        (-1, 0.0, NOT_CHECKED),
    ],
)
def test_what_scores_cannot_speak_about_is_not_checked(start: Start, label: int, feature: float, expected: int) -> None:
    with start().mcu as mcu:
        answer = mcu.call("j", label, floats((0.5, 0.5)), floats((0.0, feature, *(0.0,) * (FEATURES - 2))))
        assert int(answer[0]) == expected


def test_the_predicted_class_is_the_first_of_the_largest(start: Start) -> None:
    with start().mcu as mcu:

        @settings(max_examples=60, deadline=None)
        @given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12))
        def check(values: list[float]) -> None:
            raw = struct.pack(f"<{len(values)}f", *values)
            expected = [np.frombuffer(raw, dtype=kind).argmax() for kind in (np.int8, np.uint8, np.float32)]
            assert [int(n) for n in mcu.call("m", len(values), raw.hex())] == expected

        check()


def test_a_deviation_is_counted_in_whole_steps_of_what_alone_would_flag(start: Start) -> None:
    with start().mcu as mcu:

        @settings(max_examples=150, deadline=None)
        @given(st.floats(-200, 200, width=32))
        def check(feature: float) -> None:
            bits = struct.unpack("<I", struct.pack("<f", feature))[0]
            steps = int(mcu.call("e", 0, bits, 0)[0])
            limited = max(-32767.0, min(32767.0, feature * messages.UNIT))
            assert abs(steps - limited) <= 1 + abs(limited) / (1 << 15)

        check()


# -- session


def test_it_says_hello_every_second_until_it_is_welcome(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.wait(2500)
        hellos = gateway.only(Hello)
        assert len(hellos) == 3 == len(gateway.heard)
        assert hellos[0] == Hello(
            schema=messages.SCHEMA,
            boot=1,
            name="mcu-1",
            board="host",
            library="1.0",
            detectors="linf,l1",
            model_digest=FIRMWARE.model_digest,
            guard_digest=FIRMWARE.guard_digest,
            file_digest=FIRMWARE.file_digest,
            sequence=5,
            slot_bytes=8192,
            standing=Standing.CONFIRMED,
        )
        gateway.greet()
        gateway.wait(4000)
        assert not gateway.only(Hello)
        assert gateway.only(Health)


@pytest.mark.parametrize(("schema", "boot"), [(messages.SCHEMA ^ 1, 1), (messages.SCHEMA, 2)])
def test_a_gateway_of_another_schema_or_start_hears_nothing_but_hello(start: Start, schema: int, boot: int) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.say(Welcome(schema=schema, boot=boot, unix_ms=1))
        gateway.say(Command(transaction=1, order=Order.PING))
        gateway.wait(1500)
        assert {type(message) for _, message in gateway.heard} == {Hello}


def test_after_half_a_minute_of_silence_it_says_hello_again(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        gateway.mcu.wait(29_000, step=500)
        gateway.say(Clock(unix_ms=1_800_000_029_000))
        gateway.mcu.wait(29_000, step=500)
        gateway.hear()
        assert not gateway.only(Hello)
        gateway.mcu.wait(3000, step=500)
        gateway.hear()
        assert gateway.only(Hello)


def test_health_is_the_heartbeat_and_says_what_came_damaged(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        observe(gateway, 0.5, us=77)
        observe(gateway, NAN)
        gateway.mcu.receive(b"\x05abc\0")
        gateway.wait(11_000)
        healths = gateway.only(Health)
        assert len(healths) == 3
        last = healths[-1]
        assert (last.inputs, last.unchecked, last.lost, last.damaged, last.inference_us) == (2, 1, 0, 1, 10)


# -- reports and alerts


def test_a_window_becomes_a_report_whose_counts_add_up(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        for score, label in [(0.05, 3), (0.95, 3), (1.0, 4), (1.5, 4), (70.0, 4), (NAN, 4), (-1.0, 3)]:
            observe(gateway, score, label=label)
        gateway.wait(61_000)
        (report,) = gateway.only(Report)
        assert (report.inputs, report.unchecked) == (7, 1)
        assert [(c.label, c.inputs, c.flagged) for c in report.labels] == [(3, 3, 0), (4, 3, 2)]
        histogram = [0] * rule.BINS
        for score in (0.05, 0.95, 1.0, 1.5, 70.0, -1.0):
            histogram[rule.bin_of(score)] += 1
        assert list(report.histogram) == histogram
        assert 1_799_999_999_000 < report.started_ms < report.ended_ms < 1_800_000_061_000


def test_a_report_is_repeated_five_times_and_again_after_a_new_hello(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        observe(gateway, 0.5)
        gateway.say(Command(transaction=1, order=Order.REPORT))
        gateway.wait(50)
        gateway.heard.clear()
        gateway.wait(5000, acknowledge=False)
        reports = gateway.only(Report)
        assert len(reports) == 5
        assert len({(sequence, m) for sequence, m in gateway.heard if isinstance(m, Report)}) == 1
        assert gateway.only(Hello)
        gateway.greet()
        gateway.wait(200)
        assert gateway.only(Report) == reports[:1]
        gateway.heard.clear()
        gateway.wait(3000)
        assert not gateway.only(Report)


def test_a_window_ends_before_a_label_that_it_has_no_room_for(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        for label in range(CLASSES):
            observe(gateway, 0.5, label=label)
        gateway.wait(100)
        gateway.wait(61_000)
        first, second = gateway.only(Report)
        assert [count.label for count in (*first.labels, *second.labels)] == list(range(CLASSES))


def test_inputs_that_no_report_could_hold_are_counted_as_lost(start: Start) -> None:
    gateway = start()  # nobody welcomes it
    with gateway.mcu:
        for _ in range(3):
            for label in range(CLASSES):
                observe(gateway, 0.5, label=label)
        gateway.greet()
        gateway.wait(62_000)
        held = sum(report.inputs for report in gateway.only(Report))
        health = gateway.only(Health)[-1]
        assert health.inputs == 3 * CLASSES
        assert health.lost == 3 * CLASSES - held > 0


def test_a_flagged_input_is_an_alert_at_once_but_not_more_than_one_in_ten_seconds(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        for _ in range(3):
            assert observe(gateway, 2.5, label=7) == FLAGGED
        gateway.wait(100)
        (alert,) = gateway.only(Alert)
        assert (alert.label, alert.scores) == (7, (2.5, 0.0))
        gateway.wait(10_000)
        observe(gateway, 3.5)
        gateway.wait(6000)
        assert [a.scores[0] for a in gateway.only(Alert)] == [2.5, 3.5]
        assert gateway.only(Health)[-1].alerts_lost == 2


def test_the_channels_that_flagged_inputs_moved_are_named(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        observe(gateway, 2.0, label=9, features=(0, 0, 0, 0, 0, 9.0))
        for _ in range(4):
            observe(gateway, 2.0, label=3, features=(0.0, 2.0, 0.0, -1.0, 0.0, 0.0))
        observe(gateway, 0.5, label=3, features=(50.0,) * FEATURES)
        gateway.wait(61_000)
        (report,) = gateway.only(Report)
        assert (report.evidence_label, report.evidence) == (3, 3)
        assert {(c.channel, c.inputs, c.excess) for c in report.channels} == {(1, 3, 2.0), (3, 3, -1.0)}


# -- commands


def test_a_command_is_executed_once_and_its_reply_is_repeated(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        observe(gateway, 0.5)
        for _ in range(2):
            gateway.say(Command(transaction=77, order=Order.REPORT))
            gateway.wait(200)
        gateway.wait(200)
        assert {reply.transaction for reply in gateway.only(Reply)} == {77}
        assert {reply.outcome for reply in gateway.only(Reply)} == {Outcome.OK}
        assert len(gateway.only(Report)) == 1
        observe(gateway, 0.5)
        gateway.say(Command(transaction=77, order=Order.REPORT))
        gateway.wait(1000)
        assert len(gateway.only(Report)) == 1


def test_it_restarts_once_its_reply_has_arrived(start: Start) -> None:
    gateway = start()
    with gateway.mcu as mcu:
        gateway.greet()
        gateway.say(Command(transaction=1, order=Order.RESTART))
        gateway.wait(300, acknowledge=False)
        assert gateway.only(Reply)
        assert not mcu.restarts
        gateway.wait(500)
        gateway.wait(50)
        assert mcu.restarts


# -- hand-over of a model


SLOT_BYTES = 8192
MODEL = bytes(np.random.default_rng(0).integers(0, 256, 1500, dtype=np.uint8))
DIGEST = hashlib.sha256(MODEL).digest()


def begin(content: bytes = MODEL, *, digest: bytes | None = None, sequence: int = 6) -> TransferBegin:
    found = hashlib.sha256(content).digest() if digest is None else digest
    return TransferBegin(
        file_digest=found, model_digest=b"m" * 32, guard_digest=b"g" * 32, sequence=sequence, size=len(content)
    )


def ask(gateway: Gateway, message: Message) -> TransferStatus | None:
    """The answer to one step of a transfer; None where the power went."""
    gateway.hear()
    before = len(gateway.only(TransferStatus))
    gateway.say(message)
    gateway.hear()
    answers = gateway.only(TransferStatus)
    return answers[-1] if len(answers) > before else None


def hand_over(gateway: Gateway, content: bytes = MODEL, *, sequence: int = 6) -> TransferStatus | None:
    """All of a transfer, as a gateway does it."""
    first = begin(content, sequence=sequence)
    status = ask(gateway, first)
    while status is not None and status.phase is Phase.RECEIVING and status.offset < len(content):
        chunk = content[status.offset : status.offset + messages.CHUNK]
        status = ask(gateway, TransferChunk(offset=status.offset, data=chunk))
    if status is None or status.phase is not Phase.RECEIVING:
        return status
    status = ask(gateway, TransferEnd(file_digest=first.file_digest))
    for _ in range(50):
        if status is None or status.phase is not Phase.VERIFYING:
            break
        gateway.mcu.wait(10, step=10)
        gateway.hear()
        status = ask(gateway, TransferEnd(file_digest=first.file_digest))
    return status


def runs(gateway: Gateway) -> tuple[int, bool]:
    place, trial = gateway.mcu.call("s")
    return int(place), trial == "1"


def test_a_model_is_taken_run_on_trial_and_confirmed(start: Start) -> None:
    gateway = start()
    with gateway.mcu as mcu:
        gateway.greet()
        status = hand_over(gateway)
        assert status is not None
        assert status.phase is Phase.STAGED
        assert {told.file_digest for told in gateway.only(TransferStatus)} == {DIGEST}
        assert runs(gateway) == (BUILT_IN, False)
        gateway.wait(1000)
        assert mcu.restarts
    second = start(boot=2)
    with second.mcu as mcu:
        assert runs(second) == (SLOT_A, True)
        second.mcu.wait(50)
        second.hear()
        hello = second.only(Hello)[-1]
        assert (hello.file_digest, hello.model_digest, hello.guard_digest) == (DIGEST, b"m" * 32, b"g" * 32)
        assert (hello.sequence, hello.standing) == (6, Standing.TRIAL)
        second.greet(boot=2)
        mcu.call("c", 1)
        second.wait(500)
        (confirm,) = second.only(TransferConfirm)
        assert (confirm.standing, confirm.file_digest, confirm.sequence) == (Standing.CONFIRMED, DIGEST, 6)
    third = start(boot=3)
    with third.mcu:
        assert runs(third) == (SLOT_A, False)
        third.greet(boot=3)
        newer = MODEL[::-1]
        status = hand_over(third, newer, sequence=7)
        assert status is not None
        assert status.phase is Phase.STAGED
    fourth = start(boot=4)
    with fourth.mcu:
        assert runs(fourth) == (SLOT_B, True)


@pytest.mark.parametrize("told", [True, False], ids=["self-test failed", "power lost on trial"])
def test_a_model_that_is_not_confirmed_is_left_for_the_former_one(start: Start, told: bool) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        hand_over(gateway)
    trial = start(boot=2)
    with trial.mcu as mcu:
        assert runs(trial) == (SLOT_A, True)
        if told:
            mcu.call("c", 0)
            mcu.wait(50)
            assert mcu.restarts
    after = start(boot=3)
    with after.mcu:
        assert runs(after) == (BUILT_IN, False)
        after.greet(boot=3)
        after.wait(500)
        (confirm,) = after.only(TransferConfirm)
        assert (confirm.standing, confirm.file_digest, confirm.sequence) == (Standing.REVERTED, DIGEST, 6)


@pytest.mark.parametrize("operation", [1, 2], ids=["erasing", "writing"])
def test_power_lost_while_a_trial_is_noted_leaves_it_to_the_next_start(start: Start, operation: int) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        hand_over(gateway)
    cut = start(boot=2, stop_after=operation)
    with cut.mcu as mcu:
        assert mcu.died
    after = start(boot=3)
    with after.mcu:
        assert runs(after) == (SLOT_A, True)


@pytest.mark.parametrize("size", [1, 55, 56, 63, 64, 119, 224, 255, 256, 257, 8192])
def test_a_model_of_any_size_has_its_digest(start: Start, size: int) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        status = hand_over(gateway, bytes(n * 7 & 255 for n in range(size)))
        assert status is not None
        assert status.phase is Phase.STAGED


def test_a_chunk_out_of_place_is_answered_and_not_written(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        ask(gateway, begin())
        for offset, data in [(224, MODEL[:224]), (0, MODEL[:100]), (0, b""), (2**32 - 1, MODEL[:224])]:
            status = ask(gateway, TransferChunk(offset=offset, data=data))
            assert status is not None
            assert (status.phase, status.offset) == (Phase.RECEIVING, 0)
        status = ask(gateway, TransferEnd(file_digest=DIGEST))
        assert status is not None
        assert status.phase is Phase.RECEIVING
        status = hand_over(gateway)
        assert status is not None
        assert status.phase is Phase.STAGED


@pytest.mark.parametrize(
    ("offer", "cause"),
    [
        (begin(sequence=5), Cause.NOT_NEWER),
        (begin(b""), Cause.TOO_LARGE),
        (begin(bytes(8193)), Cause.TOO_LARGE),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_with_the_cause(
    start: Start, offer: TransferBegin, cause: Cause
) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        status = ask(gateway, offer)
        assert status is not None
        assert (status.phase, status.cause, status.file_digest) == (Phase.REFUSED, cause, offer.file_digest)


def test_bytes_without_the_digest_that_was_announced_never_run(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        ask(gateway, begin(digest=b"\x55" * 32))
        for offset in range(0, len(MODEL), messages.CHUNK):
            ask(gateway, TransferChunk(offset=offset, data=MODEL[offset : offset + messages.CHUNK]))
        ask(gateway, TransferEnd(file_digest=b"\x55" * 32))
        gateway.wait(500)
        last = gateway.only(TransferStatus)[-1]
        assert (last.phase, last.cause) == (Phase.REFUSED, Cause.DIGEST)
    with start(boot=2).mcu as mcu:
        assert mcu.call("s") == [str(BUILT_IN), "0"]


def test_new_firmware_runs_its_own_model_and_takes_others_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        hand_over(gateway)
    trial = start(boot=2)
    with trial.mcu as mcu:
        mcu.call("c", 1)
        assert runs(trial) == (SLOT_A, False)
    monkeypatch.setenv("BUILT_IN", "0x77")
    flashed = start(boot=3)
    with flashed.mcu:
        flashed.mcu.wait(50)
        flashed.hear()
        hello = flashed.only(Hello)[-1]
        assert (hello.sequence, hello.standing, hello.file_digest[0]) == (5, Standing.CONFIRMED, 0x77)
        flashed.greet(boot=3)
        status = hand_over(flashed, MODEL[::-1])
        assert status is not None
        assert status.phase is Phase.STAGED
    again = start(boot=4)
    with again.mcu as mcu:
        assert runs(again) == (SLOT_A, True)
        mcu.call("c", 1)
    with start(boot=5).mcu as mcu:
        assert mcu.call("s") == [str(SLOT_A), "0"]
    monkeypatch.delenv("BUILT_IN")
    with start(boot=6).mcu as mcu:
        assert mcu.call("s") == [str(BUILT_IN), "0"]


def test_new_firmware_leaves_a_trial_of_the_former_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        hand_over(gateway)
    monkeypatch.setenv("BUILT_IN", "0x77")
    with start(boot=2).mcu as mcu:
        assert mcu.call("s") == [str(BUILT_IN), "0"]


def test_a_second_offer_during_a_trial_waits(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        hand_over(gateway)
    trial = start(boot=2)
    with trial.mcu:
        trial.greet(boot=2)
        status = ask(trial, begin(b"another", sequence=9))
        assert status is not None
        assert (status.phase, status.cause) == (Phase.REFUSED, Cause.ON_TRIAL)


def test_a_transfer_goes_on_where_the_power_went(start: Start) -> None:
    gateway = start()
    with gateway.mcu:
        gateway.greet()
        ask(gateway, begin())
        for offset in range(0, 1344, messages.CHUNK):
            ask(gateway, TransferChunk(offset=offset, data=MODEL[offset : offset + messages.CHUNK]))
    again = start(boot=2)
    with again.mcu:
        again.greet(boot=2)
        status = ask(again, begin())
        assert status is not None
        assert 2 * PAGE <= status.offset <= 1344
        status = hand_over(again)
        assert status is not None
        assert status.phase is Phase.STAGED


def test_power_lost_at_any_moment_leaves_a_whole_model_and_the_next_try_succeeds(program: Path, tmp_path: Path) -> None:
    cuts = 0
    for stop_after in range(1, 200):
        flash = tmp_path / f"flash{stop_after}"
        gateway = Gateway(Microcontroller(program, flash, stop_after=stop_after))
        with gateway.mcu as mcu:
            gateway.greet()
            hand_over(gateway)
            died = mcu.died
        if not died:
            break
        cuts += 1
        again = Gateway(Microcontroller(program, flash, boot=2))
        with again.mcu:
            place, trial = runs(again)
            assert (place, trial) in {(BUILT_IN, False), (SLOT_A, True)}
            if not trial:
                again.greet(boot=2)
                status = hand_over(again)
                assert status is not None
                assert status.phase is Phase.STAGED
        last = Gateway(Microcontroller(program, flash, boot=3))
        with last.mcu:
            assert runs(last) in {(SLOT_A, True), (BUILT_IN, False)}
        content = flash.read_bytes()[: len(MODEL)]
        assert content == MODEL
    assert cuts > 20


def test_power_lost_at_any_moment_of_the_second_hand_over_leaves_the_first_or_the_second_model(
    program: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    gateway = Gateway(Microcontroller(program, first))
    with gateway.mcu:
        gateway.greet()
        hand_over(gateway)
    with Microcontroller(program, first, boot=2) as mcu:
        mcu.call("c", 1)
    newer, cuts = MODEL[::-1], 0
    for stop_after in range(1, 200):
        flash = tmp_path / f"flash{stop_after}"
        flash.write_bytes(first.read_bytes())
        gateway = Gateway(Microcontroller(program, flash, boot=3, stop_after=stop_after))
        with gateway.mcu as mcu:
            gateway.greet(boot=3)
            hand_over(gateway, newer, sequence=7)
            died = mcu.died
        if not died:
            break
        cuts += 1
        again = Gateway(Microcontroller(program, flash, boot=4))
        with again.mcu:
            place = runs(again)
            assert place in {(SLOT_A, False), (SLOT_B, True)}
            if place == (SLOT_A, False):
                again.greet(boot=4)
                status = hand_over(again, newer, sequence=7)
                assert status is not None
                assert status.phase is Phase.STAGED
        content = flash.read_bytes()
        assert content[: len(MODEL)] == MODEL
        assert content[SLOT_BYTES : SLOT_BYTES + len(MODEL)] == newer
    assert cuts > 20


@pytest.mark.parametrize(
    ("score", "printed"), [("0", "0 2 1"), ("3", "0 2 1"), ("nan", "1 0 0")], ids=["clean", "flagged", "not checked"]
)
def test_the_example_leaves_a_model_that_checks_nothing_and_counts_inputs_that_it_does_not_run_on(
    folder: Path, tmp_path: Path, score: str, printed: str
) -> None:
    example = tmp_path / "main.o"
    compiler = needs.program("gcc", "gcc libc6-dev")
    options = [*firmware.WARNINGS, *firmware.SANITIZERS, f"-I{folder}"]
    source = str(folder / "main.c")
    subprocess.run([compiler, *options, "-Dmain=example_main", "-c", source, "-o", str(example)], check=True)
    program = firmware.build(folder, "example.c", str(example))
    done = subprocess.run([str(program), score], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.strip() == printed


# -- frames, and the export


def test_c_reads_the_golden_frames(start: Start) -> None:
    frames = json.loads((Path(__file__).parent / "golden_frames.json").read_text())["frames"].values()
    with start().mcu as mcu:
        assert mcu.call("d", "".join(frames)) == [str(len(frames)), "0"]


def test_c_and_python_count_the_same_frames_on_a_bad_line(start: Start) -> None:
    frames = json.loads((Path(__file__).parent / "golden_frames.json").read_text())["frames"].values()
    clean = b"".join(bytes.fromhex(frame) for frame in frames)
    random = np.random.default_rng(1)
    with start().mcu as mcu:
        for _ in range(25):
            line = bytearray()
            for byte in clean:
                what = random.choice(4, p=(0.99, 0.004, 0.003, 0.003))
                line += (
                    bytes((byte ^ 1 << int(random.integers(8)),)) if what == 1 else bytes((byte,)) * (1, 0, 0, 2)[what]
                )
            line += random.integers(0, 256, 60, dtype=np.uint8).tobytes() + b"\0"
            decoder = Decoder()
            intact = len(decoder.feed(bytes(line))) + decoder.refused
            assert [int(n) for n in mcu.call("d", line.hex())] == [intact, decoder.damaged]


def test_every_source_compiles_without_a_warning(folder: Path, tmp_path: Path) -> None:
    compiler = needs.program("gcc", "gcc libc6-dev")
    sources = sorted(map(str, folder.glob("*.c")))
    assert len(sources) == len(c99.SOURCES) + 3
    for source in sources:
        subprocess.run([compiler, *firmware.WARNINGS, "-O2", "-c", source, "-o", str(tmp_path / "x.o")], check=True)


def test_the_operators_are_named_as_tflite_micro_names_them() -> None:
    names = ("CONV_2D", "DEPTHWISE_CONV_2D", "REDUCE_MAX", "BATCH_MATMUL", "RELU6")
    header = c99.files(dataclasses.replace(FIRMWARE, operators=names))["edgeguard_operators.h"]
    assert "#define EDGEGUARD_OPERATORS 5" in header
    for name in ("AddConv2D()", "AddDepthwiseConv2D()", "AddReduceMax()", "AddBatchMatMul()", "AddRelu6()"):
        assert name in header


def test_text_from_a_model_cannot_leave_its_string() -> None:
    source = c99.files(dataclasses.replace(FIRMWARE, detectors=('a"; evil(); "',)))["edgeguard_model.c"]
    assert '"a___evil_____"' in source
