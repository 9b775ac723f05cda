"""Rebuilds a trainable Keras model from a ``.tflite`` file, so that a file alone can be inspected and repaired.

Constants become float32 weights, ``scale * (stored - zero point)``; activations are computed in float, between int8 ops
too. The model takes real numbers, as the file's input stands for them, with an open batch axis.

Rules enforced here:

* the file is checked before it is read, see :mod:`converters.structure`; a guard is left out;
* an operator, or a use of it, that is not known here is refused by name and never skipped: a model that was rebuilt
  wrongly would be judged wrongly;
* each convolution and dense layer keeps its fused activation, so that a layer's output is the file's tensor.

Rounding between int8 ops is left out: on random pixels the rebuilt class is that of the int8 file nearly always, not
always.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from converters import flatbuffer, guard, lowering
from edgeguard.errors import ModelError

Floats = npt.NDArray[np.float32]
Op = schema.BuiltinOperator
_NAMES = {code: name for name, code in vars(Op).items() if isinstance(code, int) and not name.startswith("_")}
_ACTIVATIONS = MappingProxyType(
    {
        schema.ActivationFunctionType.NONE: None,
        schema.ActivationFunctionType.RELU: "relu",
        schema.ActivationFunctionType.RELU6: "relu6",
        schema.ActivationFunctionType.TANH: "tanh",
    }
)
_CONSTANT_TYPES = {
    schema.TensorType.FLOAT32: "<f4",
    schema.TensorType.INT32: "<i4",
    schema.TensorType.INT64: "<i8",
}


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A trainable model and how it belongs to its file.

    ``model`` maps real inputs [N, ...] to the file's first output. ``layers`` names, for each activation tensor of the
    file, the layer whose output it is: what the taps of a guard point to.
    """

    model: Any
    layers: Mapping[str, str]


def of_tflite(content: bytes) -> Reconstruction:
    """Rebuild a file's float graph.

    Raises:
        ModelError: the file is damaged, or has an operator that is not known here; the message names it.
    """
    model = flatbuffer.parse(content)
    guard.strip(model)
    lowering.with_float_constants(model)
    return _Graph(model).build()


