"""Pooling, on tensors with their channels last."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers, ops

from converters.onnx_import import windows
from converters.onnx_import.builder import Builder, Value
from converters.onnx_import.convolution import pad
from converters.onnx_import.graph import Node
from converters.onnx_import.layout import channels_last
from converters.onnx_import.registry import operator
from converters.onnx_import.windows import Window

MAX = {3: layers.MaxPooling1D, 4: layers.MaxPooling2D, 5: layers.MaxPooling3D}
AVERAGE = {3: layers.AveragePooling1D, 4: layers.AveragePooling2D, 5: layers.AveragePooling3D}
LOWEST = float(np.finfo(np.float32).min)


@operator("MaxPool")
def max_pool(g: Builder, node: Node, x: Value) -> Value:
    """The largest element of each window; padding never wins."""
    node.ignore("storage_order")  # of the indices, which are refused as a second output
    window = _window(node, x)
    order = channels_last(x.rank)
    tensor = g.ordered(x, order)
    if window.dilated:
        result = _gathered(g, pad(g, tensor, window.pads, LOWEST), window, ops.max)
    elif window.same:
        result = _pooled(g, MAX, tensor, window)
    elif x.nonnegative:
        result = _pooled(g, MAX, pad(g, tensor, window.pads), window)
    elif all(2 * p <= k and p <= n for p, k, n in _edges(window)):
        # Mirrored elements lie in the same windows as their originals. A very low constant would be as right, but the
        # range of an int8 tensor would have to hold it.
        mirrored = g.apply(ops.pad, tensor, pad_width=((0, 0), *window.pads, (0, 0)), mode="symmetric")
        result = _pooled(g, MAX, mirrored, window)
    else:
        result = _pooled(g, MAX, pad(g, tensor, window.pads, LOWEST), window)
    return g.value(result, order, nonnegative=x.nonnegative)


@operator("AveragePool")
def average_pool(g: Builder, node: Node, x: Value) -> Value:
    """The mean of each window, of its data alone or with the padding (``count_include_pad``)."""
    with_padding = bool(node.one_of("count_include_pad", 0, (0, 1)))
    window = _window(node, x)
    order = channels_last(x.rank)
    tensor = g.ordered(x, order)
    if window.same and not window.dilated and not with_padding:  # TensorFlow leaves the padding out
        return g.value(_pooled(g, AVERAGE, tensor, window), order, nonnegative=x.nonnegative)
    padded = pad(g, tensor, window.pads)
    mean = _gathered(g, padded, window, ops.mean) if window.dilated else _pooled(g, AVERAGE, padded, window)
    factor = math.prod(window.kernel) / window.counts(with_padding=with_padding)
    if (factor != 1).any():
        mean = g.apply(ops.multiply, mean, factor[..., np.newaxis].astype(np.float32))
    return g.value(mean, order, nonnegative=x.nonnegative)


@operator("GlobalAveragePool")
def global_average_pool(g: Builder, node: Node, x: Value) -> Value:
    """The mean over all spatial axes."""
    return _global(g, x, ops.mean)


@operator("GlobalMaxPool")
def global_max_pool(g: Builder, node: Node, x: Value) -> Value:
    """The largest element over all spatial axes."""
    return _global(g, x, ops.max)


def _global(g: Builder, x: Value, function: Callable[..., Any]) -> Value:
    axes = tuple(sorted(g.spatial_axis(x, axis) for axis in range(2, x.rank)))
    return g.value(g.apply(function, x.tensor, axis=axes, keepdims=True), x.order, nonnegative=x.nonnegative)


def _window(node: Node, x: Value) -> Window:
    if x.rank not in MAX:
        raise ValueError(f"an input of shape {list(x.shape)} where one to three spatial axes are expected")
    return windows.read(node, x.shape[2:], None, round_up=bool(node.one_of("ceil_mode", 0, (0, 1))))


def _edges(window: Window) -> list[tuple[int, int, int]]:
    return [(max(p), k, n) for p, k, n in zip(window.pads, window.kernel, window.sizes, strict=True)]


def _pooled(g: Builder, kinds: dict[int, Any], tensor: Any, window: Window) -> Any:
    """A pooling layer; the tensor is padded already, unless the padding is TensorFlow's own."""
    untouched = window.same and g.sizes(tensor)[1:-1] == window.sizes
    return g.layer(
        kinds[len(tensor.shape)],
        tensor,
        pool_size=window.kernel,
        strides=window.strides,
        padding="same" if untouched and window.padded else "valid",
    )


def _gathered(g: Builder, tensor: Any, window: Window, reduce: Callable[..., Any]) -> Any:
    """Windows with holes: one axis after the other, gather each window's elements and reduce them."""
    for axis in range(len(window.sizes)):
        elements = g.apply(ops.take, tensor, window.positions(axis).astype(np.int32), axis=axis + 1)
        tensor = g.apply(reduce, elements, axis=axis + 2)
    return tensor
