"""Plans which activations of a TFLite graph the guard listens to. Pure: a model in, a plan of plain values out.

By default the two deepest activations that a convolution, depthwise convolution, fully connected layer or addition
makes: class evidence is strongest there, and more taps cost time without finding more. Activations with spatial axes go
first, and of these the ones that cannot be negative: an absolute value of its own is an int8 op that XNNPACK does not
take, and breaks the graph in two, which costs more than the rest of the guard. The output itself and the dense layer
before it are never tapped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from converters.flatbuffer import Model, builtin_code, constant, text
from edgeguard.errors import ModelError

_MAKERS = frozenset(
    {
        schema.BuiltinOperator.CONV_2D,
        schema.BuiltinOperator.DEPTHWISE_CONV_2D,
        schema.BuiltinOperator.FULLY_CONNECTED,
        schema.BuiltinOperator.ADD,
    }
)
_NON_NEGATIVE = frozenset({schema.ActivationFunctionType.RELU, schema.ActivationFunctionType.RELU6})
_TYPES = {schema.TensorType.INT8: "int8", schema.TensorType.FLOAT32: "float32"}


@dataclass(frozen=True, kw_only=True)
class PlannedTap:
    """One activation: its tensor, its channels (last axis), the axes to reduce, and how its numbers are stored."""

    tensor: int
    name: str
    source_layer: str
    channels: int
    axes: tuple[int, ...]
    signed: bool
    dtype: Literal["int8", "float32"]
    scale: float
    zero_point: int


@dataclass(frozen=True, kw_only=True)
class TapPlan:
    """What to listen to, and which output holds the classes (None for a model without)."""

    taps: tuple[PlannedTap, ...]
    class_output: int | None
    classes: int


def plan_taps(model: Model, *, count: int = 2, layers: Sequence[str] = ()) -> TapPlan:
    """Choose the taps of a checked, unguarded model.

    Args:
        model: as ``flatbuffer.parse`` gives it.
        count: how many activations, 1 to 4.
        layers: layer names of the trainable model, to name each tap's source layer.

    Raises:
        ModelError: several subgraph inputs, a batch other than one, or no activation that can be tapped.
    """
    graph = model.subgraphs[0]
    outputs = {int(o) for o in graph.outputs}
    candidates: list[PlannedTap] = []
    for operator in graph.operators:
        if builtin_code(model, operator) not in _MAKERS:
            continue
        index = int(operator.outputs[0])
        tensor = graph.tensors[index]
        shape = tuple(int(n) for n in tensor.shape) if tensor.shape is not None else ()
        if index in outputs or tensor.type not in _TYPES or len(shape) < 2 or constant(model, tensor):
            continue
        if shape[0] != 1:
            raise ModelError("model file", got=f"a batch of {shape[0]}", expected="a batch of 1", do="export it so")
        candidates.append(_describe(operator, index, tensor, shape, layers))
    # A dense layer right before the softmax holds the logits: class evidence, but no trace of how it came about.
    usable = [c for c in candidates if c.axes] or candidates[:-1]
    chosen = [c for c in usable if not c.signed] or usable
    if not chosen:
        raise ModelError(
            "model file",
            got="no activation that the guard can listen to",
            expected="a convolution, addition or dense layer before the last",
        )
    class_output, classes = _classes(model)
    return TapPlan(taps=tuple(chosen[-count:]), class_output=class_output, classes=classes)


def _describe(operator: Any, index: int, tensor: Any, shape: tuple[int, ...], layers: Sequence[str]) -> PlannedTap:
    quantization = tensor.quantization
    scales = [] if quantization is None or quantization.scale is None else list(quantization.scale)
    quantised = tensor.type == schema.TensorType.INT8
    if quantised and len(scales) != 1:
        raise ModelError(f"tensor {text(tensor.name)}", got="int8 without one scale", expected="a scale per tensor")
    zero_point = int(quantization.zeroPoint[0]) if quantised else 0
    activation = getattr(operator.builtinOptions, "fusedActivationFunction", schema.ActivationFunctionType.NONE)
    return PlannedTap(
        tensor=index,
        name=text(tensor.name),
        source_layer=source_layer(text(tensor.name), layers),
        channels=shape[-1],
        axes=tuple(range(1, len(shape) - 1)),
        signed=zero_point != -128 if quantised else activation not in _NON_NEGATIVE,
        dtype="int8" if quantised else "float32",
        scale=float(scales[0]) if quantised else 0.0,
        zero_point=zero_point,
    )


def source_layer(tensor_name: str, layers: Sequence[str]) -> str:
    """The layer that a tensor's name speaks of: the converter joins ``model/layer/op`` names with semicolons.

    Keras numbers a layer's name again when it is traced, hence ``relu2_1`` for ``relu2``. Empty when none fits.
    """
    known = set(layers)
    for path in tensor_name.split(";"):
        for part in path.split("/"):
            for name in (part, re.sub(r"_\d+$", "", part)):
                if name in known:
                    return name
    return ""


def _classes(model: Model) -> tuple[int | None, int]:
    """Index of the output that holds one score per class: the only or first ``[1, C]`` output that ends in a softmax
    or in a dense layer, with C > 1. A single sigmoid and an image have none."""
    graph = model.subgraphs[0]
    makers = {int(o): builtin_code(model, op) for op in graph.operators for o in np.atleast_1d(op.outputs)}
    class_makers = {
        schema.BuiltinOperator.SOFTMAX,
        schema.BuiltinOperator.LOG_SOFTMAX,
        schema.BuiltinOperator.FULLY_CONNECTED,
        schema.BuiltinOperator.DEQUANTIZE,
        schema.BuiltinOperator.QUANTIZE,
    }
    for position, index in enumerate(graph.outputs):
        shape = graph.tensors[int(index)].shape
        if shape is not None and len(shape) == 2 and int(shape[1]) > 1 and makers.get(int(index)) in class_makers:
            return position, int(shape[1])
    return None, 1
