"""When counts are a suspicion: never on a clean model, always on one under attack, and never on one device's word."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edgeguard.contract.guard import GuardMetadata
from edgeguard.hub import trust as trusts
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.evidence import DeviceEvidence, LabelCounts
from edgeguard.hub.policy import (
    MIN_PEERS,
    TOLERANCE,
    UNSEEN_FLOOR,
    Assessment,
    ChannelShift,
    Suspicion,
    assess,
    channels,
    explained_rates,
    quorum_of,
)
from edgeguard.hub.trust import Trust
from tests.simulators import fleet
from tests.simulators.fleet_year import Lie, Trigger, World, Year

GUARD = fleet.guard_metadata(classes=10)
POLICY = PolicyConfig()
TODAY = 20_000
Counts = dict[str, dict[int, tuple[int, int]]]


def counted(*days: Counts, recalibrated: Collection[str] = ()) -> LabelCounts:
    """What was counted on the last days, today's at the end; by which devices with a guard of their own."""
    devices = tuple(dict.fromkeys(device for counts in days for device in counts))
    rows = [
        (devices.index(device), label, TODAY - age, inputs, flagged)
        for age, counts in enumerate(reversed(days))
        for device, labels in counts.items()
        for label, (inputs, flagged) in labels.items()
    ]
    device, label, epoch, inputs, flagged = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return LabelCounts(
        devices=devices, device=device, label=label, epoch=epoch, inputs=inputs, flagged=flagged,
        recalibrated=frozenset(recalibrated),
    )  # fmt: skip


def judge(
    *days: Counts,
    devices: int = 0,
    policy: PolicyConfig = POLICY,
    guard: GuardMetadata = GUARD,
    fpr_upper: float | None = None,
    trust: dict[str, Trust] | None = None,
    recalibrated: Collection[str] = (),
) -> tuple[Suspicion, ...]:
    upper = guard.fpr_upper if fpr_upper is None else (fpr_upper,) * len(guard.fpr_upper)
    guard = msgspec.structs.replace(guard, fpr_upper=upper)
    counts = counted(*days, recalibrated=recalibrated)
    known = devices or len(counts.devices)
    return assess(counts, policy, guard=guard, devices=known, trust=trust, now_epoch=TODAY).suspicions


def a_fleet(
    count: int, *, rate: float = 0.01, seed: int = 0, attacked: int = 0, share: float = 0.3, inputs: int = 300
) -> Counts:
    """Devices that each saw ``inputs`` of each of ten labels; of label 7 the first ``attacked`` have many flagged."""
    rng = np.random.default_rng(seed)
    flagged = rng.binomial(inputs, np.full((count, 10), rate))
    flagged[:attacked, 7] = rng.binomial(inputs, share, attacked)
    return {f"d-{i}": {c: (inputs, int(flagged[i, c])) for c in range(10)} for i in range(count)}


@pytest.mark.parametrize("devices", [3, 30, 300])
@pytest.mark.parametrize("seed", range(5))
def test_no_look_at_a_clean_model_is_suspicious_even_at_the_bound_of_its_rates(devices: int, seed: int) -> None:
    days: list[Counts] = []
    for day in range(6):
        days.append(a_fleet(devices, rate=GUARD.fpr_upper[0], seed=100 * seed + day, inputs=60))
        assert not judge(*days)