class _Graph:
    """Walks the operators in order; ``made`` holds the Keras tensor of each activation so far."""

    def __init__(self, model: Any) -> None:
        self._model, self._graph = model, model.subgraphs[0]
        self._made: dict[int, Any] = {}
        self._layers: dict[str, str] = {}
        self._used: set[str] = set()

    def build(self) -> Reconstruction:
        import keras

        shape, _ = flatbuffer.input_of(self._model)
        source = int(self._graph.inputs[0])
        inputs = self._made[source] = keras.Input(shape, name="inputs")
        for operator in self._graph.operators:
            self._add(operator)
        output = int(self._graph.outputs[0])
        if output not in self._made:
            raise ModelError("model file", got="a constant as its output", expected="what operators make of the input")
        return Reconstruction(
            model=keras.Model(inputs, self._made[output], name="reconstruction"), layers=MappingProxyType(self._layers)
        )

    def _add(self, operator: Any) -> None:
        name = _NAMES.get(flatbuffer.builtin_code(self._model, operator), "of an unknown code")
        builder = _BUILDERS.get(name)
        if builder is None:
            raise ModelError(
                "model file",
                got=f"operator {name}, which cannot be rebuilt",
                expected=f"one of {', '.join(sorted(_BUILDERS))}",
                do="bring the Keras model",
            )
        output = int(operator.outputs[0])
        try:
            made = builder(self, operator)
        except (ValueError, TypeError, KeyError) as error:
            tensor = flatbuffer.text(self._graph.tensors[output].name)
            raise ModelError(
                "model file", got=f"operator {name} at {tensor!r}: {error}", do="bring the Keras model"
            ) from error
        self._made[output] = made
        self._layers[flatbuffer.text(self._graph.tensors[output].name)] = made._keras_history.operation.name

    def name_of(self, operator: Any) -> str:
        """A layer name, after the tensor's, that no other layer has."""
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", flatbuffer.text(self._graph.tensors[int(operator.outputs[0])].name))
        base = name = (plain.strip("_.-") or "layer")[-80:].lstrip("_.-") or "layer"
        number = 1
        while name in self._used:
            number += 1
            name = f"{base}_{number}"
        self._used.add(name)
        return name

    def activation(self, operator: Any, place: int = 0) -> Any:
        """The activation that is an operator's input."""
        index = int(operator.inputs[place])
        if index not in self._made:
            raise ValueError(f"input {place} is a constant")
        return self._made[index]

    def operand(self, operator: Any, place: int) -> Any:
        """An input that may be constant: a Keras tensor, or an array that broadcasts over the batch."""
        index = int(operator.inputs[place])
        return self._made[index] if index in self._made else self.constant(operator, place)

    def constant(self, operator: Any, place: int) -> npt.NDArray[Any]:
        """A constant input as an array."""
        tensor = self._graph.tensors[int(operator.inputs[place])]
        stored = flatbuffer.constant(self._model, tensor)
        if not stored:
            raise ValueError(f"input {place} is no constant")
        values = np.frombuffer(stored, dtype=_CONSTANT_TYPES[tensor.type])
        return values.reshape(() if tensor.shape is None else [int(n) for n in tensor.shape])

    def bias(self, operator: Any, place: int = 2) -> Floats | None:
        """The bias of a convolution or dense layer, in real numbers; None where it has none."""
        if len(operator.inputs) <= place or int(operator.inputs[place]) < 0:
            return None
        values = self.constant(operator, place)
        quantization = self._graph.tensors[int(operator.inputs[place])].quantization
        scales = None if quantization is None else quantization.scale
        if values.dtype.kind == "i" and scales is not None and len(scales):
            values = values * np.asarray(scales, np.float64)
        return np.asarray(values, np.float32)

    def output_shape(self, operator: Any) -> tuple[int, ...]:
        """What an operator makes, without the batch axis."""
        return tuple(int(n) for n in self._graph.tensors[int(operator.outputs[0])].shape[1:])


def _activation(options: Any) -> str | None:
    fused = options.fusedActivationFunction
    if fused not in _ACTIVATIONS:
        raise ValueError(f"fused activation {fused} is not known")
    return _ACTIVATIONS[fused]


def _applied(made: Any, options: Any, name: str) -> Any:
    """A fused activation as a layer of its own."""
    import keras

    activation = _activation(options)
    return made if activation is None else keras.layers.Activation(activation, name=f"{name}_{activation}")(made)


def _padding(options: Any) -> str:
    return "same" if options.padding == schema.Padding.SAME else "valid"


def _window(options: Any) -> dict[str, Any]:
    return {
        "strides": (int(options.strideH), int(options.strideW)),
        "padding": _padding(options),
    }


def _weighted(graph: _Graph, operator: Any, layer: Any, x: Any, kernel: npt.NDArray[Any]) -> Any:
    made = layer(x)
    bias = graph.bias(operator)
    layer.set_weights([kernel] if bias is None else [kernel, bias])
    return made


def _conv(graph: _Graph, operator: Any) -> Any:
    import keras

    options, kernel = operator.builtinOptions, graph.constant(operator, 1)
    x = graph.activation(operator)
    layer = keras.layers.Conv2D(
        kernel.shape[0],
        kernel.shape[1:3],
        dilation_rate=(int(options.dilationHFactor), int(options.dilationWFactor)),
        groups=int(x.shape[-1]) // kernel.shape[3],
        activation=_activation(options),
        use_bias=graph.bias(operator) is not None,
        name=graph.name_of(operator),
        **_window(options),
    )
    return _weighted(graph, operator, layer, x, kernel.transpose(1, 2, 3, 0))


