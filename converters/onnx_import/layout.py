"""The order in which a tensor's axes lie: pure functions on tuples.

ONNX numbers the axes of an image N, C, H, W; Keras convolutions want N, H, W, C. Nothing is transposed to hold the one
numbering in the other: each tensor carries an order, and only an operator that needs another one pays for it.

An order says which ONNX axis lies at each place: ``(0, 2, 3, 1)`` is an image with its channels last.
``np.transpose(onnx_array, order)`` gives the array as it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Order: TypeAlias = tuple[int, ...]
Block: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def plain(rank: int) -> Order:
    """The order of ONNX itself."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """N, spatial axes, C; fewer than three axes have no spatial ones and stay as they are."""
    return (0, *range(2, rank), 1) if rank > 2 else plain(rank)


def moves(source: Order, target: Order) -> tuple[int, ...]:
    """The axes to give to a transpose that brings ``source`` to ``target``."""
    return tuple(source.index(axis) for axis in target)


def drop(order: Order, axes: Sequence[int]) -> Order:
    """The order that is left when ONNX axes disappear."""
    return tuple(axis - sum(gone < axis for gone in axes) for axis in order if axis not in axes)


def insert(order: Order, axes: Sequence[int]) -> Order:
    """The order once ONNX axes of size one appear, numbered as in the result.

    A new axis lies behind the one that comes before it in ONNX's numbering, so that plain stays plain and an image made
    of a signal keeps its channels last.
    """
    result = list(order)
    for new in sorted(axes):
        result = [axis + (axis >= new) for axis in result]
        result.insert(result.index(new - 1) + 1 if new else 0, new)
    return tuple(result)


def blocks(source: Sequence[int], target: Sequence[int]) -> list[Block]:
    """Split a reshape into the smallest independent ones.

    Args:
        source: sizes before, of the same product as
        target: sizes after.

    Returns:
        Pairs of axes before and axes after that hold the same elements, in order. Axes of size one that are left over
        stand in a block with an empty side.
    """
    if 0 in source:
        return [(tuple(range(len(source))), tuple(range(len(target))))]
    found: list[Block] = []
    i = j = 0
    while i < len(source) and j < len(target):
        first, second = i, j
        before, after = source[i], target[j]
        i, j = i + 1, j + 1
        while before != after:
            if before < after:
                before, i = before * source[i], i + 1
            else:
                after, j = after * target[j], j + 1
        found.append((tuple(range(first, i)), tuple(range(second, j))))
    if i < len(source):
        found.append((tuple(range(i, len(source))), ()))
    if j < len(target):
        found.append(((), tuple(range(j, len(target)))))
    return found


def reshape_target(current: Sequence[int], wanted: Sequence[int], *, zero_copies: bool) -> tuple[int, ...]:
    """Resolve the 0 and -1 of a reshape.

    Raises:
        ValueError: the sizes do not fit.
    """
    sizes = [current[i] if size == 0 and zero_copies else int(size) for i, size in enumerate(wanted)]
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        if rest <= 0 or math.prod(current) % rest:
            raise ValueError(f"{list(current)} does not fit {list(wanted)}")
        sizes[sizes.index(-1)] = math.prod(current) // rest
    if min(sizes, default=0) < 0 or math.prod(sizes) != math.prod(current):
        raise ValueError(f"{list(current)} does not fit {list(wanted)}")
    return tuple(sizes)