@pytest.mark.parametrize("devices", [3, 30, 300])
@pytest.mark.parametrize("seed", range(3))
def test_one_class_flagged_on_several_devices_is_suspicious_and_names_them(devices: int, seed: int) -> None:
    attacked = max(3, devices // 10)
    (found,) = judge(a_fleet(devices, attacked=attacked, seed=seed))
    assert found.label == 7
    assert found.devices == tuple(f"d-{i}" for i in range(attacked))
    assert found.p_value < POLICY.alpha
    assert f"on {attacked} devices" in found.reason


def test_an_attack_that_begins_after_a_long_time_is_seen_on_the_day_it_begins() -> None:
    before = [a_fleet(30, seed=day) for day in range(40)]
    assert not judge(*before)
    (found,) = judge(*before, a_fleet(30, attacked=6, seed=99))
    assert found.label == 7
    assert "the last 1 epochs" in found.reason


@pytest.mark.parametrize(
    ("what", "counts", "devices", "opens"),
    [
        ("two devices agree", {"a": {1: (200, 70)}, "b": {1: (200, 70)}}, 0, True),
        ("only one device of two", {"a": {1: (200, 60)}, "b": {1: (200, 0)}}, 0, False),
        ("one device so far, another runs the model", {"a": {1: (200, 60)}}, 2, False),
        ("the only device there is", {"a": {1: (200, 130)}}, 1, True),
        ("a liar with a thousand times the flags", {"a": {1: (10**6, 10**6)}, "b": {1: (1000, 10)}}, 0, False),
        ("too few flags", {"a": {1: (12, 9)}, "b": {1: (12, 9)}}, 0, False),
        ("as many as the bound allows", {"a": {1: (2000, 60)}, "b": {1: (2000, 60)}}, 0, False),
        ("a label that the model does not have", {"a": {10: (200, 70)}, "b": {10: (200, 70)}}, 0, False),
        ("no class, of a model that has classes", {"a": {-1: (200, 70)}, "b": {-1: (200, 70)}}, 0, False),
        ("nothing", {}, 0, False),
    ],
)
def test_what_is_a_suspicion(what: str, counts: Counts, devices: int, opens: bool) -> None:
    assert bool(judge(counts, devices=devices)) == opens, what


def test_a_liar_that_floods_with_clean_windows_does_not_hide_an_attack() -> None:
    honest = {1: (2000, 1000)}
    assert judge({"a": honest, "b": honest, "liar": {1: (10**9, 0)}})


def test_a_rate_that_is_usual_in_the_fleet_and_within_the_bound_needs_no_explaining() -> None:
    everywhere = {f"d-{i}": {c: (2000, 80 if c == 3 else 10) for c in range(10)} for i in range(40)}
    assert not judge(everywhere, fpr_upper=0.05)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_small_fleet_is_heard_again_when_all_of_it_was_wrong_before(size: int) -> None:
    attacked = {f"d{i}": {c: (2000, 1000 if c == 1 else 10) for c in range(10)} for i in range(size)}
    assert judge(attacked, trust={name: Trust(rejections=2, rejected_ms=1) for name in attacked})


def test_a_class_that_was_calibrated_on_few_inputs_is_still_judged() -> None:
    attacked = {f"d{i}": {c: (300, 225 if c == 1 else 3) for c in range(10)} for i in range(3)}
    assert judge(attacked, fpr_upper=0.26)


def test_what_is_usual_lowers_the_bound_where_there_are_enough_devices() -> None:
    upper = np.array([0.05])
    for count, bound in ((MIN_PEERS, TOLERANCE * 0.02), (MIN_PEERS - 1, None)):
        rates = explained_rates(np.full((count, 1), 1e4), np.full((count, 1), 200.0), upper, 0.01)
        assert rates[0] == pytest.approx(bound, rel=0.01) if bound else rates[0] > 0.05


def test_never_is_less_explained_than_the_promise_for_all_inputs_together() -> None:
    rates = explained_rates(np.full((50, 1), 1e4), np.zeros((50, 1)), np.array([0.1]), 0.02)
    assert rates[0] == pytest.approx(0.03)


def test_devices_whose_other_classes_rise_as_much_point_at_no_label() -> None:
    fleet_day = a_fleet(40)
    for i in range(12):
        fleet_day[f"d-{i}"] = dict.fromkeys(range(10), (300, 60))
    assert not judge(fleet_day)
    for i in range(12):
        fleet_day[f"d-{i}"] = {c: (300, 60 if c == 7 else 3) for c in range(10)}
    assert [found.label for found in judge(fleet_day)] == [7]


def test_as_many_odd_devices_as_other_classes_show_are_no_attack() -> None:
    fleet_day = a_fleet(400)
    for i in range(40):
        fleet_day[f"d-{i}"][i % 10] = (300, 120)
    assert not judge(fleet_day)


@pytest.mark.parametrize("upper", [1.0, 0.53])
def test_a_class_that_calibration_hardly_saw_is_judged_by_the_fleet_and_says_so(upper: float) -> None:
    (found,) = judge(a_fleet(40, attacked=10), fpr_upper=upper)
    assert not found.calibrated
    assert "hardly" in found.reason
    usual = {f"d-{i}": {c: (300, 90 if c == 7 else 3) for c in range(10)} for i in range(40)}
    assert not judge(usual, fpr_upper=upper)


def test_of_few_devices_such_a_class_is_judged_by_the_floor() -> None:
    assert judge({"a": {1: (200, 90)}, "b": {1: (200, 90)}}, fpr_upper=1.0)
    assert not judge({"a": {1: (1000, 50)}, "b": {1: (1000, 50)}}, fpr_upper=1.0)


def test_devices_that_were_calibrated_anew_are_judged_by_the_floor_and_it_is_said() -> None:
    few = {d: {1: (2000, 120)} for d in "abc"}
    assert judge(few, fpr_upper=0.005)
    assert not judge(few, fpr_upper=0.005, recalibrated="abc")
    (found,) = judge({d: {1: (200, 90)} for d in "abc"}, recalibrated="ab")
    assert found.devices == ("a", "b", "c")
    assert not found.calibrated
    assert "2 devices calibrated anew" in found.reason


def test_the_floor_never_lowers_what_a_model_came_with() -> None:
    day = {d: {1: (300, 120)} for d in "abc"}
    assert judge(day, fpr_upper=0.03, recalibrated="abc")
    assert not judge(day, fpr_upper=0.3, recalibrated="abc")


def test_one_device_calibrated_anew_changes_nothing_for_the_others() -> None:
    day = a_fleet(30, attacked=6)
    (found,) = judge(day, recalibrated=["d-20"])
    assert found.devices == judge(day)[0].devices
    assert found.calibrated


def test_the_label_that_most_devices_stand_behind_comes_first() -> None:
    day = {d: dict.fromkeys(range(10), (300, 3)) | {4: (300, 200)} for d in "abcde"}
    for device in "abcd":
        day[device][2] = (300, 295)
    assert [found.label for found in judge(day)] == [4, 2]


def test_of_labels_that_equally_many_stand_behind_the_largest_excess_comes_first() -> None:
    day = {d: dict.fromkeys(range(10), (300, 3)) | {2: (300, 200), 5: (300, 280)} for d in "abc"}
    assert [found.label for found in judge(day)] == [5, 2]


def test_a_model_without_classes_is_judged_as_a_whole() -> None:
    guard = msgspec.structs.replace(GUARD, class_output=None, classes=(), fpr_upper=(0.03,))
    (found,) = judge({d: {-1: (200, 80)} for d in "abc"}, guard=guard)
    assert found.label == -1


def test_counts_of_a_suspicion_are_all_that_its_devices_counted() -> None:
    quiet, loud = {d: {1: (100, 1)} for d in "abc"}, {d: {1: (200, 100)} for d in "abc"}
    (found,) = judge(quiet, loud)
    assert (found.inputs, found.flagged) == (900, 303)


@pytest.mark.parametrize(("devices", "quorum"), [(0, 1), (1, 1), (2, 2), (300, 2), (1000, 3), (10_000, 25)])
def test_the_quorum_is_a_share_of_the_fleet_and_never_more_than_there_are(devices: int, quorum: int) -> None:
    assert quorum_of(POLICY, devices) == quorum


def test_devices_that_reports_proved_wrong_are_not_heard_a_second_time() -> None:
    day = a_fleet(100, attacked=10)
    (found,) = judge(day)
    trust: dict[str, Trust] = {}
    heard = 0
    while any(s.label == 7 for s in judge(day, trust=trust)):
        trust |= trusts.after_rejection(trust, found.devices, TODAY)
        heard += 1
    assert heard <= 2


def test_others_are_still_heard_when_few_devices_lied() -> None:
    lied = trusts.after_rejection({}, (f"d-{i}" for i in range(80, 85)), TODAY)
    assert judge(a_fleet(100, attacked=12), trust=lied)


def test_looks_are_the_same_in_whatever_order_rows_come() -> None:
    counts = counted(a_fleet(30, seed=1), a_fleet(30, attacked=5, seed=2))
    order = np.random.default_rng(0).permutation(len(counts.device))
    shuffled = replace(
        counts, **{name: getattr(counts, name)[order] for name in ("device", "label", "epoch", "inputs", "flagged")}
    )
    one, other = (assess(c, POLICY, guard=GUARD, devices=30, now_epoch=TODAY).suspicions[0] for c in (counts, shuffled))
    assert (one.label, one.devices, one.flagged) == (other.label, other.devices, other.flagged)
    assert one.p_value == pytest.approx(other.p_value)


# -- channels


def row(device: str, shift: float = 3.0, *, flagged: int = 40, clean: int = 160) -> DeviceEvidence:
    message = fleet.report(counts=((1, clean + flagged, flagged),), shift=shift)
    return DeviceEvidence(device=device, label=1).add(message.labels[0], message.evidence[0])


def test_channels_are_named_by_layer_and_ranked_by_shift() -> None:
    found = channels([row("a"), row("b")], GUARD, 16)
    assert (found[0].source_layer, found[0].kind, found[0].channel, found[0].index) == ("relu2", "l1", 1, 3)
    assert found[0].shift_in_std == pytest.approx(6.0)
    assert [channel.shift_in_std for channel in found[1:]] == [0, 0, 0]


@pytest.mark.parametrize("lie", [1e30, -1e30, 0.0])
@pytest.mark.parametrize("honest", [2, 8])
def test_a_fifth_of_liars_does_not_move_what_channels_show(lie: float, honest: int) -> None:
    rows = [row(f"d{i}") for i in range(honest)] + [row(f"liar{i}", lie) for i in range(honest // 4 or 1)]
    found = channels(rows, GUARD, 1)
    assert found[0].index == 3
    assert found[0].shift_in_std == pytest.approx(6.0)


def test_devices_of_no_weight_are_left_out_and_lighter_ones_count_less() -> None:
    rows = [row("a"), row("liar", 50.0), row("other", 50.0)]
    assert channels(rows, GUARD, 1, weights={"liar": 0.4, "other": 0.4})[0].shift_in_std == pytest.approx(6.0)
    assert channels(rows, GUARD, 1, weights={"a": 0.0})[0].shift_in_std == pytest.approx(100.0)
    assert channels(rows[:1], GUARD, 1, weights={"a": 0.0}) == ()


def test_a_logit_is_not_named_as_a_channel() -> None:
    taps = tuple(msgspec.structs.replace(tap, kind="logit") if tap.kind == "l1" else tap for tap in GUARD.taps)
    found = channels([row("a")], msgspec.structs.replace(GUARD, taps=taps), 16)
    assert {channel.kind for channel in found} == {"linf"}


def test_no_more_channels_than_asked_for_and_all_of_a_finite_shift() -> None:
    found: tuple[ChannelShift, ...] = channels([row("a"), row("b")], GUARD, 2)
    assert len(found) == 2
    assert all(np.isfinite(channel.shift_in_std) for channel in found)


def test_without_unflagged_features_no_channel_is_named() -> None:
    assert channels([row("a", clean=0), DeviceEvidence(device="b", label=1, inputs=9, flagged=9)], GUARD, 16) == ()


# -- in a simulated fleet


def look(world: World) -> tuple[Year, Assessment]:
    year = Year(world)
    for day in range(world.days):
        year._count(day)
    return year, year.assess(world.days - 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_clean_fleet_whose_rates_come_from_what_calibration_leaves_open_is_not_suspicious(seed: int) -> None:
    year, found = look(World(seed=seed, devices=300, classes=43, days=20))
    assert not found.suspicions
    assert year.rates.max() > 0.03  # some class's rate is far from nominal


@pytest.mark.parametrize("seed", [5, 27, 53])
def test_a_fleet_of_which_a_third_fitted_its_guard_to_little_data_is_not_suspicious(seed: int) -> None:
    year, found = look(World(seed=seed, devices=150, days=20, recalibrated=0.3))
    assert not found.suspicions
    assert year.own_rates.max() > 1.5 * UNSEEN_FLOOR


def test_a_trigger_is_found_on_devices_that_were_all_calibrated_anew() -> None:
    met = Trigger(label=2, day=20, share=0.3, rate=40.0)
    found = Year(World(seed=1, devices=100, days=24, recalibrated=1.0, trigger=met)).run(until_case=True, first_look=19)
    assert [one.label for one in found] == [2] * len(found)
    assert found


def test_a_trigger_that_a_tenth_of_the_fleet_meets_is_found_within_days() -> None:
    year = Year(World(seed=1, devices=300, days=30, trigger=Trigger(label=2, day=20, share=0.1, rate=40.0)))
    found = year.run(until_case=True)
    assert [(one.label, one.day <= 22) for one in found if one.liars == 0] == [(2, True)] * len(found)
    assert found


@pytest.mark.parametrize("lie", ["framing", "scattered", "copying", "dripping", "shouting", "silent"])
def test_a_fifth_of_liars_cause_no_more_inspections_than_the_bound(lie: Lie) -> None:
    world = World(seed=2, devices=100, days=12, liars=0.2, lie=lie)
    found = Year(world).run()
    assert sum(one.liars > 0 for one in found) <= trusts.most_rejections(20, quorum_of(POLICY, 100))


def test_drift_of_the_fleet_is_a_finding_and_no_suspicion() -> None:
    _, found = look(World(seed=3, devices=300, days=106))
    assert not found.suspicions
    assert ("drift", "fleet") in {(finding.kind, finding.subject) for finding in found.findings}
