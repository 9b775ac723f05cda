"""Adding up evidence, and pooling it so that no device decides alone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.contract.messages import LabelCount
from edgeguard.hub.evidence import DeviceEvidence, LabelCounts, LabelEvidence, capped, pool_label, windows
from tests.simulators import fleet

counts = st.lists(st.integers(0, 10**9), min_size=1, max_size=12)


def device(name: str, *windows: tuple[int, int], label: int = 0, shift: float = 3.0) -> DeviceEvidence:
    total = DeviceEvidence(device=name, label=label)
    for inputs, flagged in windows:
        message = fleet.report(counts=((label, inputs, flagged),), shift=shift)
        total = total.add(message.labels[0], message.evidence[0] if message.evidence else None)
    return total


def pooled(*rows: DeviceEvidence, share: float = 0.5, **weights: float) -> LabelEvidence:
    return pool_label(rows, model_digest=fleet.MODEL, width=fleet.WIDTH, share=share, weights=weights)


def table(*rows: tuple[int, int, int, int, int]) -> LabelCounts:
    """Rows of device, label, epoch, inputs, flagged."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    device, label, epoch, inputs, flagged = columns
    names = tuple("abcdef"[: int(device.max(initial=-1)) + 1])
    return LabelCounts(devices=names, device=device, label=label, epoch=epoch, inputs=inputs, flagged=flagged)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8), st.randoms())
def test_the_order_of_windows_does_not_matter(windows: list[tuple[int, int]], random: Random) -> None:
    valid = [(a + b, b) for a, b in windows]
    shuffled = list(valid)
    random.shuffle(shuffled)
    one, other = device("d", *valid), device("d", *shuffled)
    assert (one.inputs, one.flagged, one.unflagged) == (other.inputs, other.flagged, other.unflagged)
    np.testing.assert_allclose(one.flagged_sum, other.flagged_sum)
    np.testing.assert_allclose(one.unflagged_squares, other.unflagged_squares)


def test_means_and_deviations_are_those_of_all_inputs_together() -> None:
    total = pooled(device("a", (10, 4), (30, 6)), device("b", (20, 10)))
    np.testing.assert_allclose(total.flagged_mean, (1, 2, 3, 7))
    np.testing.assert_allclose(total.unflagged_mean, (1, 2, 3, 4))
    np.testing.assert_allclose(total.unflagged_std, (0.5, 0.5, 0.5, 0.5))


def test_a_window_without_features_still_counts() -> None:
    total = device("a", (10, 2)).add(LabelCount(label=0, inputs=5, flagged=5), None)
    assert (total.inputs, total.flagged, total.flagged_vectors) == (15, 7, 2)


def test_features_of_another_width_are_left_out_and_the_counts_kept() -> None:
    only = pool_label([device("a", (10, 4))], model_digest=fleet.MODEL, width=7, share=1.0)
    assert (only.inputs, only.flagged) == (10, 4)
    assert only.flagged_mean.size == only.unflagged_mean.size == only.unflagged_std.size == 0


@pytest.mark.parametrize(
    ("before", "share", "after"),
    [
        ([10, 10], 0.5, [10, 10]),
        ([100, 10], 0.5, [10, 10]),
        ([100, 10, 10], 0.5, [20, 10, 10]),
        ([1000, 900, 10], 0.4, [20, 20, 10]),
        ([100, 0], 0.5, [100, 0]),
        ([100], 0.5, [100]),
        ([100, 10], 1.0, [100, 10]),
        ([0, 0], 0.5, [0, 0]),
        ([9, 3, 3], 0.1, [3, 3, 3]),
    ],
)
def test_the_largest_are_cut_to_the_share(before: list[float], share: float, after: list[float]) -> None:
    assert capped(before, share) == pytest.approx(after)


@given(counts, st.floats(0.05, 1.0))
def test_nobody_brings_more_than_the_share(before: list[int], share: float) -> None:
    after = capped(before, share)
    contributors = sum(count > 0 for count in before)
    assert max(after) <= max(share, 1 / max(contributors, 1)) * sum(after) * (1 + 1e-6)
    assert all(new <= old for new, old in zip(after, before, strict=True))


def test_a_device_that_floods_with_flags_brings_half_of_them() -> None:
    total = pooled(device("liar", (10_000, 10_000)), device("a", (10_000, 40)), device("b", (10_000, 60)))
    assert total.flagged == 200


def test_a_device_that_floods_with_clean_windows_hides_nothing() -> None:
    total = pooled(device("liar", (10**9, 0)), device("a", (1000, 100)), device("b", (1000, 100)))
    assert (total.inputs, total.flagged) == (4000, 200)