def _depthwise(graph: _Graph, operator: Any) -> Any:
    import keras

    options, kernel = operator.builtinOptions, graph.constant(operator, 1)
    x, (height, width) = graph.activation(operator), kernel.shape[1:3]
    if options.strideH != options.strideW:
        raise ValueError(f"strides {options.strideH} and {options.strideW} differ")
    multiplier = int(options.depthMultiplier) or kernel.shape[3] // int(x.shape[-1])
    layer = keras.layers.DepthwiseConv2D(
        (height, width),
        dilation_rate=(int(options.dilationHFactor), int(options.dilationWFactor)),
        depth_multiplier=multiplier,
        activation=_activation(options),
        use_bias=graph.bias(operator) is not None,
        name=graph.name_of(operator),
        **_window(options),
    )
    return _weighted(graph, operator, layer, x, kernel.reshape(height, width, int(x.shape[-1]), multiplier))


def _dense(graph: _Graph, operator: Any) -> Any:
    import keras

    options, kernel = operator.builtinOptions, graph.constant(operator, 1)
    x, name = graph.activation(operator), graph.name_of(operator)
    if not options.keepNumDims and len(x.shape) > 2:
        x = keras.layers.Flatten(name=f"{name}_flat")(x)
    layer = keras.layers.Dense(
        kernel.shape[0], activation=_activation(options), use_bias=graph.bias(operator) is not None, name=name
    )
    return _weighted(graph, operator, layer, x, kernel.T)


def _pool(kind: str) -> Callable[[_Graph, Any], Any]:
    def build(graph: _Graph, operator: Any) -> Any:
        import keras

        options, name = operator.builtinOptions, graph.name_of(operator)
        size = (int(options.filterHeight), int(options.filterWidth))
        pooled = getattr(keras.layers, kind)(size, name=name, **_window(options))(graph.activation(operator))
        return _applied(pooled, options, name)

    return build


def _mean(graph: _Graph, operator: Any) -> Any:
    import keras

    x = graph.activation(operator)
    axes = tuple(sorted(int(a) % len(x.shape) for a in np.atleast_1d(graph.constant(operator, 1))))
    if axes != (1, 2) or len(x.shape) != 4:
        raise ValueError(f"a mean over axes {list(axes)} of {len(x.shape)}")
    keep = bool(operator.builtinOptions.keepDims)
    return keras.layers.GlobalAveragePooling2D(keepdims=keep, name=graph.name_of(operator))(x)


def _reshape(graph: _Graph, operator: Any) -> Any:
    import keras

    return keras.layers.Reshape(graph.output_shape(operator), name=graph.name_of(operator))(graph.activation(operator))


def _merge(kind: str) -> Callable[[_Graph, Any], Any]:
    """Element by element, of two activations or of one and a constant."""

    def build(graph: _Graph, operator: Any) -> Any:
        import keras

        name = graph.name_of(operator)
        one, other = graph.operand(operator, 0), graph.operand(operator, 1)
        if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
            made = getattr(keras.ops, kind)(one, other)
        else:
            made = getattr(keras.layers, kind.capitalize())(name=name)([one, other])
        return _applied(made, operator.builtinOptions, name)

    return build


def _concatenate(graph: _Graph, operator: Any) -> Any:
    import keras

    options, name = operator.builtinOptions, graph.name_of(operator)
    parts = [graph.activation(operator, place) for place in range(len(operator.inputs))]
    axis = int(options.axis) % len(parts[0].shape)
    if axis == 0:
        raise ValueError("a concatenation of batches")
    return _applied(keras.layers.Concatenate(axis=axis, name=name)(parts), options, name)


def _pointwise(activation: str) -> Callable[[_Graph, Any], Any]:
    def build(graph: _Graph, operator: Any) -> Any:
        import keras

        return keras.layers.Activation(activation, name=graph.name_of(operator))(graph.activation(operator))

    return build


def _softmax(graph: _Graph, operator: Any) -> Any:
    import keras

    x, beta = graph.activation(operator), float(operator.builtinOptions.beta)
    if beta != 1.0:
        x = keras.ops.multiply(x, beta)
    return keras.layers.Softmax(name=graph.name_of(operator))(x)


