"""Who gets the hint to a release, and when: canaries first, then everyone, and nobody is put at risk to find out."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from edgeguard.hub.cases import Released
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.ingest import Device
from edgeguard.hub.rollout import REPEAT_ANSWERED_S, REPEAT_S, Plan, next_hints, repeat_after_s
from tests.simulators import fleet

OLD, NEW, NEWER = fleet.MODEL, fleet.OTHER, "d" * 64
RELEASE = Released(target="t", sequence=5, model_digest=NEW, guard_digest=fleet.GUARD, replaces=OLD, at_ms=1000)


def device(name: str, model: str = OLD, state: Any = "online", **more: Any) -> Device:
    return Device(device=name, model_digest=model, state=state, sequence={NEW: 5, NEWER: 6}.get(model, 0), **more)


def plan(
    *devices: Device, canaries: tuple[str, ...] = (), everyone: bool = False, now_ms: int = 1000, **policy: Any
) -> Plan:
    release = msgspec.structs.replace(RELEASE, canaries=canaries, everyone=everyone)
    return next_hints(devices, release, PolicyConfig(**policy), now_ms)


@pytest.mark.parametrize(
    ("what", "given", "expected"),
    [
        ("the first online device is the canary", plan(device("b"), device("a")), ("a",)),
        ("an offline device is none", plan(device("a", state="offline"), device("b")), ("b",)),
        ("nobody online: wait", plan(device("a", state="offline")), ()),
        ("other models are left alone", plan(device("a", NEWER), device("b", "e" * 64)), ()),
        ("the canary has yet to update", plan(device("a"), device("b"), canaries=("a",)), ("a",)),
        ("a chosen canary stays one", plan(device("a"), device("b"), canaries=("b",)), ("b",)),
        ("the canary made it: everyone", plan(device("a", NEW), device("b"), device("c"), canaries=("a",)), ("b", "c")),
        ("offline devices get it too", plan(device("a", NEW), device("b", state="offline"), canaries=("a",)), ("b",)),
        ("the canary is ahead already", plan(device("a", NEWER), device("b"), canaries=("a",)), ("b",)),
        ("the canary disappeared", plan(device("a", state="offline"), device("b"), canaries=("a",)), ("a",)),
        ("one of two canaries made it", plan(device("a", NEW), device("b"), device("c"), canaries=("a", "b")), ("b",)),
        ("one who comes back later", plan(device("z"), device("a", NEW), canaries=("a",), everyone=True), ("z",)),
    ],
)
def test_who_has_the_hint(what: str, given: Plan, expected: tuple[str, ...]) -> None:
    assert given.hints == expected, what


def test_as_many_canaries_as_the_policy_says() -> None:
    devices = [device(name) for name in "dcba"]
    assert plan(*devices, canaries=(), now_ms=1000).canaries == ("a",)
    assert next_hints(devices, RELEASE, PolicyConfig(canaries=3), 1000).canaries == ("a", "b", "c")


def test_nobody_is_hinted_while_an_operator_may_object() -> None:
    assert plan(device("a"), veto_s=60.0, now_ms=60_999) == Plan()
    assert plan(device("a"), veto_s=60.0, now_ms=61_000).hints == ("a",)


@pytest.mark.parametrize("outcome", ["refused", "failed"])
def test_a_canary_that_does_not_take_it_holds_the_roll_out_and_is_listed(outcome: Any) -> None:
    unwilling = device("a", outcome=outcome, outcome_sequence=5, reason="bad signature")
    held = plan(unwilling, device("b"), canaries=("a",))
    assert held.hints == ("a",)
    assert held.held == (f"a: {outcome} (bad signature)",)


@pytest.mark.parametrize(
    ("what", "given", "expected"),
    [
        ("no answer yet", device("a"), REPEAT_S),
        ("an answer to another hint", device("a", outcome="refused", outcome_sequence=99), REPEAT_S),
        ("an answer under its number", device("a", outcome="failed", outcome_sequence=5), REPEAT_ANSWERED_S),
        ("not there to hear it", device("a", state="offline"), math.inf),
    ],
)
def test_a_hint_is_repeated_until_its_device_answers_and_rarely_after_that(
    what: str, given: Device, expected: float
) -> None:
    assert repeat_after_s(given, RELEASE) == expected, what


def test_an_outcome_of_an_earlier_release_says_nothing() -> None:
    assert plan(device("a", outcome="refused", outcome_sequence=4)).held == ("a: hinted",)


@pytest.mark.parametrize(
    ("devices", "done"),
    [
        ([device("a", NEW), device("b", NEW)], True),
        ([device("a", NEW), device("b", state="offline")], True),
        ([device("a", NEW), device("b")], False),
        ([device("a", state="offline")], False),
        ([], False),
    ],
)
def test_it_is_done_when_every_online_device_runs_the_release(devices: list[Device], done: bool) -> None:
    assert plan(*devices, canaries=("a",)).done == done


def test_updated_devices_are_listed() -> None:
    assert plan(device("b", NEW), device("a", NEW), device("c"), canaries=("a",)).updated == ("a", "b")
