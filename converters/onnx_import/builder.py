"""What operators build with: values, their orders of axes, names, and folding of constants.

Rules enforced here:

* a value that depends on no input is a NumPy array and stays one: the same function that builds a layer for an input
  computes a constant at once, so that arithmetic on shapes disappears;
* where the batch axis is free it is axis 0 of every Keras tensor and stays there; an operator that would mix the inputs
  of a batch raises :class:`MixesBatch`;
* no tensor outgrows ``graph.MAX_ELEMENTS``, looked up before it is computed, nor all constants and weights together
  ``graph.MAX_WEIGHTS``: a small file may ask for any amount of memory;
* every layer and operation is named after its ONNX node, each name once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from converters.onnx_import import layout
from converters.onnx_import.graph import MAX_ELEMENTS, MAX_RANK, MAX_WEIGHTS, Array, Node, sanitised
from converters.onnx_import.layout import Order
from edgeguard.errors import ModelError


class MixesBatch(Exception):  # noqa: N818 - not an error by itself: the conversion is tried with a fixed batch
    """An operator would compute across the inputs of a batch."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    ``tensor`` is an array (a constant, always in plain order) or a Keras tensor; ``shape`` is in ONNX's order, with the
    batch that the file states, 1 where it states none. ``nonnegative`` is True where that is known.
    """

    tensor: Any
    order: Order
    shape: tuple[int, ...]
    nonnegative: bool = False

    @property
    def constant(self) -> bool:
        """True for an array."""
        return isinstance(self.tensor, np.ndarray)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.order)


def constant(array: Any) -> Value:
    """A constant as a value."""
    array = np.asarray(array)
    return Value(array, layout.plain(array.ndim), array.shape)


class Builder:
    """Builds one Keras graph.

    Args:
        batch: the size that stands for the free batch axis, None for a graph of fixed shapes.
        open_batch: the file leaves the batch open, rather than stating that size.
    """

    def __init__(self, batch: int | None, *, open_batch: bool = False) -> None:
        self.batch = batch
        self.open_batch = open_batch
        self.values: dict[str, Value] = {}
        self._names: set[str] = set()
        self._numbers: Counter[str] = Counter()
        self._spent = 0
        self._node = "unnamed"

    def unique(self, name: str) -> str:
        """``name``, or the first of ``name_2, name_3, ...`` that is not taken, as Keras accepts it."""
        base = candidate = sanitised(name)
        while candidate.lower() in self._names:
            self._numbers[base] += 1
            candidate = f"{base}_{self._numbers[base] + 1}"
        self._names.add(candidate.lower())
        return candidate

    def enter(self, node: Node) -> None:
        """Name what follows after ``node``."""
        self._node = node.name

    def spend(self, elements: int) -> None:
        """Count elements that stay in memory.

        Raises:
            ModelError: there are too many.
        """
        self._spent += elements
        if self._spent > MAX_WEIGHTS:
            raise ModelError("ONNX model", got="too many weights", expected=f"at most {MAX_WEIGHTS}")

    def value(self, tensor: Any, order: Order, *, nonnegative: bool = False) -> Value:
        """A value for the result of an operator; ``order`` says how it lies."""
        if isinstance(tensor, np.ndarray):
            return constant(np.transpose(tensor, np.argsort(order)).copy())
        sizes = self.sizes(tensor)
        return Value(tensor, order, tuple(sizes[order.index(axis)] for axis in range(len(order))), nonnegative)

    def sizes(self, tensor: Any) -> tuple[int, ...]:
        """The shape of a tensor as it lies, with the stated batch for the free axis."""
        return tuple(self.batch or 1 if size is None else int(size) for size in tensor.shape)

    def apply(self, function: Callable[..., Any], *data: Any, **settings: Any) -> Any:
        """Call a function of ``keras.ops`` or a layer on tensors, or at once on arrays.

        Raises:
            ModelError: the result would be too large.
        """
        if any(_is_live(d) for d in data):
            result = function(*data, **settings)
            self._check_size(result)
            if not isinstance(function, keras.layers.Layer):
                first = result[0] if isinstance(result, list | tuple) else result
                first._keras_history.operation.name = self.unique(f"{self._node}_{function.__name__}")
            return result
        self._check_size(function(*(_symbol(d) for d in data), **settings))
        result = function(*data, **settings)
        return [np.asarray(r) for r in result] if isinstance(result, list | tuple) else np.asarray(result)

    def layer(self, kind: Callable[..., Any], data: Any, weights: Sequence[Array] = (), **settings: Any) -> Any:
        """Call a new layer, named after the node; ``weights`` become its own."""
        layer = kind(name=self.unique(self._node), **settings)
        if weights:
            self.spend(sum(w.size for w in weights))
            layer.build(data.shape)
            layer.set_weights([np.asarray(w, np.float32) for w in weights])
        return self.apply(layer, data)

    def ordered(self, value: Value, order: Order) -> Any:
        """The value's tensor, lying in ``order``.

        Raises:
            MixesBatch: the batch axis would move.
        """
        if value.order == order:
            return value.tensor
        if value.constant:
            return np.transpose(value.tensor, order).copy()
        if self.batch is not None and value.order[0] != order[0]:
            raise MixesBatch
        large = [axis for axis in value.order if value.shape[axis] != 1 or axis == order[0]]
        if large == [axis for axis in order if axis in large]:
            return self.reshaped(value.tensor, [value.shape[axis] for axis in order])
        return self.apply(keras.ops.transpose, value.tensor, axes=layout.moves(value.order, order))

    def plain(self, value: Value) -> Any:
        """The value's tensor in ONNX's own order."""
        return self.ordered(value, layout.plain(value.rank))

    def reshaped(self, tensor: Any, sizes: Sequence[int]) -> Any:
        """A tensor with other sizes, the batch axis kept free where it is."""
        free = self.batch is not None and not isinstance(tensor, np.ndarray)
        if tuple(sizes) == self.sizes(tensor):
            return tensor
        return self.apply(keras.ops.reshape, tensor, newshape=(-1, *sizes[1:]) if free else tuple(sizes))

    def spatial_axis(self, value: Value, axis: int) -> int:
        """Where an ONNX axis of ``value`` lies, for an operator that computes along it.

        Raises:
            MixesBatch: it is the batch axis.
        """
        place = value.order.index(normalised(axis, value.rank))
        if place == 0 and self.batch is not None and not value.constant:
            raise MixesBatch
        return place

    def align(self, values: Sequence[Value]) -> tuple[list[Any], Order]:
        """Bring operands to one rank and order, ready to broadcast.

        Raises:
            MixesBatch: a constant differs along the batch axis, or the axis lies elsewhere.
        """
        shape = np.broadcast_shapes(*(v.shape for v in values))
        if math.prod(shape) > MAX_ELEMENTS:
            raise ModelError("operator " + self._node, got=f"a result of shape {list(shape)}", do="use a smaller model")
        rank = len(shape)
        live = [v for v in values if not v.constant]
        if not live:
            return [v.tensor for v in values], layout.plain(rank)
        lead = max(live, key=lambda v: (v.rank, math.prod(v.shape)))
        order = self.expanded(lead, range(rank - lead.rank)).order
        dtype = lead.tensor.dtype
        tensors: list[Any] = []
        for value in values:
            wide = self.expanded(value, range(rank - value.rank))
            tensor = self.ordered(wide, order)
            if value.constant:
                if self.batch is not None and tensor.shape[0] != 1:
                    raise MixesBatch
                tensor = _without_leading_ones(tensor).astype(dtype)
            tensors.append(tensor)
        return tensors, order

    def expanded(self, value: Value, axes: Sequence[int]) -> Value:
        """A value with new ONNX axes of size one, numbered as in the result.

        Raises:
            MixesBatch: one would come before the batch axis.
        """
        if not len(axes):
            return value
        if value.rank + len(axes) > MAX_RANK:
            raise ValueError(f"{value.rank + len(axes)} axes")
        order = layout.insert(value.order, axes)
        if not value.constant and self.batch is not None and order[0] in axes:
            raise MixesBatch
        sizes = iter(value.shape)
        shape = [1 if axis in axes else next(sizes) for axis in range(len(order))]
        if value.constant:
            return constant(value.tensor.reshape(shape))
        return self.value(self.reshaped(value.tensor, [shape[axis] for axis in order]), order)

    def _check_size(self, result: Any) -> None:
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if math.prod(self.sizes(tensor)) > MAX_ELEMENTS:
                raise ModelError(
                    f"operator {self._node}",
                    got=f"a result of shape {list(self.sizes(tensor))}",
                    expected=f"at most {MAX_ELEMENTS} elements",
                    do="use a smaller model",
                )


def normalised(axis: int, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        ValueError: there is no such axis.
    """
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of a tensor with {rank} axes")
    return axis % rank


def known(value: Value | None, what: str) -> Array:
    """The array of a value that must be a constant.

    Raises:
        ValueError: it depends on an input.
    """
    if value is None or not value.constant:
        raise ValueError(f"{what} is computed from the model's input; only a constant can be used")
    return np.asarray(value.tensor)


def known_ints(value: Value | None, what: str) -> tuple[int, ...]:
    """A constant as integers.

    Raises:
        ValueError: it depends on an input.
    """
    return tuple(int(v) for v in known(value, what).reshape(-1))


def setting(node: Node, name: str, value: Value | None) -> tuple[int, ...] | None:
    """Integers that are an attribute in old opsets and an input in new ones; None where there are neither."""
    return node.ints(name) if value is None else known_ints(value, name)


def _is_live(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return any(_is_live(d) for d in data)
    return isinstance(data, keras.KerasTensor)


def _symbol(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return type(data)(_symbol(d) for d in data)
    return keras.KerasTensor(data.shape, str(data.dtype)) if isinstance(data, np.ndarray) else data


def _without_leading_ones(array: Array) -> Array:
    ones = next((axis for axis, size in enumerate(array.shape) if size != 1), array.ndim)
    return array.reshape(array.shape[ones:])
