"""What is accepted, what is rejected and why, and what may be acknowledged."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.contract import topics
from edgeguard.contract.messages import MAX_GAPS, MAX_PAYLOAD, Ack, Alert, LabelCount, Message, Report, encode
from edgeguard.hub.ingest import MAX_WINDOW, Accepted, Acks, Device, ModelShape, Rejected, Stream, read
from tests.simulators import fleet

MODELS = {fleet.MODEL: ModelShape(width=fleet.WIDTH, classes=2)}


def receive(payload: bytes, channel: str = topics.REPORT, *, models: Any = MODELS) -> Accepted | Rejected:
    return read(f"edgeguard/v1/test/d1/{channel}", payload, fleet="test", models=models)


def changed(**fields: Any) -> bytes:
    return encode(msgspec.structs.replace(fleet.report(seq=7), **fields))


def with_evidence(**fields: Any) -> bytes:
    first = fleet.report().evidence[0]
    return changed(evidence=(msgspec.structs.replace(first, **fields),))


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        (topics.REPORT, fleet.report()),
        (topics.REPORT, fleet.report(unchecked=5)),
        (topics.REPORT, fleet.report(counts=((0, 10, 10),))),
        (topics.REPORT, fleet.report(counts=())),
        (topics.REPORT, fleet.report(counts=((-1, 10, 2),), model=fleet.OTHER, width=9)),
        (topics.STATUS, fleet.status()),
        (topics.BIRTH, fleet.birth()),
        (topics.MODEL_REPORTED, fleet.reported("running")),
    ],
)
def test_a_message_that_holds_together_is_accepted(channel: str, message: Message) -> None:
    item = receive(encode(message), channel)
    assert isinstance(item, Accepted)
    assert item.message == message


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (changed(inputs=31), "sum over labels"),
        (changed(unchecked=1), "sum over labels"),
        (changed(histogram=(30, *[0] * 19)), "above 1 in the histogram"),
        (changed(histogram=(28, *[0] * 18, 1)), "histogram does not count"),
        (changed(labels=(*fleet.report().labels, fleet.report().labels[0])), "counted twice"),
        (changed(labels=(LabelCount(label=0, inputs=30, flagged=31),)), "more flagged inputs than inputs"),
        (encode(fleet.report(counts=((2, 10, 1),))), "label that the model does not have"),
        (encode(fleet.report(counts=((-1, 10, 1),))), "label that the model does not have"),
        (encode(fleet.report(width=5)), "features of width {5}"),
        (encode(fleet.report(counts=((0, MAX_WINDOW + 1, 1),))), "inputs in one window"),
        (changed(evidence=fleet.report().evidence * 2), "stands twice"),
        (with_evidence(label=1), "more inputs than were counted"),
        (with_evidence(flagged=2), "more inputs than were counted"),
        (with_evidence(unflagged=10), "more inputs than were counted"),
        (with_evidence(unflagged=0), "do not match their count"),
        (with_evidence(unflagged_mean=()), "do not match their count"),
        (with_evidence(unflagged_std=(0.5,)), "do not match their count"),
        (with_evidence(unflagged_std=(0.5, 0.5, 0.5, -0.5)), "negative"),
        (with_evidence(flagged_mean=(1.0,)), "unequal"),
        (with_evidence(flagged_mean=()), "unequal"),
        (with_evidence(flagged_mean=(1.0, 2.0, 3.0, 1e300)), "finite float32"),
        (encode(fleet.report()).replace(b"7.0", b"1e999"), ""),
        (encode(fleet.report()).replace(b'"v":1', b'"v":2'), "version 2"),
        (encode(fleet.report()).replace(fleet.MODEL.encode(), b"x"), "model_digest"),
        (b"", ""),
        (b"\xff", ""),
        (b"[" * 100_000, ""),
        (b"[]", ""),
        (b"x" * (MAX_PAYLOAD + 1), "bytes"),
    ],
)
def test_a_report_that_does_not_hold_together_is_rejected_with_the_rule(payload: bytes, reason: str) -> None:
    item = receive(payload)
    assert isinstance(item, Rejected)
    assert reason in item.reason
    assert len(item.head) <= 256


def test_features_of_an_unknown_model_may_have_any_width() -> None:
    assert isinstance(receive(encode(fleet.report(width=9)), models={}), Accepted)


@pytest.mark.parametrize("payload", [changed(inputs=31), changed(inputs=31).replace(b'"v":1', b'"v":2')])
def test_a_rejected_report_is_known_by_its_seq(payload: bytes) -> None:
    item = receive(payload)
    assert isinstance(item, Rejected)
    assert item.identity == ("d1", fleet.BOOT, 7)


@pytest.mark.parametrize("payload", [b"", b"{", b'{"boot":"x","seq":1}', b'{"boot":"00000000000000ab","seq":0}'])
def test_without_a_readable_seq_there_is_nothing_to_acknowledge(payload: bytes) -> None:
    item = receive(payload)
    assert isinstance(item, Rejected)
    assert item.identity is None


def test_a_status_has_no_seq_to_acknowledge() -> None:
    item = receive(encode(fleet.report()).replace(b'"v":1', b'"v":2'), topics.STATUS)
    assert isinstance(item, Rejected)
    assert item.identity is None


@pytest.mark.parametrize(
    "topic",
    ["", "x", "edgeguard/v1/other/d1/report", "edgeguard/v1/test/d1/ack", "edgeguard/v1/test/D1/report",
     "edgeguard/v1/test/d1", "edgeguard/v1/test/d1/report/more", "edgeguard/v2/test/d1/report", "a/" * 40_000],
)  # fmt: skip
def test_other_topics_are_rejected(topic: str) -> None:
    item = read(topic, encode(fleet.report()), fleet="test", models={})
    assert isinstance(item, Rejected)
    assert len(item.topic) <= 512
    assert item.identity is None


@pytest.mark.parametrize("score", [b"1e999", b"NaN"])
def test_an_alert_needs_a_number_as_score(score: bytes) -> None:
    alert = Alert(
        boot=fleet.BOOT,
        seq=1,
        model_digest=fleet.MODEL,
        guard_digest=fleet.GUARD,
        at_ms=1,
        label=0,
        score=2.5,
        scores={},
    )
    assert isinstance(receive(encode(alert), topics.ALERT), Accepted)
    assert isinstance(receive(encode(alert).replace(b"2.5", score), topics.ALERT), Rejected)


@given(st.text(max_size=80), st.binary(max_size=200), st.sampled_from([*topics.DEVICE_CHANNELS, "ack"]))
def test_bytes_from_outside_never_raise(topic: str, payload: bytes, channel: str) -> None:
    assert isinstance(receive(payload, channel), Rejected)
    assert isinstance(read(topic, payload, fleet="test", models={}), Rejected)


@given(st.data())
def test_a_report_with_any_damage_is_rejected_or_adds_up(data: st.DataObject) -> None:
    content = bytearray(encode(fleet.report()))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    item = receive(bytes(content))
    if isinstance(item, Accepted):
        assert isinstance(item.message, Report)
        assert sum(c.inputs for c in item.message.labels) + item.message.unchecked == item.message.inputs


class TestStream:
    @given(st.lists(st.integers(1, 60), max_size=120))
    def test_each_seq_is_new_once_and_acknowledged_from_then_on(self, arrivals: list[int]) -> None:
        stream, seen = Stream(), set[int]()
        for seq in arrivals:
            new, stream = stream.take(seq)
            assert new == (seq not in seen)
            seen.add(seq)
        ack = stream.ack(fleet.BOOT)
        assert {n for n in range(1, ack.through_seq + 1) if n not in ack.gaps} == seen

    def test_a_gap_of_any_length_fits_an_ack(self) -> None:
        _, stream = Stream().take(2**53)
        assert len(stream.gaps) == MAX_GAPS
        assert stream.gaps[-1] == 2**53 - 1

    def test_what_a_device_still_holds_is_never_given_up(self) -> None:
        # A full spool dropped 1 to 5000; the device then sends in order and holds at most MAX_GAPS unacknowledged.
        _, stream = Stream().take(5000 + MAX_GAPS)
        held = range(5001, 5000 + MAX_GAPS)
        assert set(held) <= set(stream.gaps)
        for seq in held:
            new, stream = stream.take(seq)
            assert new

    def test_old_gaps_give_way_to_new_ones(self) -> None:
        _, stream = Stream().take(MAX_GAPS + 1)
        _, stream = stream.take(MAX_GAPS + 3)
        assert stream.gaps == (*range(2, MAX_GAPS + 1), MAX_GAPS + 2)

    def test_filling_gaps_makes_room_in_the_list(self) -> None:
        _, stream = Stream().take(3)
        _, stream = stream.take(1)
        assert stream == Stream(3, (2,))


def after(*messages: Message, device: Device | None = None) -> Device:
    state = device or Device(device="d1")
    for message in messages:
        state = state.after(message, now_ms=5)
    return state


class TestDevice:
    @pytest.mark.parametrize(
        ("what", "messages", "state"),
        [
            ("a birth", [fleet.status(session=1)], "online"),
            ("a will", [fleet.status(session=1), fleet.status("offline", session=1)], "offline"),
            ("a late will", [fleet.status(session=2), fleet.status("offline", session=1)], "online"),
            ("a will before the next", [fleet.status("offline", session=1), fleet.status(session=2)], "online"),
            ("a repeated online after the will", [fleet.status("offline"), fleet.status()], "offline"),
            ("a will after a stop", [fleet.status("stopped"), fleet.status("offline")], "stopped"),
            ("a birth before its status", [fleet.birth(session=3), fleet.status(session=3)], "online"),
            ("a birth after a will", [fleet.status("offline", session=1), fleet.birth(session=2)], "unknown"),
        ],
    )
    def test_the_latest_session_decides(self, what: str, messages: list[Message], state: str) -> None:
        assert after(*messages).state == state, what

    def test_a_birth_of_an_older_session_changes_nothing(self) -> None:
        device = after(fleet.status(session=2), fleet.birth(session=2, model=fleet.MODEL))
        assert after(fleet.birth(session=1, model=fleet.OTHER), device=device) == device

    @pytest.mark.parametrize("session", [1_760_000_000, 2**53])
    def test_sessions_that_count_from_the_clock_beat_those_that_counted_from_one(self, session: int) -> None:
        before = after(fleet.status(session=7), fleet.birth(session=7))
        anew = after(fleet.status(session=session), fleet.birth(session=session, model=fleet.OTHER), device=before)
        assert (anew.session, anew.state, anew.model_digest) == (session, "online", fleet.OTHER)

    def test_reported_says_what_runs_and_what_became_of_the_hint(self) -> None:
        device = after(fleet.birth(), fleet.reported("updated", model=fleet.OTHER, sequence=3, desired=3))
        assert (device.model_digest, device.sequence) == (fleet.OTHER, 3)
        assert (device.outcome, device.outcome_sequence) == ("updated", 3)

    def test_an_outcome_stays_while_the_next_attempt_runs(self) -> None:
        device = after(fleet.reported("refused", desired=3), fleet.reported("fetching", desired=3))
        assert (device.outcome, device.outcome_sequence) == ("refused", 3)

    def test_what_the_broker_repeats_is_no_sign_of_life(self) -> None:
        assert Device(device="d1").after(fleet.status(), now_ms=None).last_seen_ms == 0
        assert Device(device="d1").after(fleet.status(), now_ms=9).last_seen_ms == 9


class TestAcks:
    def test_the_first_ack_leaves_at_once(self) -> None:
        acks = Acks(0.5)
        assert acks.due_in_s(0.0) == math.inf
        acks.add([("d1", Ack(boot=fleet.BOOT, through_seq=1))])
        assert acks.due_in_s(0.0) == 0.0
        assert acks.take(0.0) == [("d1", Ack(boot=fleet.BOOT, through_seq=1))]

    def test_those_after_it_wait_and_the_latest_stands_for_all(self) -> None:
        acks = Acks(0.5)
        for seq in range(1, 100):
            acks.add([("d1", Ack(boot=fleet.BOOT, through_seq=seq)), ("d2", Ack(boot=fleet.BOOT, through_seq=seq))])
            left = acks.take(0.0)
            assert bool(left) == (seq == 1)
        assert acks.due_in_s(0.1) == pytest.approx(0.4)
        assert acks.take(0.5) == [(name, Ack(boot=fleet.BOOT, through_seq=99)) for name in ("d1", "d2")]
        assert acks.take(1.5) == []

    def test_boots_of_one_device_are_acknowledged_each(self) -> None:
        acks = Acks(0.5)
        acks.add([("d1", Ack(boot="0" * 16, through_seq=5)), ("d1", Ack(boot="1" * 16, through_seq=1))])
        assert len(acks.take_all()) == 2
        assert acks.take_all() == []
