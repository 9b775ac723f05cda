"""Drift asks to recalibrate; clean traffic, another mix of classes and an attack do not."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.detection import drift
from edgeguard.detection.drift import Counts, Observation, Promise, State
from edgeguard.detection.statistics import set_thresholds
from edgeguard.detection.verdict import p_value
from edgeguard.errors import ModelError

Traffic = Callable[[random.Random, int], Observation]

FPR = 0.01
CLASSES = 10
SURE = Promise(fpr=FPR, inputs=10**6)
"""A calibration so large that nothing is forgiven for its size: false alarms are likeliest here."""
USUAL = Promise(fpr=FPR, inputs=1000)
FLOOR = 1 / 1001
SEEDS = range(4)


def seen(p: float, predicted: int | None) -> Observation:
    return Observation(p_value=p, predicted=predicted, flagged=p <= FPR)


def bulk(a: float, classes: int = CLASSES) -> Traffic:
    """p-values of the law Beta(a, 1): uniform for a of 1, smaller than that below."""
    return lambda rng, _: seen(rng.random() ** (1 / a), rng.randrange(classes))


def after(promise: Promise, traffic: Traffic, count: int, seed: int) -> State:
    rng, state = random.Random(seed), drift.begin("g", promise)
    for index in range(count):
        state = drift.update(state, traffic(rng, index))
    return state


def feed(promise: Promise, observations: Iterable[Observation]) -> State:
    state = drift.begin("g", promise)
    for observation in observations:
        state = drift.update(state, observation)
    return state


def attack(share: float, targets: int = 1) -> Traffic:
    """Triggered inputs have p at the floor and are predicted as the target, the others are clean."""

    def traffic(rng: random.Random, index: int) -> Observation:
        if rng.random() < share:
            return Observation(p_value=FLOOR, predicted=rng.randrange(targets), flagged=True)
        return bulk(1.0)(rng, index)

    return traffic


def weak_attack(rng: random.Random, index: int) -> Observation:
    """Half of the inputs carry a trigger that is hardly ever flagged: a moved bulk, in one class."""
    return seen(0.011 + 0.2 * rng.random(), 3) if rng.random() < 0.5 else bulk(1.0)(rng, index)


def label_shift(rng: random.Random, index: int) -> Observation:
    return seen(rng.random(), min(int(rng.expovariate(1 / (1 + index / 500))), CLASSES - 1))


def no_classes(rng: random.Random, _: int) -> Observation:
    return seen(rng.random(), None)


def ties(rng: random.Random, _: int) -> Observation:
    """Conservative steps: p is the upper end of the step that a uniform number fell into."""
    return seen(math.ceil(rng.random() * 5) / 5, rng.randrange(CLASSES))


def some_classes_harder(rng: random.Random, _: int) -> Observation:
    """Three of ten classes are by nature further out, the others nearer."""
    predicted = rng.randrange(CLASSES)
    return seen(rng.random() ** (1 / (0.5 if predicted < 3 else 1.2)), predicted)


STEADY = {
    "clean": bulk(1.0),
    "clean, many classes": bulk(1.0, 1000),
    "clean, no classes": no_classes,
    "another mix of classes": label_shift,
    "ties": ties,
    "nearer than the calibration": bulk(1.5),
    "some classes harder by nature": some_classes_harder,
    "attack, 1%": attack(0.01),
    "attack, 10%": attack(0.1),
    "attack, 30%": attack(0.3),
    "attack, 50%": attack(0.5),
    "attack on three classes": attack(0.3, targets=3),
    "attack on every class": attack(0.3, targets=CLASSES),
    "attack that is not flagged": weak_attack,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", STEADY)
def test_what_is_not_drift_stays_steady(name: str, seed: int) -> None:
    assert drift.judge(after(SURE, STEADY[name], 4000, seed)).state == "steady"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("classes", "inputs"), [(1, 1000), (2, 1000), (10, 1000), (100, 1500)])
def test_a_strong_shift_is_found_soon(classes: int, inputs: int, seed: int) -> None:
    assert drift.judge(after(USUAL, bulk(0.5, classes), inputs, seed)).state == "recalibrate"


def test_a_strong_shift_takes_about_500_inputs() -> None:
    states = [after(USUAL, bulk(0.5), 1500, seed) for seed in range(11)]
    delays = sorted(state.found.at for state in states if state.found is not None)
    assert len(delays) == 11
    assert delays[5] <= 550


@pytest.mark.parametrize("seed", SEEDS)
def test_a_strong_shift_after_many_clean_inputs_is_found_as_well(seed: int) -> None:
    def traffic(rng: random.Random, index: int) -> Observation:
        return bulk(1.0 if index < 5900 else 0.5)(rng, index)

    found = after(USUAL, traffic, 7400, seed).found
    assert found is not None
    assert found.at > 5900


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_nightfall_is_found_before_it_is_dark(seed: int) -> None:
    def traffic(rng: random.Random, index: int) -> Observation:
        return bulk(1.0 - 0.7 * index / 10_000)(rng, index)

    assert drift.judge(after(USUAL, traffic, 10_000, seed)).state == "recalibrate"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slight_shift_is_found_over_many_inputs(seed: int) -> None:
    assert drift.judge(after(SURE, bulk(0.7), 16_000, seed)).state == "recalibrate"


def test_drift_is_found_during_an_attack() -> None:
    def traffic(rng: random.Random, index: int) -> Observation:
        return Observation(p_value=FLOOR, predicted=0, flagged=True) if rng.random() < 0.3 else bulk(0.5)(rng, index)

    assert drift.judge(after(USUAL, traffic, 3000, 0)).state == "recalibrate"


def test_everything_flagged_in_every_class_is_drift() -> None:
    state = feed(USUAL, (seen(FLOOR, index % CLASSES) for index in range(1000)))
    assert drift.judge(state).state == "recalibrate"


def test_everything_flagged_in_one_class_is_not_drift() -> None:
    clean = random.Random(0)
    state = feed(USUAL, (seen(FLOOR if index % 2 else clean.uniform(0.02, 1), index % 2) for index in range(2000)))
    judged = drift.judge(state)
    assert (judged.state, judged.flag_rate) == ("steady", 0.5)
    assert "not in most classes" in judged.why


def test_flags_in_every_class_are_told_from_drift_by_what_is_not_flagged() -> None:
    judged = drift.judge(after(USUAL, attack(0.3, targets=CLASSES), 4000, 0))
    assert judged.state == "steady"
    assert "what is not flagged is as promised" in judged.why


def test_without_p_values_flags_in_most_classes_are_drift() -> None:
    flags = (Observation(p_value=None, predicted=index % 9, flagged=index % 4 == 0) for index in range(2000))
    assert drift.judge(feed(USUAL, flags)).state == "recalibrate"


def test_without_p_values_few_flags_are_steady() -> None:
    flags = (Observation(p_value=None, predicted=index % 9, flagged=index % 100 == 0) for index in range(4000))
    assert drift.judge(feed(USUAL, flags)).state == "steady"


@pytest.mark.parametrize("inputs", [199, 1000, 5000])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_table_of_a_real_calibration_causes_no_alarm(inputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.chisquare(8, size=(inputs, 1))
    limits = set_thresholds(raw, np.zeros(inputs, np.int64), 1, FPR, scale=np.ones(1))
    levels = tuple(sorted({share for _, share in limits.score_to_p}))
    scores = rng.chisquare(8, size=5000) / limits.thresholds[0]
    observations = (
        Observation(p_value=p_value(score, limits.score_to_p), predicted=index % CLASSES, flagged=score > 1.0)
        for index, score in enumerate(scores.tolist())
    )
    state = feed(Promise(fpr=FPR, inputs=inputs, levels=levels), observations)
    assert drift.judge(state).state == "steady"


def test_p_values_at_the_lower_end_of_their_step_need_the_table() -> None:
    levels = (0.1, 0.3, 0.6, 1.0)

    def traffic(rng: random.Random, _: int) -> Observation:
        p = rng.random()
        return Observation(p_value=max((x for x in levels if x <= p), default=0.1), predicted=0, flagged=False)

    told, untold = (Promise(fpr=FPR, inputs=10**7, levels=known) for known in (levels, ()))
    assert drift.judge(after(told, traffic, 4000, 0)).state == "steady"
    assert drift.judge(after(untold, traffic, 4000, 0)).state == "recalibrate"


@pytest.mark.parametrize(("p", "upper"), [(0.1, 0.3), (0.05, 0.1), (0.3, 1.0), (1.0, 1.0), (0.0, 0.1)])
def test_a_p_value_is_brought_to_the_upper_end_of_its_step(p: float, upper: float) -> None:
    assert drift.conservative(p, (0.1, 0.3, 1.0)) == upper


def test_without_a_table_a_p_value_is_taken_as_it_is() -> None:
    assert drift.conservative(0.123, ()) == 0.123


def test_a_small_calibration_set_forgives_more() -> None:
    delays = []
    for inputs in (300, 1000, 10_000):
        found = after(Promise(fpr=FPR, inputs=inputs), bulk(0.5, 1), 4000, 4).found
        delays.append(math.inf if found is None else found.at)
    assert delays == sorted(delays, reverse=True)
    assert delays[0] > delays[-1]


def test_alarms_in_all_rounds_of_100_000_inputs_add_up_to_half_a_percent() -> None:
    tests = 2
    short = drift.PER_INPUTS // drift.SEGMENT + drift.SEGMENTS
    long = drift.PER_INPUTS // drift.LONG + 1
    total = tests * (short * drift._round_alpha(drift.SEGMENT) + long * drift._round_alpha(drift.LONG))
    assert total == pytest.approx(drift.STREAM_ALPHA)
    assert drift.STREAM_ALPHA + drift.CALIBRATION_ALPHA == 0.01


@pytest.mark.parametrize("trials", [1, 10, 60])
def test_a_bet_gains_nothing_on_average_at_the_largest_clean_rate(trials: int) -> None:
    plan = drift._plan(USUAL)
    for bet in plan.bulk[:3]:
        mean = sum(
            math.comb(trials, k)
            * plan.low**k
            * (1 - plan.low) ** (trials - k)
            * math.exp(bet.log_e(Counts(inputs=trials, bulk=trials, low=k, middle=k)))
            for k in range(trials + 1)
        )
        assert mean == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("share", "inputs", "bound"), [(0.01, 199, 0.052), (0.25, 1000, 0.2922), (0.5, 1000, 0.5472), (0.25, 10**7, 0.2504)]
)
def test_the_bound_of_a_rate_is_the_binomial_one(share: float, inputs: int, bound: float) -> None:
    upper = drift._rate_upper(share, inputs)
    assert upper == pytest.approx(bound, abs=6e-4)
    assert drift._binomial_cdf(math.ceil(share * inputs), inputs, upper) == pytest.approx(0.005 / 3, rel=1e-2)


def test_few_inputs_are_too_early() -> None:
    judged = drift.judge(after(USUAL, bulk(1.0), drift.MIN_INPUTS - 1, 0))
    assert (judged.state, judged.inputs) == ("too early", drift.MIN_INPUTS - 1)


def test_nothing_seen_is_too_early() -> None:
    judged = drift.judge(drift.begin("g", USUAL))
    assert (judged.state, judged.flag_rate, judged.moved_share) == ("too early", 0.0, 0.0)


def test_the_flag_rate_is_of_recent_inputs() -> None:
    state = feed(USUAL, (seen(FLOOR if index >= 4000 else 0.9, 0) for index in range(5000)))
    assert drift.judge(state).flag_rate == 1.0


@pytest.mark.parametrize(("a", "share"), [(1.0, 0.0), (0.3, 1.0)])
def test_the_share_of_moved_classes_is_told(a: float, share: float) -> None:
    assert drift.judge(after(USUAL, bulk(a), 3000, 0)).moved_share == share


def test_an_alarm_stays_when_the_night_ends() -> None:
    state = after(USUAL, lambda rng, index: bulk(0.4 if index < 1000 else 1.0)(rng, index), 4000, 0)
    assert state.found is not None
    assert state.found.at <= 1000
    assert drift.judge(state).state == "recalibrate"


class _Calibration(msgspec.Struct):
    n_threshold: int = 1000


class _Metadata(msgspec.Struct):
    """What of the guard's metadata counts here."""

    guard_digest: str = "g"
    fpr: float = FPR
    score_to_p: tuple[tuple[float, float], ...] = ((0.1, 1.0), (0.5, 0.4), (0.6, 0.4), (1.0, 0.01))
    calibration: _Calibration = msgspec.field(default_factory=_Calibration)