def honest(count: int) -> list[DeviceEvidence]:
    """Devices of one population: their window means scatter by a tenth of the channels' standard deviation."""
    rng = np.random.default_rng(count)
    rows = []
    for i in range(count):
        row = device(f"d{i}", (200, 100))
        rows.append(
            replace(
                row,
                flagged_sum=row.flagged_sum + 100 * rng.normal(0, 0.05, fleet.WIDTH),
                unflagged_sum=row.unflagged_sum + 100 * rng.normal(0, 0.005, fleet.WIDTH),
            )
        )
    return rows


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
@pytest.mark.parametrize("others", [2, 9])
def test_a_device_that_lies_by_value_moves_no_channel_far(value: float, others: int) -> None:
    rows = honest(others)
    truth = pooled(*rows)
    lie = np.array([1.0, value, 3.0, 7.0], dtype=np.float64)
    lie, squares = np.multiply(lie, 100.0), np.multiply(lie, lie) * 100.0
    liar = replace(device("liar", (200, 100)), flagged_sum=lie, unflagged_sum=lie, unflagged_squares=squares)
    total = pooled(*rows, liar)
    np.testing.assert_allclose(total.flagged_mean, truth.flagged_mean, atol=0.5)
    np.testing.assert_allclose(total.unflagged_mean, truth.unflagged_mean, atol=0.5)
    np.testing.assert_allclose(total.unflagged_std, truth.unflagged_std, atol=0.5)


def test_a_spread_that_only_a_liar_reports_does_not_widen_the_bounds() -> None:
    rows = [device(name, (100, 100)) for name in "abc"]
    lie = np.full(fleet.WIDTH, 1e30)
    liar = replace(device("liar", (200, 100)), flagged_sum=lie, unflagged_squares=np.multiply(lie, lie))
    np.testing.assert_allclose(pooled(*rows, liar).flagged_mean, (1, 2, 3, 7), rtol=0.2)


@pytest.mark.parametrize("count", [3, 4, 10, 50])
def test_the_means_of_honest_devices_stay_what_they_are(count: int) -> None:
    rows = honest(count)
    total = pooled(*rows, share=1.0)
    np.testing.assert_allclose(total.flagged_mean, sum(r.flagged_sum for r in rows) / (100 * count), atol=1e-3)
    np.testing.assert_allclose(total.unflagged_mean, sum(r.unflagged_sum for r in rows) / (100 * count), atol=1e-3)


def test_of_two_devices_that_disagree_neither_is_clipped() -> None:
    total = pooled(device("a", (20, 10)), device("b", (20, 10), shift=1e6))
    assert total.flagged_mean[-1] == pytest.approx(4 + (3 + 1e6) / 2)


def test_what_each_device_counted_is_kept_as_it_was() -> None:
    total = pooled(device("liar", (100, 90)), device("a", (100, 10)))
    assert [(d.device, d.inputs, d.flagged) for d in total.per_device] == [("a", 100, 10), ("liar", 100, 90)]


def test_a_device_that_was_wrong_before_moves_the_means_less() -> None:
    rows = [device("a", (20, 10), shift=0.0), device("b", (20, 10), shift=4.0)]
    assert pooled(*rows).flagged_mean[-1] == pytest.approx(6.0)
    assert pooled(*rows, b=1 / 3).flagged_mean[-1] == pytest.approx(5.0)
    assert pooled(*rows, b=0.0).flagged_mean[-1] == pytest.approx(4.0)


def test_windows_are_all_that_is_kept_and_the_last_epochs_by_doublings() -> None:
    counts = table(*((0, 0, epoch, 1, 0) for epoch in (*range(85, 101), 0)))
    found = {window.epochs: int(window.inputs[0, 0]) for window in windows(counts, 1, 100)}
    assert found == {None: 17, 1: 1, 2: 2, 4: 4, 8: 8, 16: 16}


def test_windows_that_add_nothing_are_left_out() -> None:
    assert [window.epochs for window in windows(table((0, 0, 90, 1, 0), (0, 0, 100, 1, 0)), 1, 100)] == [None, 1]
    assert [window.epochs for window in windows(table(), 3, 100)] == [None]


def test_rows_of_epochs_to_come_count_as_of_this_one() -> None:
    found = list(windows(table((0, 0, 101, 7, 1), (0, 0, 90, 1, 0)), 1, 100))
    assert [(window.epochs, window.inputs.sum()) for window in found] == [(None, 8), (1, 7)]


def test_windows_hold_devices_and_labels_apart_and_leave_out_labels_that_do_not_exist() -> None:
    counts = table((0, 1, 9, 5, 2), (1, 0, 9, 7, 3), (1, 0, 9, 1, 1), (1, 2, 9, 100, 100), (0, -1, 9, 100, 100))
    (window,) = windows(counts, 2, 9)
    assert window.inputs.tolist() == [[0, 5], [8, 0]]
    assert window.flagged.tolist() == [[0, 2], [4, 0]]


def test_the_label_of_a_model_without_classes_is_minus_one() -> None:
    (window,) = windows(table((0, -1, 9, 5, 2), (0, 0, 9, 100, 100)), 1, 9, first=-1)
    assert (window.inputs.item(), window.flagged.item()) == (5, 2)


def test_many_rows_add_up_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(0, high, 600_000) for high in (6, 5, 40, 9, 9)])
    device, label, epoch, inputs, flagged = rows
    names = tuple("abcdef")
    counts = LabelCounts(devices=names, device=device, label=label, epoch=epoch, inputs=inputs, flagged=flagged)
    found = list(windows(counts, 5, 39))
    for window in found:
        recent = rows[:, epoch > 39 - (window.epochs or 40)]
        expected = np.zeros((6, 5))
        np.add.at(expected, (recent[0], recent[1]), recent[3])
        np.testing.assert_array_equal(window.inputs, expected)
