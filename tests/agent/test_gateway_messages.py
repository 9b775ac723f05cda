"""What a microcontroller says, as the hub takes it: whatever passes the serial link is nothing that the hub rejects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.agent.gateway import alert_of, birth_of, health_of, report_of
from edgeguard.contract import messages, topics
from edgeguard.hub import ingest
from edgeguard.hub.ingest import Accepted
from firmware_bridge.link import messages as wire

HELLO = wire.Hello(
    schema=wire.SCHEMA, boot=0xAB, name="pump", board="test", library="1.0", detectors="linf,l1",
    model_digest=b"\1" * 32, guard_digest=b"\2" * 32, file_digest=b"\3" * 32, sequence=3, slot_bytes=0,
    standing=wire.Standing.CONFIRMED,
)  # fmt: skip
U16, U64 = st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1)
labels = st.integers(-1, wire.MAX_LABEL)
floats = st.floats(width=32, allow_nan=False)


def accepted(channel: str, message: messages.Message) -> bool:
    topic = topics.topic("demo", "gate~pump", channel)
    return isinstance(ingest.read(topic, messages.encode(message), fleet="demo", models={}), Accepted)


@st.composite
def reports(draw: st.DrawFn) -> wire.Report:
    """Reports that their own rules let pass."""
    counts = []
    clean = flagged = 0
    for label in draw(st.lists(labels, unique=True, max_size=wire.LABELS)):
        inputs = draw(st.integers(0, 4000))
        counts.append(wire.Count(label=label, inputs=inputs, flagged=draw(st.integers(0, inputs))))
        clean, flagged = clean + inputs - counts[-1].flagged, flagged + counts[-1].flagged
    chosen = draw(st.sampled_from(counts)) if counts else None
    evidence = draw(st.integers(0, chosen.flagged)) if chosen else 0
    channels = st.builds(
        lambda channel, inputs, mean: wire.Channel(channel=channel, inputs=inputs, total=mean * inputs),
        st.integers(0, wire.MAX_CHANNEL),
        st.integers(1, max(1, evidence)),
        st.integers(-wire.MAX_EXCESS, wire.MAX_EXCESS),
    )
    return wire.Report(
        number=draw(st.integers(1, 2**32 - 1)),
        started_ms=draw(U64),
        ended_ms=draw(U64),
        unchecked=draw(U16),
        histogram=(clean, *[0] * 9, flagged, *[0] * 9),
        labels=tuple(counts),
        evidence_label=chosen.label if chosen else -1,
        evidence=evidence,
        channels=tuple(draw(st.lists(channels, unique_by=lambda c: c.channel, max_size=8))) if evidence else (),
    )


@given(reports())
def test_every_report_is_one_that_the_hub_takes(report: wire.Report) -> None:
    message = report_of(report, HELLO)
    assert accepted(topics.REPORT, message)
    assert (message.boot, message.seq, message.inputs) == ("00000000000000ab", report.number, report.inputs)


@given(st.integers(1, 2**32 - 1), U64, labels, st.tuples(floats, st.floats(min_value=1.5, width=32)))
def test_every_alert_is_one_that_the_hub_takes(
    number: int, at_ms: int, label: int, scores: tuple[float, float]
) -> None:
    alert = alert_of(wire.Alert(number=number, at_ms=at_ms, label=label, scores=scores), HELLO)
    assert alert is not None
    assert accepted(topics.ALERT, alert)
    assert set(alert.scores) == {"linf", "l1"}


def test_scores_that_are_not_those_of_the_detectors_make_no_alert() -> None:
    assert alert_of(wire.Alert(number=1, at_ms=0, label=0, scores=(2.0,)), HELLO) is None


def test_channels_that_moved_are_told_in_the_unit_of_the_guard() -> None:
    report = wire.Report(
        number=1, started_ms=0, ended_ms=1, unchecked=0, histogram=(*[0] * 10, 2, *[0] * 9),
        labels=(wire.Count(label=4, inputs=2, flagged=2),), evidence_label=4, evidence=2,
        channels=(wire.Channel(channel=9, inputs=1, total=3 * wire.UNIT // 2),),
    )  # fmt: skip
    channel = messages.MovedChannel(channel=9, inputs=1, excess=1.5)
    assert report_of(report, HELLO).moved == messages.Moved(label=4, inputs=2, channels=(channel,))


@pytest.mark.parametrize(("slot_bytes", "capabilities"), [(0, ("commands",)), (4096, ("commands", "update"))])
def test_birth_says_what_it_is_and_whether_it_takes_models(slot_bytes: int, capabilities: tuple[str, ...]) -> None:
    hello = wire.Hello(**{name: getattr(HELLO, name) for name in HELLO.__struct_fields__} | {"slot_bytes": slot_bytes})
    birth = birth_of(hello, 7)
    assert accepted(topics.BIRTH, birth)
    assert (birth.capabilities, birth.detectors, birth.sequence) == (capabilities, ("linf", "l1"), 3)


def test_health_says_nothing_that_is_not_known() -> None:
    health = wire.Health(
        uptime_ms=1, inputs=9, unchecked=1, lost=2, alerts_lost=0, damaged=0, inference_us=None
    )  # fmt: skip
    told = health_of(health, HELLO, session=7, spooled=4)
    assert accepted(topics.HEALTH, told)
    assert (told.inputs, told.dropped, told.spooled, told.rss_bytes) == (9, 2, 4, None)
