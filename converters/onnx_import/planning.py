"""Decisions over the whole graph, taken before anything is built: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from converters.onnx_import import layout
from converters.onnx_import.graph import Array, Node, Port
from converters.onnx_import.layout import Order

Labels: TypeAlias = tuple[int | None, ...]

WANT_CHANNELS_LAST = frozenset(
    [
        "AveragePool",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "DepthToSpace",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "LRN",
        "MaxPool",
        "Resize",
        "Upsample",
    ]
)
END = {"Flatten", "Gather", "Gemm", "MatMul", "Reshape", "Shape"}
"""Operators, with the reductions, behind which an axis of the input is no longer to be found."""


def input_order(nodes: Sequence[Node], constants: Mapping[str, Array], port: Port) -> Order:
    """The order in which an input best comes: as the first operator that knows channels wants it.

    A file made by a tool whose images have their channels last begins with a Transpose; following it, the input keeps
    the order that its owner's data have. An image that meets no such operator has its channels last; any other input
    stays as it is.
    """
    rank = len(port.shape)
    labels: dict[str, Labels] = {port.name: layout.plain(rank)}
    for node in nodes:
        source = next((name for name in node.inputs if name in labels), None)
        if source is None:
            continue
        current = labels[source]
        if node.operator in WANT_CHANNELS_LAST:
            wanted = tuple(axis for a in layout.channels_last(len(current)) if (axis := current[a]) is not None)
            return wanted if sorted(wanted) == list(range(rank)) else layout.plain(rank)
        after = _labels_after(node, current, constants)
        if after is not None:
            labels.update(dict.fromkeys(node.outputs, after))
    untouched = all(after == layout.plain(rank) for after in labels.values())
    return layout.channels_last(rank) if rank == 4 and untouched else layout.plain(rank)


def _labels_after(node: Node, current: Labels, constants: Mapping[str, Array]) -> Labels | None:
    """Which axis of the input each axis of the result is, None where that ends."""
    rank = len(current)
    if node.operator == "Transpose":
        axes = node.ints("perm", tuple(reversed(range(rank)))) or ()
        return tuple(current[a] for a in axes) if sorted(axes) == list(range(rank)) else None
    if node.operator not in {"Squeeze", "Unsqueeze"}:
        return None if node.operator in END or node.operator.startswith("Reduce") else current
    given = constants.get(node.inputs[1]) if len(node.inputs) > 1 else np.asarray(node.ints("axes", ()))
    if given is None:
        return None
    if node.operator == "Squeeze":
        gone = {int(axis) % rank for axis in given.reshape(-1)}
        return tuple(label for axis, label in enumerate(current) if axis not in gone)
    new = {int(axis) % (rank + given.size) for axis in given.reshape(-1)}
    rest = iter(current)
    return tuple(None if axis in new else next(rest, None) for axis in range(rank + len(new)))


def with_biases(nodes: Sequence[Node], constants: Mapping[str, Array], outputs: Sequence[str]) -> list[Node]:
    """Give a MatMul the constant vector that is added to its result alone, so that both become one Dense layer."""
    uses = Counter(name for node in nodes for name in node.inputs) + Counter(outputs)
    products = {node.outputs[0]: node for node in nodes if node.operator == "MatMul"}
    kept: list[Node] = []
    for node in nodes:
        pair = [node.inputs, node.inputs[::-1]] if node.operator == "Add" and len(node.inputs) == 2 else []
        for product, bias in pair:
            matmul = products.get(product)
            kernel = None if matmul is None else constants.get(matmul.inputs[1])
            vector = constants.get(bias)
            if matmul is None or kernel is None or vector is None or uses[product] != 1 or len(matmul.inputs) > 2:
                continue
            if node.opset > 6 and kernel.ndim == 2 and vector.shape == kernel.shape[1:]:
                matmul.inputs, matmul.outputs = (*matmul.inputs, bias), node.outputs
                break
        else:
            kept.append(node)
    return kept
