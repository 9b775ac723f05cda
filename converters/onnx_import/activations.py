"""Activation functions and other functions of one element at a time."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

from converters.onnx_import.builder import Builder, Value, constant, known
from converters.onnx_import.graph import Node
from converters.onnx_import.registry import operator

_ELEMENTWISE = {
    "Abs": ops.absolute,
    "Erf": ops.erf,
    "Exp": ops.exp,
    "Log": ops.log,
    "Neg": ops.negative,
    "Reciprocal": ops.reciprocal,
    "Sigmoid": ops.sigmoid,
    "Softplus": ops.softplus,
    "Softsign": ops.softsign,
    "Sqrt": ops.sqrt,
    "Tanh": ops.tanh,
}
_NONNEGATIVE = {"Abs", "Exp", "Sigmoid", "Softplus", "Sqrt"}


@operator(*_ELEMENTWISE)
def elementwise(g: Builder, node: Node, x: Value) -> Value:
    """Functions without a parameter."""
    node.ignore("consumed_inputs")
    return g.value(g.apply(_ELEMENTWISE[node.operator], x.tensor), x.order, nonnegative=node.operator in _NONNEGATIVE)


@operator("Relu")
def relu(g: Builder, node: Node, x: Value) -> Value:
    """max(x, 0)."""
    node.ignore("consumed_inputs")
    return g.value(g.layer(layers.ReLU, x.tensor), x.order, nonnegative=True)


@operator("Clip")
def clip(g: Builder, node: Node, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """Limits, attributes before opset 11 and inputs since; 0 below becomes a ReLU, so that it can be fused."""
    node.ignore("consumed_inputs")
    if node.opset < 11:
        least, most = node.take("min", None), node.take("max", None)
        low = None if least is None else constant(np.float32(least))
        high = None if most is None else constant(np.float32(most))
    starts_at_zero = low is not None and low.constant and low.tensor.size == 1 and float(low.tensor.reshape(())) == 0
    if starts_at_zero and not x.constant and (high is None or (high.constant and float(high.tensor.reshape(())) > 0)):
        most = None if high is None else float(high.tensor.reshape(()))
        return g.value(g.layer(layers.ReLU, x.tensor, max_value=most), x.order, nonnegative=True)
    for limit, function in ((low, ops.maximum), (high, ops.minimum)):
        if limit is not None:
            tensors, order = g.align([x, limit])
            x = g.value(g.apply(function, *tensors), order)
    return x


@operator("LeakyRelu")
def leaky_relu(g: Builder, node: Node, x: Value) -> Value:
    """Alpha x below zero."""
    node.ignore("consumed_inputs")
    return g.value(g.layer(layers.LeakyReLU, x.tensor, negative_slope=float(node.take("alpha", 0.01))), x.order)


@operator("Elu")
def elu(g: Builder, node: Node, x: Value) -> Value:
    """Alpha (exp(x) - 1) below zero."""
    node.ignore("consumed_inputs")
    return g.value(g.layer(layers.ELU, x.tensor, alpha=float(node.take("alpha", 1.0))), x.order)


@operator("Selu")
def selu(g: Builder, node: Node, x: Value) -> Value:
    """Gamma times the Elu; opset 6 rounded the constants, so both are multiplied out."""
    node.ignore("consumed_inputs")
    exact = node.opset > 5
    alpha = float(node.take("alpha", 1.67326319217681884765625 if exact else 1.6732))
    gamma = float(node.take("gamma", 1.05070102214813232421875 if exact else 1.0507))
    return g.value(g.apply(ops.multiply, g.layer(layers.ELU, x.tensor, alpha=alpha), gamma), x.order)


@operator("PRelu")
def prelu(g: Builder, node: Node, x: Value, slope: Value) -> Value:
    """A slope below zero that is learnt, shared along every axis where it has size one."""
    node.ignore("consumed_inputs")
    alpha = known(slope, "slope")
    if node.opset < 7 and alpha.ndim == 1:  # one per channel, before broadcasting came
        alpha = alpha.reshape((-1,) + (1,) * (x.rank - 2))
    if np.broadcast_shapes(alpha.shape, x.shape) != x.shape:
        raise ValueError(f"a slope of shape {list(alpha.shape)} for {list(x.shape)}")
    wide = np.transpose(alpha.reshape((1,) * (x.rank - alpha.ndim) + alpha.shape), x.order)
    if x.rank < 2 or wide.shape[0] != 1:
        tensors, order = g.align([x, constant(alpha)])
        below = g.apply(ops.multiply, g.apply(ops.minimum, tensors[0], 0.0), tensors[1])
        return g.value(g.apply(ops.add, g.apply(ops.relu, tensors[0]), below), order)
    shared = [axis for axis in range(1, x.rank) if wide.shape[axis] == 1] or None
    return g.value(g.layer(layers.PReLU, x.tensor, [wide[0]], shared_axes=shared), x.order)


@operator("HardSigmoid")
def hard_sigmoid(g: Builder, node: Node, x: Value) -> Value:
    """A line between 0 and 1; with the slope 1/6 it is Keras's own."""
    node.ignore("consumed_inputs")
    alpha, beta = float(node.take("alpha", 0.2)), float(node.take("beta", 0.5))
    if abs(alpha - 1 / 6) < 1e-5 and beta == 0.5:
        return g.value(g.apply(ops.hard_sigmoid, x.tensor), x.order, nonnegative=True)
    line = g.apply(ops.add, g.apply(ops.multiply, x.tensor, alpha), beta)
    return g.value(g.apply(ops.clip, line, x_min=0.0, x_max=1.0), x.order, nonnegative=True)


