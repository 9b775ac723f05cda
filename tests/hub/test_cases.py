"""A case's way from suspicion to the repaired fleet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import msgspec
import pytest

from edgeguard.hub import cases
from edgeguard.hub.cases import OPEN, WORKING, Case, Progress, Released, Result, State
from edgeguard.hub.policy import Suspicion
from tests.simulators import fleet

SUSPICION = Suspicion(
    model_digest=fleet.MODEL, label=7, devices=("a", "b"), flagged=50, inputs=200, p_value=1e-9, excess=9.0, channels=()
)  # fmt: skip
GOOD = Result(verdict="confirmed", gate_passed=True, output="o", model_digest=fleet.OTHER, guard_digest=fleet.GUARD)
STATES: tuple[State, ...] = get_args(State)


def case(state: State = "suspected", **fields: Any) -> Case:
    return msgspec.structs.replace(cases.open_case(SUSPICION, model="signs", at_ms=1), state=state, **fields)


def test_the_way_of_a_repair_that_works() -> None:
    one = cases.started(case(), judged=60, at_ms=2)
    assert (one.state, one.runs, one.judged) == ("confirming", 1, 60)
    one = cases.progressed(one, Progress(stage="confirming", text="inverting"), at_ms=3)
    assert one.state == "confirming"
    one = cases.progressed(one, Progress(stage="converting"), at_ms=4)
    assert one.state == "repairing"
    one = cases.settled(one, GOOD, at_ms=5)
    onward: tuple[State, ...] = ("released", "rolling_out", "closed")
    for state in onward:
        one = cases.move(one, state, at_ms=6)
    assert (one.state, one.updated_ms) == ("closed", 6)


@pytest.mark.parametrize(
    ("result", "state"),
    [
        (GOOD, "repaired"),
        (Result(verdict="not_confirmed"), "dismissed"),
        (Result(verdict="could_not_check"), "could_not_check"),
        (Result(verdict="could_not_check", gate_passed=True, output="o"), "could_not_check"),
        (msgspec.structs.replace(GOOD, gate_passed=False), "refused"),
        (msgspec.structs.replace(GOOD, output=None), "refused"),
        (msgspec.structs.replace(GOOD, model_digest=None), "refused"),
    ],
)
@pytest.mark.parametrize("before", ["confirming", "repairing"])
def test_a_result_settles_the_case(result: Result, state: str, before: State) -> None:
    assert cases.settled(case(before), result, at_ms=2).state == state


def test_a_worker_that_crashes_is_run_again_and_then_given_up_as_not_checked() -> None:
    one = case("repairing")
    for _ in range(2):
        one = cases.started(cases.crashed(one, "killed", attempts=3, at_ms=2), judged=60, at_ms=3)
        assert one.state == "confirming"
    one = cases.crashed(one, "killed", attempts=3, at_ms=4)
    assert (one.state, one.failures) == ("could_not_check", 3)
    assert "killed" in one.note


@pytest.mark.parametrize(
    ("before", "after"),
    [("suspected", "repaired"), ("dismissed", "confirming"), ("repaired", "closed"), ("closed", "released"),
     ("released", "repairing"), ("could_not_check", "repaired"), ("refused", "released"), ("rolling_out", "refused")],
)  # fmt: skip
def test_there_are_no_short_cuts(before: State, after: State) -> None:
    with pytest.raises(ValueError, match=f"from {before} to {after}"):
        cases.move(case(before), after, at_ms=2)


@pytest.mark.parametrize("state", STATES)
def test_every_open_state_leads_on_and_the_others_do_not(state: State) -> None:
    ways = [after for after in STATES if after != state and _can(state, after)]
    assert bool(ways) == (state in OPEN)


def test_no_case_is_stuck_when_its_worker_crashes() -> None:
    for state in WORKING[1:]:
        assert cases.crashed(case(state), "x", attempts=1, at_ms=2).state == "could_not_check"


@pytest.mark.parametrize(
    ("what", "existing", "news"),
    [
        ("nothing yet", [], True),
        *[(f"one in state {state}", [case(state)], False) for state in (*OPEN, "closed")],
        ("an open one for another label", [case("repairing", label=1)], False),
        ("a repaired model, other label", [case("closed", label=1)], False),
        ("another model's", [case("repairing", model_digest=fleet.OTHER)], True),
        ("dismissed on as much evidence", [case("dismissed")], False),
        ("dismissed on less than half the evidence", [case("dismissed", flagged=25)], True),
        ("dismissed by a run on more evidence", [case("dismissed", flagged=25, judged=26)], False),
        ("dismissed for another label", [case("dismissed", label=1)], True),
        ("not checked before", [case("could_not_check")], False),
    ],
)
def test_what_deserves_a_case_of_its_own(what: str, existing: list[Case], news: bool) -> None:
    assert cases.is_news(SUSPICION, existing) == news, what


def test_a_case_survives_the_database() -> None:
    release = Released(
        target="t", sequence=2, model_digest=fleet.OTHER, guard_digest=fleet.GUARD, replaces=fleet.MODEL, at_ms=5
    )
    one = case("released", result=GOOD, release=release, progress=Progress(stage="confirming", done=1, total=2))
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(one))), Case) == one


def test_a_suspicion_is_kept_as_it_was() -> None:
    one = cases.open_case(replace(SUSPICION, devices=("x",)), model="signs", at_ms=1)
    assert (one.model, one.label, one.devices, one.flagged, one.state) == ("signs", 7, ("x",), 50, "suspected")


def _can(before: State, after: State) -> bool:
    try:
        cases.move(case(before), after, at_ms=2)
    except ValueError:
        return False
    return True
