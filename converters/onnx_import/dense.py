"""Matrix products: Dense layers where one side is a constant, plain products elsewhere."""

from __future__ import annotations

import numpy as np
from keras import layers, ops

from converters.onnx_import.arithmetic import add
from converters.onnx_import.builder import Builder, MixesBatch, Value, constant
from converters.onnx_import.graph import Array, Node
from converters.onnx_import.layout import plain
from converters.onnx_import.registry import operator


@operator("Gemm")
def gemm(g: Builder, node: Node, a: Value, b: Value, c: Value | None = None) -> Value:
    """alpha A B + beta C, either factor transposed as asked."""
    node.ignore("broadcast")
    alpha, beta = float(node.take("alpha", 1.0)), float(node.take("beta", 1.0))
    first, second = node.one_of("transA", 0, (0, 1)), node.one_of("transB", 0, (0, 1))
    if a.rank != 2 or b.rank != 2:
        raise ValueError(f"factors of shape {list(a.shape)} and {list(b.shape)}")
    if b.constant and not a.constant and not first and (c is None or c.constant):
        kernel = (b.tensor.T if second else b.tensor) * np.float32(alpha)
        bias = None if c is None or beta == 0 else np.asarray(c.tensor, np.float32) * np.float32(beta)
        if bias is None or all(size == 1 for size in bias.shape[:-1]):
            return _dense(g, a, kernel, bias)
    factors = [_flipped(g, a) if first else a, _flipped(g, b) if second else b]
    product = _product(g, *factors)
    if alpha != 1:
        product = g.value(g.apply(ops.multiply, product.tensor, alpha), product.order)
    if c is None or beta == 0:
        return product
    tensors, order = g.align([product, c])
    if beta != 1:
        tensors[1] = g.apply(ops.multiply, tensors[1], np.float32(beta))
    return g.value(add(g, *tensors), order)


@operator("MatMul")
def matmul(g: Builder, node: Node, a: Value, b: Value, bias: Value | None = None) -> Value:
    """A product; a Dense layer where the right factor is a constant.

    ONNX knows no ``bias``: it comes from an addition that :func:`planning.with_biases` found behind the product.
    """
    if b.constant and not a.constant and b.rank == 2 and a.rank > 1:
        return _dense(g, a, b.tensor, None if bias is None else bias.tensor)
    product = _product(g, a, b)
    if bias is None:
        return product
    tensors, order = g.align([product, bias])
    return g.value(add(g, *tensors), order)


def _dense(g: Builder, x: Value, kernel: Array, bias: Array | None) -> Value:
    weights = [kernel]
    if bias is not None:
        weights.append(np.broadcast_to(bias.reshape(-1), kernel.shape[1:]))
    if kernel.shape[0] != x.shape[-1]:
        raise ValueError(f"weights of shape {list(kernel.shape)} for an input of shape {list(x.shape)}")
    tensor = g.plain(x)
    result = g.layer(layers.Dense, tensor, weights, units=kernel.shape[1], use_bias=bias is not None)
    return g.value(result, plain(x.rank))


def _product(g: Builder, a: Value, b: Value) -> Value:
    rank = max(a.rank, b.rank)
    live = [v for v in (a, b) if not v.constant]
    if live and g.batch is not None and (rank < 3 and not (b.constant and a.rank == 2)):
        raise MixesBatch
    if g.batch is not None and any(v.rank != rank for v in live):
        raise MixesBatch
    dtype = live[0].tensor.dtype if live else None
    tensors = [g.plain(v).astype(dtype) if v.constant and dtype else g.plain(v) for v in (a, b)]
    shape = g.apply(ops.matmul, *tensors)
    return g.value(shape, plain(len(shape.shape)))


def _flipped(g: Builder, value: Value) -> Value:
    if value.constant:
        return constant(np.ascontiguousarray(value.tensor.T))
    return Value(value.tensor, tuple(1 - axis for axis in value.order), value.shape[::-1])
