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
RELEASE = Released(
    target="t", sequence=2, model_digest=fleet.OTHER, guard_digest=fleet.GUARD, replaces=fleet.MODEL, at_ms=5
)
STATES: tuple[State, ...] = get_args(State)


def case(state: State = "suspected", **fields: Any) -> Case:
    return msgspec.structs.replace(
        cases.open_case(SUSPICION, model="signs", label_name="stop", at_ms=1), state=state, **fields
    )


def last(moves: list[Case]) -> Case:
    return moves[-1]


def test_the_way_of_a_repair_that_works() -> None:
    one = cases.move(case(), "inspecting", at_ms=2, judged=60)
    assert not one.is_case
    assert cases.progressed(one, Progress(stage="confirming", text="inverting"), at_ms=3) == []
    moves = cases.progressed(one, Progress(stage="converting"), at_ms=4)
    assert [(m.state, m.is_case) for m in moves] == [("confirmed", True), ("repairing", True)]
    one = last(cases.settled(last(moves), GOOD, at_ms=5))
    onward: tuple[State, ...] = ("repaired", "released", "rolling_out", "closed")
    for state in onward[1:]:
        one = cases.move(one, state, at_ms=6)
    assert (one.state, one.updated_ms, one.is_case, one.judged) == ("closed", 6, True, 60)


def test_a_result_that_comes_before_any_progress_passes_every_state_on_the_way() -> None:
    moves = cases.settled(case("inspecting"), GOOD, at_ms=5)
    assert [m.state for m in moves] == ["confirmed", "repairing", "repaired"]


def test_an_inspection_alone_confirms_and_changes_nothing() -> None:
    moves = cases.settled(case("inspecting"), Result(verdict="confirmed", repaired=False), at_ms=5)
    assert [(m.state, m.is_case) for m in moves] == [("confirmed", True)]


@pytest.mark.parametrize(
    ("result", "state", "is_case"),
    [
        (GOOD, "repaired", True),
        (Result(verdict="not_confirmed"), "dismissed", False),
        (Result(verdict="could_not_check"), "could_not_check", False),
        (Result(verdict="could_not_check", gate_passed=True, output="o"), "could_not_check", False),
        (msgspec.structs.replace(GOOD, gate_passed=False), "refused", True),
        (msgspec.structs.replace(GOOD, output=None), "refused", True),
        (msgspec.structs.replace(GOOD, model_digest=None), "refused", True),
    ],
)
def test_a_result_settles_the_record(result: Result, state: str, is_case: bool) -> None:
    one = last(cases.settled(case("inspecting"), result, at_ms=2))
    assert (one.state, one.is_case) == (state, is_case)


@pytest.mark.parametrize("verdict", ["not_confirmed", "could_not_check"])
def test_a_confirmed_case_is_never_dismissed_by_a_second_inspection(verdict: Any) -> None:
    first = Result(verdict="confirmed", repaired=False)
    one = last(cases.settled(case("repairing", is_case=True, result=first), Result(verdict=verdict), at_ms=2))
    assert (one.state, one.is_case, one.result) == ("could_not_check", True, first)


@pytest.mark.parametrize(
    ("before", "after"),
    [("suspected", "repaired"), ("dismissed", "inspecting"), ("repaired", "closed"), ("closed", "released"),
     ("released", "repairing"), ("could_not_check", "repaired"), ("refused", "released"), ("rolling_out", "refused"),
     ("suspected", "repaired"), ("repairing", "dismissed"), ("suspected", "dismissed")],
)  # fmt: skip
def test_there_are_no_short_cuts(before: State, after: State) -> None:
    with pytest.raises(ValueError, match=f"from {before} to {after}"):
        cases.move(case(before), after, at_ms=2)


@pytest.mark.parametrize(
    ("choice", "approved", "allowed"),
    [("auto", (), True), ("approve", (), None), ("approve", ("repair",), True), ("approve", ("inspect",), None),
     ("never", (), False), ("never", ("repair",), False)],
)  # fmt: skip
def test_policy_says_which_step_waits_for_a_person(choice: Any, approved: Any, allowed: bool | None) -> None:
    assert cases.may(case("confirmed", approved=approved), "repair", choice) is allowed


