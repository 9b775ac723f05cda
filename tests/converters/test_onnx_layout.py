"""The arithmetic behind the ONNX import: orders of axes, reshapes, windows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.onnx_import import layout
from converters.onnx_import.windows import Window

FACTORS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(FACTORS, st.data())
def test_blocks_hold_the_same_elements_and_every_axis_once(factors: list[int], data: st.DataObject) -> None:
    def grouped() -> list[int]:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(factors)), max_size=4)))
        edges = [0, *cuts, len(factors)]
        return [math.prod(factors[a:b]) for a, b in pairwise(edges)]

    source, target = grouped(), grouped()
    found = layout.blocks(source, target)
    assert [axis for old, _ in found for axis in old] == list(range(len(source)))
    assert [axis for _, new in found for axis in new] == list(range(len(target)))
    for old, new in found:
        assert math.prod(source[a] for a in old) == math.prod(target[a] for a in new)


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_moves_bring_one_order_to_another(first: list[int], second: list[int]) -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    moved = np.transpose(np.transpose(array, first), layout.moves(tuple(first), tuple(second)))
    assert np.array_equal(moved, np.transpose(array, second))


@given(st.permutations(range(4)), st.sets(st.integers(0, 3), min_size=1, max_size=3))
def test_dropping_axes_is_what_a_sum_over_them_leaves(order: list[int], gone: set[int]) -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    lying = np.transpose(array, order).sum(axis=tuple(order.index(axis) for axis in gone))
    left = layout.drop(tuple(order), sorted(gone))
    assert np.array_equal(lying, np.transpose(array.sum(axis=tuple(gone)), left))


def test_new_axes_keep_the_channels_last() -> None:
    assert layout.insert((0, 2, 1), [3]) == (0, 2, 3, 1)
    assert layout.insert((0, 1), [1, 3]) == (0, 1, 2, 3)
    assert layout.insert((), [0, 1]) == (0, 1)


@pytest.mark.parametrize(
    ("wanted", "zero_copies", "result"),
    [((0, -1), True, (2, 12)), ((-1, 2, 2), True, (6, 2, 2)), ((4, 3, 2), False, (4, 3, 2)), ((24,), True, (24,))],
)
def test_reshape_targets(wanted: tuple[int, ...], zero_copies: bool, result: tuple[int, ...]) -> None:
    assert layout.reshape_target((2, 3, 4), wanted, zero_copies=zero_copies) == result


@pytest.mark.parametrize("wanted", [(5, -1), (-1, -1), (2, 3), (-2, 12), (0, 12, 2)])
def test_a_reshape_that_does_not_fit_is_an_error(wanted: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        layout.reshape_target((2, 3, 4), wanted, zero_copies=wanted[0] != 0)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2))
def test_windows_average_what_they_see(size: int, kernel: int, stride: int, begin: int, end: int) -> None:
    if size + begin + end < kernel:
        return
    window = Window(
        sizes=(size,), kernel=(kernel,), strides=(stride,), dilations=(1,), begin=(begin,), end=(end,), extra=(0,)
    )
    inside = np.pad(np.ones(size), (begin, end))
    seen = [inside[i * stride : i * stride + kernel].sum() for i in range(window.outputs[0])]
    assert window.counts(with_padding=False).tolist() == [max(n, 1) for n in seen]
    assert window.counts(with_padding=True).tolist() == [kernel] * window.outputs[0]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads", "same"),
    [(8, 3, 1, (1, 1), True), (8, 3, 2, (0, 1), True), (8, 3, 2, (1, 1), False), (9, 3, 2, (1, 1), True)],
)
def test_only_tensorflows_own_padding_is_called_same(
    size: int, kernel: int, stride: int, pads: tuple[int, int], same: bool
) -> None:
    window = Window(
        sizes=(size,), kernel=(kernel,), strides=(stride,), dilations=(1,), begin=pads[:1], end=pads[1:], extra=(0,)
    )
    assert window.same is same
