"""Topics, messages, scores: what may cross the wire, and what is refused."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.contract import messages, scores, topics
from edgeguard.errors import ConfigError, LinkError

BOOT = "0123456789abcdef"
DIGEST = "a" * 64


def report(**changes: object) -> messages.Report:
    values: dict[str, object] = {
        "boot": BOOT,
        "seq": 1,
        "model_digest": DIGEST,
        "guard_digest": DIGEST,
        "started_ms": 1,
        "ended_ms": 2,
        "inputs": 1,
        "unchecked": 0,
        "labels": (messages.LabelCount(label=0, inputs=1, flagged=0),),
        "histogram": (1,) + (0,) * (scores.BINS - 1),
    }
    return messages.Report(**{**values, **changes})  # type: ignore[arg-type]


def test_a_topic_parses_back_into_its_parts() -> None:
    assert topics.parse(topics.topic("plant-1", "pi~mcu.2", topics.MODEL_DESIRED)) == (
        "plant-1",
        "pi~mcu.2",
        "model/desired",
    )


@pytest.mark.parametrize("device", ["", "+", "#", "a/b", "A", "-a", "a~", "a~b~c", "x" * 64, "a\n", "ä"])
def test_an_id_that_could_widen_a_topic_is_refused(device: str) -> None:
    with pytest.raises(ConfigError):
        topics.topic("fleet", device, topics.REPORT)


@given(st.text())
def test_any_text_as_topic_parses_or_is_refused_with_a_link_error(text: str) -> None:
    try:
        address = topics.parse(text)
    except LinkError:
        return
    assert topics.topic(address.fleet, address.device, address.channel) == text


def test_a_report_survives_the_wire() -> None:
    sent = report(evidence=(messages.LabelEvidence(label=0, flagged=1, unflagged=0, flagged_mean=(0.5,)),))
    assert messages.decode(messages.Report, messages.encode(sent)) == sent


def test_unknown_fields_are_ignored() -> None:
    payload = msgspec.json.encode({**msgspec.to_builtins(report()), "from_the_future": [1, 2]})
    assert messages.decode(messages.Report, payload) == report()


def test_another_version_is_refused_by_number() -> None:
    payload = msgspec.json.encode({**msgspec.to_builtins(report()), "v": 7})
    with pytest.raises(LinkError, match="version 7"):
        messages.decode(messages.Report, payload)


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 0},
        {"inputs": -1},
        {"boot": "XYZ"},
        {"model_digest": "short"},
        {"histogram": [0]},
        {"labels": [{"label": 5000, "inputs": 1, "flagged": 0}]},
        {"activation": {"inputs": 0, "mean": []}},
        {"evidence": [{"label": 0, "flagged": 0, "unflagged": 0, "flagged_mean": []}]},
    ],
)
def test_a_value_out_of_range_is_refused(change: dict[str, object]) -> None:
    payload = msgspec.json.encode({**msgspec.to_builtins(report()), **change})
    with pytest.raises(LinkError):
        messages.decode(messages.Report, payload)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_and_never_raise_anything_else(payload: bytes) -> None:
    with pytest.raises(LinkError):
        messages.decode(messages.Report, payload)


def test_a_deeply_nested_payload_is_refused() -> None:
    with pytest.raises(LinkError):
        messages.decode(messages.Ack, b"[" * 100_000)


def test_a_payload_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(LinkError, match="bytes"):
        messages.decode(messages.Ack, b" " * (messages.MAX_PAYLOAD + 1))


@pytest.mark.parametrize("target", ["../etc/passwd", "/abs", "a b", "", "A.tflite"])
def test_a_hint_cannot_name_a_path_outside(target: str) -> None:
    payload = msgspec.json.encode({"v": 1, "target": target, "sequence": 1})
    with pytest.raises(LinkError):
        messages.decode(messages.Desired, payload)


@pytest.mark.parametrize(
    ("values", "expected"), [([0.2, 1.5], 1.5), ([0.0], 0.0), ([math.inf, 1.0], math.inf), ([1.0, 1.0], 1.0)]
)
def test_the_joint_score_is_the_largest(values: list[float], expected: float) -> None:
    assert scores.joint(values) == expected


@pytest.mark.parametrize("values", [[], [math.nan], [9.0, math.nan], [math.nan, 9.0]])
def test_a_score_that_is_missing_makes_the_joint_score_unknown_and_not_flagged(values: list[float]) -> None:
    assert math.isnan(scores.joint(values))
    assert not scores.is_flagged(scores.joint(values))


@given(st.floats(min_value=0, allow_nan=False))
def test_the_bins_above_one_hold_exactly_the_flagged(score: float) -> None:
    first_flagged = scores.EDGES.index(scores.THRESHOLD) + 1
    assert (scores.bin_of(score) >= first_flagged) == scores.is_flagged(score)
    assert 0 <= scores.bin_of(score) < scores.BINS


def test_an_unchecked_score_belongs_in_no_bin() -> None:
    with pytest.raises(ValueError, match="not checked"):
        scores.bin_of(math.nan)