def _same(graph: _Graph, operator: Any) -> Any:
    """Between int8 scales, or between int8 and float: in real numbers nothing changes."""
    return graph.activation(operator)


def _pad(graph: _Graph, operator: Any) -> Any:
    import keras

    x, pads = graph.activation(operator), graph.constant(operator, 1)
    if len(x.shape) != 4 or pads[0].any() or pads[3].any():
        raise ValueError(f"padding {pads.tolist()} of {len(x.shape)} axes")
    around = tuple((int(before), int(after)) for before, after in pads[1:3])
    return keras.layers.ZeroPadding2D(around, name=graph.name_of(operator))(x)


def _crop(graph: _Graph, operator: Any) -> Any:
    """A slice with steps of one over rows and columns; of the batch and the channels it takes all."""
    import keras

    options, x = operator.builtinOptions, graph.activation(operator)
    begin, end, steps = (graph.constant(operator, place).astype(int) for place in (1, 2, 3))
    if len(x.shape) != 4 or len(begin) != 4 or (steps != 1).any():
        raise ValueError(f"a slice of {len(begin)} of {len(x.shape)} axes with steps {steps.tolist()}")
    if options.ellipsisMask or options.newAxisMask or options.shrinkAxisMask or getattr(options, "offset", False):
        raise ValueError("a slice that changes the number of axes")
    ranges = []
    for axis in range(1, 4):
        size = int(x.shape[axis])
        first = 0 if options.beginMask >> axis & 1 else int(begin[axis]) % size
        last = size if options.endMask >> axis & 1 else int(end[axis] + size if end[axis] < 0 else end[axis])
        ranges.append((first, size - min(last, size)))
    whole_batch = (options.beginMask & 1 or begin[0] == 0) and (options.endMask & 1 or end[0] in (0, 1))
    if ranges[2] != (0, 0) or not whole_batch:
        raise ValueError(f"a slice from {begin.tolist()} to {end.tolist()}")
    return keras.layers.Cropping2D(tuple(ranges[:2]), name=graph.name_of(operator))(x)


def _slice(graph: _Graph, operator: Any) -> Any:
    """The same crop, as a start and a size."""
    import keras

    x = graph.activation(operator)
    begin, size = (graph.constant(operator, place).astype(int) for place in (1, 2))
    if len(x.shape) != 4 or begin[0] or begin[3] or size[3] not in {-1, int(x.shape[3])}:
        raise ValueError(f"a slice from {begin.tolist()} of {size.tolist()}")
    around = tuple(
        (int(begin[axis]), 0 if size[axis] < 0 else int(x.shape[axis]) - int(begin[axis] + size[axis]))
        for axis in (1, 2)
    )
    return keras.layers.Cropping2D(around, name=graph.name_of(operator))(x)


_BUILDERS: Mapping[str, Callable[[_Graph, Any], Any]] = MappingProxyType(
    {
        "CONV_2D": _conv,
        "DEPTHWISE_CONV_2D": _depthwise,
        "FULLY_CONNECTED": _dense,
        "MAX_POOL_2D": _pool("MaxPooling2D"),
        "AVERAGE_POOL_2D": _pool("AveragePooling2D"),
        "MEAN": _mean,
        "RESHAPE": _reshape,
        "ADD": _merge("add"),
        "SUB": _merge("subtract"),
        "MUL": _merge("multiply"),
        "CONCATENATION": _concatenate,
        "SOFTMAX": _softmax,
        "RELU": _pointwise("relu"),
        "RELU6": _pointwise("relu6"),
        "LOGISTIC": _pointwise("sigmoid"),
        "TANH": _pointwise("tanh"),
        "QUANTIZE": _same,
        "DEQUANTIZE": _same,
        "PAD": _pad,
        "STRIDED_SLICE": _crop,
        "SLICE": _slice,
    }
)
