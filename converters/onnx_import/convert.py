"""An ONNX model as a Keras model that can be trained.

Rules enforced here:

* a model with an operator that the table does not have is refused, all of them named at once;
* the batch axis becomes free, also where the file states a size, so that the model can be trained on batches; where an
  operator computes across the inputs of a batch, the stated size stays;
* whatever is refused is refused as a ``ModelError`` that names the operator.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from converters.onnx_import import (  # noqa: F401 - the families fill the table
    activations,
    arithmetic,
    convolution,
    dense,
    graph,
    layout,
    normalisation,
    planning,
    pooling,
    resizing,
    shapes,
)
from converters.onnx_import.builder import Builder, MixesBatch, Value, constant
from converters.onnx_import.graph import Array, Graph, Node, Port
from converters.onnx_import.layout import Order
from converters.onnx_import.registry import TABLE
from edgeguard.errors import ModelError

_ADVICE = "bring a .tflite of this model"


@dataclass(frozen=True)
class Mapped:
    """How an input or output lies: axis ``i`` of the Keras tensor is axis ``order[i]`` of the ONNX tensor ``name``."""

    name: str
    order: Order

    def to_keras(self, array: Array) -> Array:
        """An array of the ONNX model as the Keras model has it."""
        return np.transpose(array, self.order).copy()

    def to_onnx(self, array: Array) -> Array:
        """An array of the Keras model as the ONNX model has it."""
        return np.transpose(array, np.argsort(self.order)).copy()


@dataclass(frozen=True)
class Imported:
    """A Keras model and how its inputs and outputs lie, in the order of the file."""

    model: Any
    inputs: tuple[Mapped, ...]
    outputs: tuple[Mapped, ...]


@dataclass(frozen=True)
class Built:
    """Everything that was computed: the Keras inputs, and each tensor of the file by its name."""

    inputs: tuple[tuple[Mapped, Any], ...]
    values: dict[str, Value]


def to_keras(source: Any) -> Any:
    """The Keras model of an ONNX model: float32, channels last, trainable.

    Args:
        source: an ``onnx.ModelProto``, the bytes of a file, or its path.

    Raises:
        ConfigError: the file cannot be read.
        ModelError: it is damaged, too large, or holds what is not covered.
    """
    return import_onnx(source).model


def unsupported(source: Any) -> tuple[str, ...]:
    """All operators of a model that are not covered, in alphabetical order.

    Raises:
        ConfigError, ModelError: as :func:`to_keras`, for a file that cannot be parsed.
    """
    return tuple(sorted(graph.operators(graph.load(source)) - set(TABLE)))


def import_onnx(source: Any) -> Imported:
    """As :func:`to_keras`, with the orders of inputs and outputs.

    Raises:
        ConfigError: the file cannot be read.
        ModelError: it is damaged, too large, or holds what is not covered.
    """
    model = graph.load(source)
    missing = unsupported(model)
    if missing:
        raise ModelError("ONNX model", got=f"operators that are not covered: {', '.join(missing)}", do=_ADVICE)
    read = graph.read(model)
    built = build(read)
    for name in read.outputs:
        if built.values[name].constant:
            raise ModelError(f"ONNX output {name}", got="a constant", expected="what is computed from the input")
    results = [built.values[name] for name in read.outputs]
    inputs, outputs = [tensor for _, tensor in built.inputs], [value.tensor for value in results]
    name = graph.sanitised(source.stem if isinstance(source, Path) else model.graph.name)
    try:
        made = keras.Model(_alone(inputs), _alone(outputs), name=name)
    except Exception as error:  # also a RecursionError
        raise ModelError("ONNX model", got=_first_line(error), do=_ADVICE) from error
    return Imported(
        model=made,
        inputs=tuple(mapped for mapped, _ in built.inputs),
        outputs=tuple(Mapped(name, v.order) for name, v in zip(read.outputs, results, strict=True)),
    )


def _alone(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors


def build(read: Graph) -> Built:
    """Build every tensor of a graph: with a free batch axis, or a stated one where the operators need it.

    Raises:
        ModelError: an operator refuses, or an axis other than the batch is open.
    """
    for port in read.inputs:
        if None in port.shape[1:]:
            raise ModelError(
                f"ONNX input {port.name}",
                got=f"shape {['?' if n is None else n for n in port.shape]}",
                expected="known sizes but for the batch",
                do="export it with fixed sizes",
            )
    stated = {port.shape[0] for port in read.inputs if port.shape}
    if len(stated) == 1 and all(port.shape for port in read.inputs):
        batch = stated.pop()
        try:
            return _build(read, Builder(batch or 1, open_batch=batch is None))
        except _MixedAt as error:
            if batch is None:
                raise ModelError(
                    f"operator {error}",
                    got="a computation across the inputs of a batch",
                    do="export the model with a fixed batch of 1",
                ) from error
    elif None in stated:
        raise ModelError("ONNX model", got="inputs whose first axes differ", do="export it with fixed sizes")
    try:
        return _build(read, Builder(None))
    except _MixedAt as error:
        raise ModelError(f"operator {error}", got="axes that cannot be ordered", do=_ADVICE) from error


class _MixedAt(Exception):  # noqa: N818 - MixesBatch with the operator's name
    pass


def _build(read: Graph, g: Builder) -> Built:
    nodes = [Node(n, read.opset, n.name or f"{n.op_type}_{n.output[0]}") for n in read.nodes]
    nodes = planning.with_biases(nodes, read.constants, read.outputs)
    inputs = tuple(_input(g, port, planning.input_order(nodes, read.constants, port)) for port in read.inputs)
    values = {name: constant(array) for name, array in read.constants.items()}
    for mapped, tensor in inputs:
        values[mapped.name] = g.value(tensor, mapped.order)
    needed = {name for node in nodes for name in node.inputs} | set(read.outputs)
    for node in nodes:
        inputs_of = [values[name] if name else None for name in node.inputs]
        results = _call(g, node, inputs_of)
        for name in node.outputs[len(results) :]:
            if name in needed:
                raise ModelError(f"operator {node}", got=f"a use of its output {name}", do=_ADVICE)
        old = [id(v.tensor) for v in inputs_of if v is not None]
        g.spend(sum(v.tensor.size for v in results if v.constant and id(v.tensor) not in old))
        values.update(zip(node.outputs, results, strict=False))
    return Built(inputs, values)


def _input(g: Builder, port: Port, order: Order) -> tuple[Mapped, Any]:
    shape = [port.shape[axis] for axis in order]
    if g.batch is not None:
        shape[0] = None
    dtype = "float32" if port.dtype.kind == "f" else str(port.dtype)
    tensor = keras.Input(batch_shape=tuple(shape), dtype=dtype, name=g.unique(port.name))
    return Mapped(port.name, order), tensor


def _call(g: Builder, node: Node, inputs: list[Value | None]) -> list[Value]:
    """One operator, whatever goes wrong in it told by its name."""
    function = TABLE[node.operator]
    g.enter(node)
    try:
        inspect.signature(function).bind(g, node, *inputs)
    except TypeError as error:
        raise ModelError(f"operator {node}", got=f"{len(inputs)} inputs", do=_ADVICE) from error
    try:
        result = function(g, node, *inputs)
    except MixesBatch as error:
        raise _MixedAt(str(node)) from error
    except ModelError:
        raise
    except Exception as error:  # Keras and TensorFlow raise anything for shapes that do not fit
        raise ModelError(f"operator {node}", got=_first_line(error), do=_ADVICE) from error
    node.check_all_read()
    return [result] if isinstance(result, Value) else list(result)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
