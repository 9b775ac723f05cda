"""The budget governor: when it steps down, when back up, and what it never does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.agent.governor import Governor, Level, Limits, Readings, State, Step
from edgeguard.errors import ConfigError

SETTLE, HOLD, LONGEST = 10.0, 60.0, 480.0
LIMITS = Limits(cpu_share=0.25, inferences_per_s=10.0, memory_bytes=128 << 20, temperature_c=80.0, backlog=100)
GOVERNOR = Governor(limits=LIMITS, settle_s=SETTLE, hold_s=HOLD, hold_max_s=LONGEST)
LOW: dict[str, Any] = {
    "cpu_share": 0.1,
    "inferences_per_s": 2.0,
    "memory_bytes": 64 << 20,
    "temperature_c": 50.0,
    "throttled": False,
    "backlog": 0,
}
HIGH = {**LOW, "temperature_c": 83.2}


def run(readings: Iterable[Readings], state: State | None = None, governor: Governor = GOVERNOR) -> list[Step]:
    """The steps that follow from these readings."""
    steps: list[Step] = []
    state = state or State()
    for one in readings:
        state, step = governor.step(state, one)
        steps += [step] if step else []
        assert (step.level if step else state.level) is state.level
    return steps


def every_second(values: dict[str, Any], start: int, end: int) -> list[Readings]:
    """The same readings at each second from start up to, not including, end."""
    return [Readings(at_s=float(second), **values) for second in range(start, end)]


# What the levels say


def test_each_level_leaves_out_more_than_the_one_before_and_the_last_still_scores() -> None:
    said = [(level.audits_at_random, level.looks_further, level.score_every) for level in Level]
    assert said == [
        (True, True, 1),
        (False, True, 1),
        (False, False, 1),
        (False, False, 2),
        (False, False, 4),
        (False, False, 8),
    ]


# Down


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"cpu_share": 0.31}, "extra CPU share 0.31 above 0.25"),
        ({"inferences_per_s": 12.13}, "extra inferences 12.1/s above 10"),
        ({"memory_bytes": 130 << 20}, "memory 130.0 MiB above 128"),
        ({"temperature_c": 83.2}, "temperature 83.2 °C above 80"),
        ({"throttled": True}, "the board throttles itself"),
        ({"backlog": 120}, "120 inputs waiting, above 100"),
        ({"cpu_share": 0.5, "throttled": True}, "extra CPU share 0.50 above 0.25; the board throttles itself"),
    ],
)
def test_an_exceeded_limit_takes_one_level_and_says_why(values: dict[str, Any], reason: str) -> None:
    state, step = GOVERNOR.step(State(), Readings(at_s=5.0, **{**LOW, **values}))
    assert step == Step(level=Level.NO_RANDOM_AUDITS, previous=Level.EVERYTHING, reason=reason, at_s=5.0)
    assert state.level is Level.NO_RANDOM_AUDITS


def test_a_reading_at_its_limit_is_not_above_it() -> None:
    at_limit = {name: getattr(LIMITS, name) for name in LOW if name != "throttled"}
    assert run(every_second(at_limit, 0, 100)) == []


@pytest.mark.parametrize("limit", ["cpu_share", "inferences_per_s", "memory_bytes", "temperature_c", "backlog"])
def test_what_has_no_limit_is_not_judged(limit: str) -> None:
    values = {name: getattr(LIMITS, name) for name in LOW if name not in {"throttled", limit}}
    readings = every_second({**LOW, limit: 1 << 40}, 0, 100)
    assert run(readings, governor=Governor(limits=Limits(**values))) == []
    assert run(readings)


def test_what_stays_above_a_limit_takes_a_level_each_settle_interval_down_to_the_last() -> None:
    steps = run(every_second(HIGH, 0, 200))
    assert [step.level for step in steps] == list(Level)[1:]
    assert [step.at_s for step in steps] == [0.0, 10.0, 20.0, 30.0, 40.0]


# Up again


def test_low_readings_give_a_level_back_each_hold() -> None:
    steps = run(every_second(LOW, 0, 1000), State(level=Level.EVERY_8TH))
    assert [step.level for step in steps] == list(Level)[-2::-1]
    assert [step.at_s for step in steps] == [60.0, 120.0, 180.0, 240.0, 300.0]
    assert steps[0].reason == "low for 60 s"


@pytest.mark.parametrize(
    "values", [{"cpu_share": 0.21}, {"memory_bytes": 127 << 20}, {"temperature_c": 75.5}, {"backlog": 81}]
)
def test_between_the_marks_nothing_moves_and_the_hold_starts_anew(values: dict[str, Any]) -> None:
    between = {**LOW, **values}
    start = State(level=Level.EVERY_2ND)
    assert run(every_second(between, 0, 1000), start) == []
    steps = run(every_second(LOW, 0, 50) + every_second(between, 50, 51) + every_second(LOW, 51, 150), start)
    assert [step.at_s for step in steps] == [111.0]


def relapses(count: int, *, lasting: int) -> list[float]:
    """How long each step up took, where each is taken back by one high reading ``lasting`` seconds later."""
    state, step = GOVERNOR.step(State(), Readings(at_s=0.0, **HIGH))
    taken: list[float] = []
    now = 0
    for _ in range(count):
        down = now
        while step is None or step.level > step.previous:
            now += 1
            state, step = GOVERNOR.step(state, Readings(at_s=float(now), **LOW))
        taken.append(now - down)
        now += lasting
        state, step = GOVERNOR.step(state, Readings(at_s=float(now), **HIGH))
    return taken


def test_the_hold_doubles_up_to_its_bound_with_each_step_up_that_was_taken_back() -> None:
    # The first low reading comes a second after the step down: from there the hold counts.
    assert relapses(6, lasting=20) == [61, 121, 241, 481, 481, 481]


def test_several_levels_down_are_no_relapse() -> None:
    steps = run(every_second(HIGH, 0, 100) + every_second(LOW, 100, 200))
    assert (steps[-1].level, steps[-1].at_s) == (Level.EVERY_4TH, 160.0)


def test_a_step_up_that_lasted_as_long_as_the_longest_hold_was_no_mistake() -> None:
    assert relapses(3, lasting=int(LONGEST)) == [61, 61, 61]


# Unknown


@pytest.mark.parametrize("unknown", [None, math.nan])
@pytest.mark.parametrize("level", list(Level))
def test_where_nothing_is_known_nothing_moves(level: Level, unknown: float | None) -> None:
    values = {**dict.fromkeys(LOW, unknown), "throttled": None}
    assert run(every_second(values, 0, 1000), State(level=level)) == []


def test_a_quantity_that_is_no_longer_known_keeps_the_level_from_rising() -> None:
    hot = run(every_second(HIGH, 0, 1) + every_second({**LOW, "temperature_c": None}, 1, 1000))
    assert [step.level for step in hot] == [Level.NO_RANDOM_AUDITS]


def test_a_quantity_that_was_never_known_has_no_say() -> None:
    known = {name: value for name, value in LOW.items() if name not in {"temperature_c", "throttled"}}
    steps = run(every_second(known, 0, 1000), State(level=Level.EVERY_8TH))
    assert steps[-1].level is Level.EVERYTHING


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_time_in_which_something_was_unknown_counts_towards_no_hold_but_does_not_end_it(unknown: float | None) -> None:
    gap = {**LOW, "temperature_c": unknown}
    readings = every_second(LOW, 0, 31) + every_second(gap, 31, 500) + every_second(LOW, 500, 580)
    assert [step.at_s for step in run(readings, State(level=Level.EVERY_2ND))] == [530.0]


def test_no_step_up_follows_from_an_unknown_reading_even_when_the_hold_was_over() -> None:
    governor = Governor(limits=LIMITS, settle_s=200.0, hold_s=60.0)
    readings = [*every_second(HIGH, 0, 1), *every_second(LOW, 1, 150), *every_second({}, 150, 500)]
    assert [step.level for step in run(readings, governor=governor)] == [Level.NO_RANDOM_AUDITS]


def test_what_is_known_to_be_too_much_counts_whatever_else_is_unknown() -> None:
    assert run([Readings(at_s=0.0, temperature_c=83.2)])


# Whatever is read

STRETCHES: list[dict[str, Any]] = [
    LOW,
    HIGH,
    {**LOW, "cpu_share": 0.21},
    {**LOW, "cpu_share": 0.5, "temperature_c": None},
    {**LOW, "temperature_c": None},
    {**LOW, "throttled": True},
    {"temperature_c": math.nan, "throttled": False},
    {},
]


@st.composite
def histories(draw: st.DrawFn) -> list[Readings]:
    """Stretches of equal readings, at even times within each."""
    stretch = st.tuples(
        st.sampled_from(STRETCHES), st.sampled_from([1.0, 7.0, 10.0, 30.0, 70.0, 600.0]), st.integers(1, 20)
    )
    now, readings = 0.0, []
    for values, apart, count in draw(st.lists(stretch, min_size=1, max_size=20)):
        for _ in range(count):
            now += apart
            readings.append(Readings(at_s=now, **values))
    return readings


def is_up(step: Step) -> bool:
    return step.level < step.previous


@given(readings=histories(), start=st.sampled_from(Level))
def test_steps_are_single_and_apart_and_the_range_is_never_left(readings: list[Readings], start: Level) -> None:
    steps = run(readings, State(level=start))
    level = start
    for step in steps:
        assert step.previous is level
        assert abs(step.level - level) == 1
        assert step.level in Level
        assert step.reason
        level = step.level
    for earlier, later in pairwise(steps):
        assert later.at_s - earlier.at_s >= (HOLD if is_up(later) else SETTLE)


@given(readings=histories(), start=st.sampled_from(Level))
def test_the_level_swings_no_faster_than_the_hold_and_ever_slower(readings: list[Readings], start: Level) -> None:
    steps = run(readings, State(level=start))
    hold, relapsed_at = HOLD, -math.inf
    for earlier, later in pairwise(steps):
        if is_up(earlier) and not is_up(later):
            assert later.at_s - relapsed_at >= hold + SETTLE
            hold = min(LONGEST, 2 * hold) if later.at_s - earlier.at_s < LONGEST else HOLD
            relapsed_at = later.at_s
        if is_up(later):
            assert later.at_s - earlier.at_s >= hold


constant = st.fixed_dictionaries(
    {
        "cpu_share": st.floats(0.0, 0.2),
        "inferences_per_s": st.floats(0.0, 8.0),
        "memory_bytes": st.integers(0, 100 << 20),
        "temperature_c": st.floats(-20.0, 75.0),
        "throttled": st.sampled_from([None, False]),
        "backlog": st.integers(0, 80),
    }
)
over = st.sampled_from(
    [
        {"cpu_share": 0.26},
        {"inferences_per_s": 11.0},
        {"memory_bytes": 1 << 30},
        {"temperature_c": 80.1},
        {"throttled": True},
        {"backlog": 101},
    ]
)


@given(values=constant, start=st.sampled_from(Level), hold=st.floats(0.0, LONGEST))
def test_constant_low_readings_end_at_the_first_level(values: dict[str, Any], start: Level, hold: float) -> None:
    state = State(level=start, hold_s=hold)
    for second in range(0, 4000, 10):
        state, _ = GOVERNOR.step(state, Readings(at_s=float(second), **values))
    assert state.level is Level.EVERYTHING


@given(values=constant, above=over, start=st.sampled_from(Level), history=histories())
def test_constant_readings_above_a_limit_end_at_the_last_level(
    values: dict[str, Any], above: dict[str, Any], start: Level, history: list[Readings]
) -> None:
    state = State(level=start)
    for one in history:
        state, _ = GOVERNOR.step(state, one)
    for second in range(10, 70, 10):
        readings = Readings(at_s=history[-1].at_s + second, **{**values, **above})
        state, _ = GOVERNOR.step(state, readings)
    assert state.level is Level.EVERY_8TH


# Limits that are none


@pytest.mark.parametrize(
    "values",
    [
        {"cpu_share": 1.5},
        {"cpu_share": -0.1},
        {"inferences_per_s": math.inf},
        {"memory_bytes": -1},
        {"temperature_c": math.nan},
        {"backlog": -1},
    ],
)
def test_a_limit_that_is_none_is_refused_by_its_name(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=name):
        Limits(**values)


@pytest.mark.parametrize("times", [{"settle_s": 0.0}, {"hold_s": 0.0}, {"hold_s": 99.0, "hold_max_s": 98.0}])
def test_times_that_are_none_are_refused(times: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="governor"):
        Governor(limits=LIMITS, **times)