def test_the_promise_is_read_from_the_metadata() -> None:
    assert drift.promise_of(_Metadata()) == Promise(fpr=FPR, inputs=1000, levels=(0.01, 0.4, 1.0))  # type: ignore[arg-type]


def test_the_state_survives_a_restart() -> None:
    state = after(drift.promise_of(_Metadata()), bulk(0.5), 3000, 0)  # type: ignore[arg-type]
    kept = msgspec.json.decode(msgspec.json.encode(state), type=State)
    assert state.found is not None
    assert drift.resume(kept, _Metadata()) == state  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [_Metadata(guard_digest="another"), _Metadata(fpr=0.02), _Metadata(calibration=_Calibration(n_threshold=500))],
)
def test_another_guard_starts_anew(changed: _Metadata) -> None:
    state = after(drift.promise_of(_Metadata()), bulk(0.5), 1000, 0)  # type: ignore[arg-type]
    assert drift.resume(state, changed) == drift.begin(changed.guard_digest, drift.promise_of(changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("segments", [(), ((Counts(),),), ((Counts(),) * drift.GROUPS,) * 2])
def test_a_kept_state_of_another_size_starts_anew(segments: tuple[tuple[Counts, ...], ...]) -> None:
    fresh = drift.resume(None, _Metadata())  # type: ignore[arg-type]
    kept = dataclasses.replace(fresh, inputs=7, segments=segments)
    assert drift.resume(kept, _Metadata()) == fresh  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf])