@operator("HardSwish")
def hard_swish(g: Builder, node: Node, x: Value) -> Value:
    """X times the HardSigmoid of slope 1/6."""
    return g.value(g.apply(ops.hard_silu, x.tensor), x.order)


@operator("Gelu")
def gelu(g: Builder, node: Node, x: Value) -> Value:
    """Exact, or by tanh."""
    approximate = node.one_of("approximate", "none", ("none", "tanh")) == "tanh"
    return g.value(g.apply(ops.gelu, x.tensor, approximate=approximate), x.order)


def _softmax_axes(g: Builder, node: Node, x: Value) -> tuple[int, ...]:
    """Where the axes lie that sum to one: until opset 12 all from ``axis`` on; those of size one do not matter."""
    old = node.opset < 13
    first = int(node.take("axis", 1 if old else -1))
    if old and x.rank == first:  # an empty tail
        raise ValueError(f"axis {first} of a tensor with {x.rank} axes")
    first %= x.rank
    axes = list(range(first, x.rank)) if old else [first]
    large = [axis for axis in axes if x.shape[axis] != 1] or axes[-1:]
    return tuple(g.spatial_axis(x, axis) for axis in large)


@operator("Softmax")
def softmax(g: Builder, node: Node, x: Value) -> Value:
    """Probabilities along an axis."""
    axes = _softmax_axes(g, node, x)
    if len(axes) == 1:
        return g.value(g.layer(layers.Softmax, x.tensor, axis=axes[0]), x.order, nonnegative=True)
    return g.value(g.apply(ops.exp, _log_softmax(g, x, axes)), x.order, nonnegative=True)


@operator("LogSoftmax")
def log_softmax(g: Builder, node: Node, x: Value) -> Value:
    """Logarithms of probabilities along an axis."""
    return g.value(_log_softmax(g, x, _softmax_axes(g, node, x)), x.order)


def _log_softmax(g: Builder, x: Value, axes: tuple[int, ...]) -> keras.KerasTensor:
    if len(axes) == 1:
        return g.apply(ops.log_softmax, x.tensor, axis=axes[0])
    return g.apply(ops.subtract, x.tensor, g.apply(ops.logsumexp, x.tensor, axis=axes, keepdims=True))
