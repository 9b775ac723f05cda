"""Normalisation over channels, and dropout."""

from __future__ import annotations

import math

import numpy as np
from keras import layers, ops

from converters.onnx_import.builder import Builder, Value, known
from converters.onnx_import.graph import Node
from converters.onnx_import.layout import channels_last
from converters.onnx_import.registry import operator


@operator("BatchNormalization")
def batch_normalization(g: Builder, node: Node, x: Value, scale: Value, b: Value, mean: Value, var: Value) -> Value:
    """Keras's own, on whichever axis the channels lie."""
    node.ignore("momentum", "consumed_inputs")
    node.one_of("training_mode", 0, (0,))
    node.one_of("spatial", 1, (1,))
    if node.opset < 7:
        node.one_of("is_test", 0, (1,))
    axis = g.spatial_axis(x, 1)
    weights = [known(v, what) for v, what in ((scale, "scale"), (b, "B"), (mean, "mean"), (var, "var"))]
    epsilon = float(node.take("epsilon", 1e-5))
    return g.value(g.layer(layers.BatchNormalization, x.tensor, weights, axis=axis, epsilon=epsilon), x.order)


@operator("LRN")
def lrn(g: Builder, node: Node, x: Value) -> Value:
    """Local response normalisation: an average of squares over neighbouring channels, as a pooling along them."""
    size = int(node.take("size"))
    alpha, beta, bias = (
        float(node.take(name, default)) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    if not 1 <= size <= 2 * x.shape[1] + 1:
        raise ValueError(f"size {size} over {x.shape[1]} channels")
    order = channels_last(x.rank)
    tensor = g.ordered(x, order)
    sizes = g.sizes(tensor)
    squares = g.reshaped(g.apply(ops.square, tensor), (sizes[0], math.prod(sizes[1:-1]), sizes[-1], 1))
    padded = g.apply(ops.pad, squares, pad_width=((0, 0), (0, 0), ((size - 1) // 2, size // 2), (0, 0)))
    mean = g.apply(ops.average_pool, padded, pool_size=(1, size), strides=(1, 1), padding="valid")
    base = g.apply(ops.add, g.apply(ops.multiply, g.reshaped(mean, sizes), alpha), bias)
    return g.value(g.apply(ops.multiply, tensor, g.apply(ops.power, base, -beta)), order)


@operator("Dropout")
def dropout(g: Builder, node: Node, x: Value, ratio: Value | None = None, training: Value | None = None) -> Value:
    """Nothing at inference; a layer that drops again once the model is trained."""
    node.ignore("seed", "consumed_inputs")
    if node.opset < 7:
        node.one_of("is_test", 0, (1,))
    if training is not None and known(training, "training_mode").any():
        node.refuse("training_mode", True, "a model exported for inference")
    rate = float(node.take("ratio", 0.5)) if ratio is None else float(known(ratio, "ratio").reshape(()))
    if x.constant or not 0 < rate < 1:
        return x
    return g.value(g.layer(layers.Dropout, x.tensor, rate=float(np.float32(rate))), x.order, nonnegative=x.nonnegative)