def test_a_p_value_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ModelError, match="p-value"):
        drift.update(drift.begin("g", USUAL), Observation(p_value=p, predicted=0, flagged=False))


@pytest.mark.parametrize(
    ("fpr", "inputs", "levels"), [(0.0, 10, ()), (1.0, 10, ()), (0.01, 0, ()), (0.01, 9, (0.5, 0.1)), (0.01, 9, (0.0,))]
)
def test_a_promise_that_no_calibration_makes_is_refused(fpr: float, inputs: int, levels: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="guard metadata"):
        Promise(fpr=fpr, inputs=inputs, levels=levels)


observations = st.builds(
    Observation,
    p_value=st.none() | st.floats(0.0, 1.0),
    predicted=st.none() | st.integers(-(2**40), 2**40),
    flagged=st.booleans(),
)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(observations, min_size=1, max_size=60),
    st.integers(1, 10**6),
    st.lists(st.floats(1e-6, 1.0), max_size=32, unique=True),
)
def test_any_traffic_is_judged_from_counts_of_bounded_number(
    seen_inputs: list[Observation], inputs: int, levels: list[float]
) -> None:
    state = feed(Promise(fpr=FPR, inputs=inputs, levels=tuple(sorted(levels))), seen_inputs * 5)
    judged = drift.judge(state)
    assert judged.inputs == 5 * len(seen_inputs)
    assert 0.0 <= judged.flag_rate <= 1.0
    assert 0.0 <= judged.moved_share <= 1.0
    assert len(state.segments) <= drift.SEGMENTS
    assert {len(groups) for groups in (*state.segments, state.long)} == {drift.GROUPS}
    assert sum(counts.inputs for counts in state.long) == judged.inputs


@settings(deadline=None, max_examples=50)
@given(observations)
def test_an_update_leaves_the_state_it_was_given_as_it_was(observation: Observation) -> None:
    state = drift.begin("g", USUAL)
    assert drift.update(state, observation) == drift.update(state, observation)
    assert state == drift.begin("g", USUAL)
