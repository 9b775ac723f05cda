"""When evidence is a suspicion: never on a clean model, always on one under attack, and never on one device's word."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

from edgeguard.contract.guard import Tap
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.evidence import DeviceEvidence, pool
from edgeguard.hub.policy import Suspicion, assess, binomial_tail
from tests.simulators import fleet

GUARD = fleet.guard_metadata(classes=10)
POLICY = PolicyConfig()
Counts = dict[str, dict[int, tuple[int, int]]]


def judge(
    counts: Counts,
    *,
    devices: int | None = None,
    policy: PolicyConfig = POLICY,
    fpr_upper: tuple[float, ...] | None = None,
    taps: tuple[Tap, ...] = GUARD.taps,
) -> list[Suspicion]:
    rows = []
    for device, labels in counts.items():
        for label, (inputs, flagged) in labels.items():
            message = fleet.report(counts=((label, inputs, flagged),))
            evidence = message.evidence[0] if message.evidence else None
            rows.append(DeviceEvidence(device=device, label=label).add(message.labels[0], evidence))
    pooled = pool(rows, model_digest=fleet.MODEL, width=fleet.WIDTH, share=policy.device_share)
    known = len(counts) if devices is None else devices
    upper = GUARD.fpr_upper if fpr_upper is None else fpr_upper
    return assess(pooled, policy, fpr_upper=upper, fpr=GUARD.fpr, taps=taps, devices=known)


def simulate(seed: int, *, rate: float, attacked: float = 0.0, windows: int = 40) -> tuple[list[Suspicion], ...]:
    """A fleet of three that reports window by window, looked at after each; target label 7."""
    rng = np.random.default_rng(seed)
    totals = np.zeros((3, 10, 2), dtype=int)
    looks = []
    for _ in range(windows):
        for device in range(3):
            predicted = rng.integers(0, 10, 64)
            triggered = rng.random(64) < attacked
            predicted[triggered] = 7
            flagged = rng.random(64) < np.where(triggered, 0.95, rate)
            totals[device, :, 0] += np.bincount(predicted, minlength=10)
            totals[device, :, 1] += np.bincount(predicted[flagged], minlength=10)
        counts = {f"d{d}": {c: (int(n), int(f)) for c, (n, f) in enumerate(totals[d])} for d in range(3)}
        looks.append(judge(counts))
    return tuple(looks)


@pytest.mark.parametrize("seed", range(60))
def test_no_look_at_a_clean_model_is_suspicious_even_at_the_bound_of_its_rate(seed: int) -> None:
    assert all(not look for look in simulate(seed, rate=GUARD.fpr_upper[0], windows=25))


@pytest.mark.parametrize("seed", range(10))
def test_an_attacked_model_is_suspicious_for_its_target_label_and_stays_so(seed: int) -> None:
    looks = simulate(seed, rate=0.01, attacked=0.1)
    first = next(i for i, look in enumerate(looks) if look)
    assert first < 20
    assert all(look[0].label == 7 for look in looks[first:])


@pytest.mark.parametrize(
    ("what", "counts", "devices", "opens"),
    [
        ("two devices agree", {"a": {1: (200, 30)}, "b": {1: (200, 30)}}, None, True),
        ("only one device of two", {"a": {1: (200, 60)}, "b": {1: (200, 0)}}, None, False),
        ("one device so far, another runs the model", {"a": {1: (200, 60)}}, 2, False),
        ("the only device there is", {"a": {1: (200, 60)}}, 1, True),
        ("a liar with a thousand times the flags", {"a": {1: (10**6, 10**6)}, "b": {1: (1000, 10)}}, None, False),
        ("too few flags", {"a": {1: (12, 9)}, "b": {1: (12, 9)}}, None, False),
        ("as many as the bound allows", {"a": {1: (2000, 60)}, "b": {1: (2000, 60)}}, None, False),
        ("a label that the model does not have", {"a": {10: (200, 60)}, "b": {10: (200, 60)}}, None, False),
        ("no class, of a model that has classes", {"a": {-1: (200, 60)}, "b": {-1: (200, 60)}}, None, False),
    ],
)
def test_what_opens_a_case(what: str, counts: Counts, devices: int | None, opens: bool) -> None:
    assert bool(judge(counts, devices=devices)) == opens, what


def test_a_liar_that_floods_with_clean_windows_does_not_hide_an_attack() -> None:
    honest = {1: (2000, 300)}
    assert judge({"a": honest, "b": honest, "liar": {1: (10**9, 0)}})


@pytest.mark.parametrize("upper", [1.0, 0.53])
def test_a_class_that_calibration_hardly_saw_is_judged_by_the_joint_promise(upper: float) -> None:
    uppers = (upper,) * 10
    (found,) = judge({"a": {1: (200, 90)}, "b": {1: (200, 90)}}, fpr_upper=uppers)
    assert not found.calibrated
    assert not judge({"a": {1: (1000, 50)}, "b": {1: (1000, 50)}}, fpr_upper=uppers)


def test_the_joint_promise_is_used_where_it_is_above_the_floor() -> None:
    rows = [DeviceEvidence(device=d, label=1, inputs=1000, flagged=100) for d in "ab"]
    pooled = pool(rows, model_digest=fleet.MODEL, width=fleet.WIDTH, share=0.5)
    for fpr, opens in ((0.01, True), (0.1, False)):
        assert bool(assess(pooled, POLICY, fpr_upper=(1.0, 1.0), fpr=fpr, taps=GUARD.taps, devices=2)) == opens


def test_a_class_with_a_bound_of_its_own_is_judged_by_that_alone() -> None:
    counts = {"a": {1: (200, 90)}, "b": {1: (200, 90)}}
    assert not judge(counts, fpr_upper=(0.49,) * 10)
    assert judge(counts)[0].calibrated


def test_the_label_with_the_largest_excess_comes_first() -> None:
    labels = {1: (200, 40), 2: (200, 90), 3: (200, 60)}
    assert [s.label for s in judge({"a": labels, "b": labels})] == [2, 3, 1]


def test_channels_are_named_by_layer_and_ranked_by_shift() -> None:
    (found,) = judge({"a": {1: (200, 40)}, "b": {1: (200, 40)}})
    first = found.channels[0]
    assert (first.source_layer, first.kind, first.channel, first.index) == ("relu2", "l1", 1, 3)
    assert first.shift_in_std == pytest.approx(6.0)
    assert [c.shift_in_std for c in found.channels[1:]] == [0, 0, 0]


def test_a_logit_is_not_named_as_a_channel() -> None:
    taps = tuple(msgspec.structs.replace(tap, kind="logit") if tap.kind == "l1" else tap for tap in GUARD.taps)
    (found,) = judge({"a": {1: (200, 40)}, "b": {1: (200, 40)}}, taps=taps)
    assert found.channels
    assert {channel.kind for channel in found.channels} == {"linf"}


def test_no_more_channels_than_asked_for() -> None:
    (found,) = judge({"a": {1: (200, 40)}, "b": {1: (200, 40)}}, policy=PolicyConfig(channels=2))
    assert len(found.channels) == 2


def test_a_channel_that_clean_inputs_never_move_has_a_finite_shift() -> None:
    row = judge({"a": {1: (200, 40)}, "b": {1: (200, 40)}})
    assert all(np.isfinite(c.shift_in_std) for c in row[0].channels)


def test_without_unflagged_features_no_channel_is_named() -> None:
    (found,) = judge({"a": {1: (40, 40)}, "b": {1: (40, 40)}})
    assert found.channels == ()


def test_a_model_without_classes_is_judged_as_a_whole() -> None:
    rows = [DeviceEvidence(device=d, label=-1, inputs=200, flagged=60) for d in "ab"]
    pooled = pool(rows, model_digest=fleet.MODEL, width=fleet.WIDTH, share=0.5)
    found = assess(pooled, POLICY, fpr_upper=(0.03,), fpr=GUARD.fpr, taps=GUARD.taps, devices=2)
    assert [s.label for s in found] == [-1]


@pytest.mark.parametrize(
    ("successes", "trials", "rate"),
    [
        (0, 10, 0.1),
        (1, 10, 0.1),
        (10, 10, 0.1),
        (11, 10, 0.1),
        (60, 1000, 0.01),
        (500, 1000, 0.5),
        (10**6, 10**8, 0.01),
    ],
)
def test_the_tail_is_the_binomial_one(successes: int, trials: int, rate: float) -> None:
    assert binomial_tail(successes, trials, rate) == pytest.approx(
        float(binom.sf(successes - 1, trials, rate)), rel=1e-6
    )