class TestDecisions:
    @pytest.mark.parametrize(
        ("state", "step"), [("suspected", "inspect"), ("confirmed", "repair"), ("repaired", "stage")]
    )
    def test_an_approval_that_is_waited_for_is_kept(self, state: State, step: Any) -> None:
        one = cases.decided(case(state, awaiting=step), step, approve=True, who="alice", why="", at_ms=3)
        assert (one.state, one.awaiting, one.approved) == (state, None, (step,))

    @pytest.mark.parametrize(
        ("state", "step"),
        [("suspected", "inspect"), ("confirmed", "repair"), ("repaired", "stage"), ("released", "stage")],
    )
    def test_a_rejection_ends_it_even_where_nobody_waits_for_it(self, state: State, step: Any) -> None:
        one = cases.decided(case(state), step, approve=False, who="alice", why="holiday", at_ms=3)
        assert (one.state, one.note) == ("refused", f"alice said no to {step}: holiday")

    @pytest.mark.parametrize(
        ("state", "awaiting", "step", "approve"),
        [("suspected", None, "inspect", True), ("suspected", "inspect", "repair", True),
         ("inspecting", None, "inspect", False), ("rolling_out", None, "stage", False),
         ("closed", None, "stage", True), ("dismissed", None, "inspect", False), ("released", None, "stage", True)],
    )  # fmt: skip
    def test_what_is_not_open_cannot_be_decided(self, state: State, awaiting: Any, step: Any, approve: bool) -> None:
        with pytest.raises(ValueError, match=f"nothing to decide on {step}"):
            cases.decided(case(state, awaiting=awaiting), step, approve=approve, who="alice", why="", at_ms=3)

    def test_a_move_ends_the_waiting(self) -> None:
        assert cases.move(case(awaiting="inspect"), "inspecting", at_ms=3).awaiting is None


@pytest.mark.parametrize("state", STATES)
def test_every_open_state_leads_on_and_the_others_do_not(state: State) -> None:
    ways = [after for after in STATES if after != state and _can(state, after)]
    again = ("closed", "aborted", "dismissed", "could_not_check")  # to the model before; by inputs that owners share
    assert bool(ways) == (state in OPEN or state in again)


def test_no_job_leaves_a_record_stuck() -> None:
    for state in WORKING:
        assert cases.move(case(state), "could_not_check", at_ms=2).state == "could_not_check"


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
        ("dismissed for the same devices and one more", [case("dismissed", devices=("a",))], True),
        ("dismissed when others shouted louder", [case("dismissed", devices=("x", "y"), flagged=10**9)], True),
        ("dismissed for another label", [case("dismissed", label=1)], True),
        ("not checked before", [case("could_not_check")], False),
        ("not checked on far less", [case("could_not_check", flagged=1)], False),
        ("not checked for others, on far less", [case("could_not_check", devices=("x",), flagged=1)], False),
        ("not checked for another label", [case("could_not_check", label=1)], True),
    ],
)
def test_what_deserves_a_case_of_its_own(what: str, existing: list[Case], news: bool) -> None:
    assert cases.is_news(SUSPICION, existing, now_ms=1000) == news, what


def test_what_could_not_be_checked_is_tried_again_a_week_later() -> None:
    before = [case("could_not_check", flagged=1)]
    assert cases.is_news(SUSPICION, before, now_ms=before[0].updated_ms + cases.WEEK_MS)


def test_a_case_survives_the_database() -> None:
    one = case("released", result=GOOD, release=RELEASE, awaiting=None, approved=("repair",))
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(one))), Case) == one


def test_a_suspicion_is_kept_as_it_was() -> None:
    one = cases.open_case(replace(SUSPICION, devices=("x",)), model="signs", label_name="stop", at_ms=1)
    assert (one.model, one.label, one.devices, one.flagged, one.state) == ("signs", 7, ("x",), 50, "suspected")


class TestExplanation:
    def test_a_suspicion_says_what_was_seen_where_and_that_it_proves_nothing_yet(self) -> None:
        assert cases.explain(case()) == (
            "Model signs flags 50 of 200 of the inputs that it calls 7 (stop), more than clean inputs explain, on "
            "2 devices (a, b). Devices' reports alone prove nothing: no inspection has begun. "
            "Waiting for the inspection."
        )

    def test_what_waits_for_a_person_says_for_what(self) -> None:
        text = cases.explain(case("repaired", is_case=True, awaiting="stage"))
        assert "Waiting for a person to approve the roll-out." in text

    def test_what_could_not_be_checked_is_no_all_clear(self) -> None:
        text = cases.explain(case("could_not_check", note="no clean data"))
        assert "could not be checked: no clean data" in text
        assert "neither a confirmation nor an all-clear" in text

    def test_a_case_says_what_the_inspection_found_and_what_was_done(self) -> None:
        found = Result(verdict="confirmed", summary={"finding": {"reason": "a trigger of 9 pixels"}})
        release = msgspec.structs.replace(RELEASE, updated=("a",), held=("b: offline",))
        text = cases.explain(case("rolling_out", is_case=True, result=found, release=release))
        assert "confirmed a backdoor (a trigger of 9 pixels)" in text
        assert "(release 2) runs on 1 device, at the canaries; not well or not yet: b: offline" in text

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("is_case", [False, True])
    def test_every_state_is_explained_in_sentences(self, state: State, is_case: bool) -> None:
        text = cases.explain(case(state, is_case=is_case, release=RELEASE, note="why"))
        assert text.endswith(".")
        assert "  " not in text

    @pytest.mark.parametrize("summary", [{}, {"finding": None}, {"finding": {"reason": 7}}, {"finding": [1]}])
    def test_a_result_without_a_reason_has_none(self, summary: dict[str, Any]) -> None:
        assert Result(verdict="confirmed", summary=summary).reason == ""


def _can(before: State, after: State) -> bool:
    try:
        cases.move(case(before), after, at_ms=2)
    except ValueError:
        return False
    return True
