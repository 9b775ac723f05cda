"""Arithmetic of several tensors that broadcast, and reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from converters.onnx_import.builder import Builder, Value, constant, normalised, setting
from converters.onnx_import.graph import Node
from converters.onnx_import.layout import drop
from converters.onnx_import.registry import operator


def add(g: Builder, a: Any, b: Any) -> Any:
    """A sum that broadcasts as NumPy does; see :func:`is_taken_for_bias`."""
    if is_taken_for_bias(g, a, b):
        return g.apply(ops.subtract, a, g.apply(ops.negative, b))
    return g.apply(ops.add, a, b)


def is_taken_for_bias(g: Builder, a: Any, b: Any) -> bool:
    """True where Keras on TensorFlow might add ``b`` along a wrong axis.

    It takes a second operand with a single axis longer than 1 for a bias along the last axis of that length, or along
    axis 1, even where that axis stands elsewhere. Which axes are longer than 1 changes with the size of the batch.
    """
    first, second = g.sizes(a), g.sizes(b)
    if len(first) < 2 or first == second:
        return False
    one_rank = len(first) == len(second)
    large = [axis for axis in range(one_rank, len(second)) if second[axis] != 1]
    if not large:
        return one_rank
    return len(large) == 1 and (large[0] != len(second) - 1 or first[-1] != second[-1])


_BINARY: dict[str, tuple[Callable[..., Any], Any]] = {
    "Add": (ops.add, layers.Add),
    "Sub": (ops.subtract, layers.Subtract),
    "Mul": (ops.multiply, layers.Multiply),
    "Div": (ops.divide, None),
    "Pow": (ops.power, None),
}
_VARIADIC: dict[str, tuple[Callable[..., Any], Any]] = {
    "Max": (ops.maximum, layers.Maximum),
    "Mean": (ops.add, layers.Average),
    "Min": (ops.minimum, layers.Minimum),
    "Sum": (ops.add, layers.Add),
}
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMax": ops.max,
    "ReduceMean": ops.mean,
    "ReduceMin": ops.min,
    "ReduceSum": ops.sum,
}


@operator(*_BINARY)
def binary(g: Builder, node: Node, a: Value, b: Value) -> Value:
    """Two operands, or a constant on either side."""
    node.ignore("consumed_inputs")
    if node.opset < 7 and node.one_of("broadcast", 0, (0, 1)):
        axis = node.take("axis", None)
        if axis is not None:  # the second one's axes start at this axis of the first
            behind = a.rank - b.rank - normalised(int(axis), a.rank)
            b = g.expanded(b, range(b.rank, b.rank + behind))
    if node.operator == "Pow" and b.constant and not a.constant and b.tensor.size == 1 and float(b.tensor.flat[0]) == 2:
        return g.value(g.apply(ops.square, a.tensor), a.order, nonnegative=True)
    if node.operator == "Div" and not _floating(b):
        return _quotient(g, a, b)
    return _combined(g, [a, b], *_BINARY[node.operator])


def _floating(value: Value) -> bool:
    return np.dtype(keras.backend.standardize_dtype(value.tensor.dtype)).kind == "f"


def _quotient(g: Builder, a: Value, b: Value) -> Value:
    """Integers, rounded towards zero, as arithmetic on shapes needs it."""
    if not a.constant or not b.constant or (b.tensor == 0).any():
        raise ValueError("a division of integers that are computed from the input, or by zero")
    (first, second), _ = g.align([a, b])
    return constant(np.trunc(first / second).astype(first.dtype))


@operator(*_VARIADIC)
def variadic(g: Builder, node: Node, *values: Value) -> Value:
    """Any number of operands."""
    node.ignore("consumed_inputs")
    if len(values) == 1:
        return values[0]
    result = _combined(g, list(values), *_VARIADIC[node.operator])
    if node.operator == "Mean" and not _mergeable(g, g.align(values)[0]):
        return g.value(g.apply(ops.divide, result.tensor, np.float32(len(values))), result.order)
    return result


def _combined(g: Builder, values: list[Value], function: Callable[..., Any], kind: Any) -> Value:
    """A named Keras layer where all operands are computed, an operation where one is a constant."""
    tensors, order = g.align(values)
    if kind is not None and _mergeable(g, tensors):
        return g.value(g.layer(kind, tensors), order)
    pair = functools.partial(add, g) if function is ops.add else functools.partial(g.apply, function)
    return g.value(functools.reduce(pair, tensors), order)


def _mergeable(g: Builder, tensors: list[Any]) -> bool:
    """What Keras's merging layers take: computed tensors of one rank and batch."""
    if any(isinstance(t, np.ndarray) for t in tensors):
        return False
    alike = len({(len(t.shape), t.shape[0]) for t in tensors}) == 1
    return alike and len(tensors[0].shape) > 1 and not any(is_taken_for_bias(g, tensors[0], t) for t in tensors[1:])


@operator(*_REDUCTIONS)
def reduce(g: Builder, node: Node, x: Value, axes: Value | None = None) -> Value:
    """One value along some axes, by default along all."""
    keep = bool(node.one_of("keepdims", 1, (0, 1)))
    chosen = setting(node, "axes", axes)
    nothing = node.one_of("noop_with_empty_axes", 0, (0, 1))
    if not chosen and nothing:
        return x
    gone = [normalised(axis, x.rank) for axis in chosen or range(x.rank)]
    places = tuple(sorted(g.spatial_axis(x, axis) for axis in gone))
    result = g.apply(_REDUCTIONS[node.operator], x.tensor, axis=places, keepdims=keep)
    if x.constant:
        return constant(result)
    return g.value(result, x.order if keep else drop(x.order, gone))
