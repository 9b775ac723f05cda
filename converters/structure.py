"""Checks a ``.tflite`` file from its first byte to its last operator before anything else uses it. Pure and fast.

TFLite runtimes follow offsets and indices without looking, and so does the ``flatbuffers`` object API. Rules enforced
here, in this order:

* every table, vector and string lies inside the file, is aligned, and what it unpacks to is not much larger than the
  file: nothing is allocated or looped over because a file says so;
* one subgraph, bounded counts, every index in range, names where the runtimes need them;
* tensor shapes are positive and bounded, constants are exactly as long as their shape says, quantisation fits;
* operators stand in the order of execution: each input is a graph input, a constant, or an earlier output, and each
  tensor is written once;
* the common operators have the inputs, options and weight shapes that their kernels count on.

Not taken: several subgraphs and control flow, sparse constants, constants in other files, strings and resources.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeguard.detection.metadata import IDENTIFIER
from edgeguard.errors import ModelError

Model = Any
"""``schema.ModelT``: the object form of a file."""

MAX_TABLES = 50_000
MAX_TENSORS = 10_000
MAX_OPERATORS = 5_000
MAX_RANK = 8
MAX_OPERANDS = 4096
MAX_ACTIVATION_BYTES = 1 << 30
MAX_STEP = 1 << 16
MAX_SIZE = 1 << 24
_VERSION = 3
_OPTIONAL = -1
_UNPACKED_PER_BYTE, _UNPACKED_FREE = 4, 1 << 16

Op = schema.BuiltinOperator
Kind = schema.TensorType

# The tables of tensorflow/lite/schema/schema.fbs, field by field: a number is a scalar of so many bytes, s a string,
# *n a vector of n-byte scalars, +T a vector of tables, ?T a union of the family T (its type is the field before),
# - a field that was removed, anything else a table.
_LAYOUTS: dict[str, tuple[str, ...]] = {
    name: tuple(fields.split())
    for name, fields in {
        "Model": "4 +OperatorCode +SubGraph s +Buffer *4 +Metadata +SignatureDef +ExternalBufferGroup +ExternalBuffer",
        "OperatorCode": "1 s 4 4",
        "SubGraph": "+Tensor *4 *4 +Operator s 4",
        "Buffer": "*1 8 8",
        "Metadata": "s 4",
        "SignatureDef": "+TensorMap +TensorMap s - 4",
        "TensorMap": "s 4",
        "ExternalBufferGroup": "s",
        "ExternalBuffer": "4 4 8 8 s",
        "Tensor": "*4 1 4 s QuantizationParameters 1 SparsityParameters *4 1 +VariantSubType 4",
        "QuantizationParameters": "*4 *4 *4 *8 1 ?details 4",
        "SparsityParameters": "*4 *4 +DimensionMetadata",
        "DimensionMetadata": "1 4 1 ?index 1 ?index",
        "VariantSubType": "*4 1 1",
        "Operator": "4 *4 *4 1 ?options *1 1 *1 *4 8 8 1 ?options2 4",
        "CustomQuantization": "*1",
        "ConcatEmbeddingsOptions": "4 *4 *4",
        "FullyConnectedOptions": "1 1 1 1 1 *1",
        "ReshapeOptions": "*4",
        "SqueezeOptions": "*4",
        "VarHandleOptions": "s s",
        "BucketizeOptions": "*4",
    }.items()
}
_SCALARS_ONLY = ("1",) * 32
_UNIONS: dict[str, dict[int, str]] = {
    "details": {schema.QuantizationDetails.CustomQuantization: "CustomQuantization"},
    "index": {},
    "options": {
        code: name
        for name, code in vars(schema.BuiltinOptions).items()
        if isinstance(code, int) and not name.startswith("_")
    },
    "options2": {schema.BuiltinOptions2.DilateOptions: "", schema.BuiltinOptions2.ReduceWindowOptions: ""},
}

_BITS = {
    **dict.fromkeys((Kind.COMPLEX128,), 128),
    **dict.fromkeys((Kind.INT64, Kind.UINT64, Kind.FLOAT64, Kind.COMPLEX64), 64),
    **dict.fromkeys((Kind.FLOAT32, Kind.INT32, Kind.UINT32), 32),
    **dict.fromkeys((Kind.FLOAT16, Kind.BFLOAT16, Kind.INT16, Kind.UINT16), 16),
    **dict.fromkeys((Kind.UINT8, Kind.INT8, Kind.BOOL), 8),
    Kind.INT4: 4,
}
_ZERO_POINTS = {
    Kind.INT8: (-128, 127),
    Kind.UINT8: (0, 255),
    Kind.INT16: (-32768, 32767),
    Kind.INT4: (-8, 7),
    Kind.INT32: (0, 0),
}
_NAMES = {code: name for name, code in vars(Op).items() if isinstance(code, int) and not name.startswith("_")}
_KINDS = {code: name for name, code in vars(Kind).items() if isinstance(code, int) and not name.startswith("_")}


# What the kernels of the common operators count on: least and most inputs, options (! where they cannot be absent).
_RULES: dict[int, tuple[int, int, str]] = {
    getattr(Op, name): (int(least), int(most), options)
    for least, most, options, *names in (
        line.split()
        for line in """
            2 3 Conv2DOptions! CONV_2D
            2 3 DepthwiseConv2DOptions! DEPTHWISE_CONV_2D
            3 4 TransposeConvOptions! TRANSPOSE_CONV
            2 3 FullyConnectedOptions! FULLY_CONNECTED
            2 2 BatchMatMulOptions! BATCH_MATMUL
            1 1 Pool2DOptions! AVERAGE_POOL_2D MAX_POOL_2D L2_POOL_2D
            2 2 ReducerOptions! MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD
            2 2 AddOptions ADD
            2 2 SubOptions SUB
            2 2 MulOptions MUL
            2 2 DivOptions DIV
            2 2 PowOptions POW
            2 2 MaximumMinimumOptions MAXIMUM MINIMUM
            2 2 SquaredDifferenceOptions SQUARED_DIFFERENCE
            1 1 - RELU RELU6 RELU_N1_TO_1 LOGISTIC TANH ELU LOG SQRT RSQRT SIN FLOOR CEIL ROUND
            2 2 - PRELU
            1 1 LeakyReluOptions! LEAKY_RELU
            1 1 GeluOptions GELU
            1 1 HardSwishOptions HARD_SWISH
            1 1 AbsOptions ABS
            1 1 NegOptions NEG
            1 1 ExpOptions EXP
            1 1 SquareOptions SQUARE
            1 1 SoftmaxOptions! SOFTMAX
            1 1 LogSoftmaxOptions LOG_SOFTMAX
            1 1 L2NormOptions! L2_NORMALIZATION
            1 1 LocalResponseNormalizationOptions! LOCAL_RESPONSE_NORMALIZATION
            1 1 QuantizeOptions QUANTIZE
            1 1 DequantizeOptions DEQUANTIZE
            1 1 CastOptions CAST
            1 1 ShapeOptions SHAPE
            1 2 ReshapeOptions RESHAPE
            1 1 SqueezeOptions SQUEEZE
            2 2 ExpandDimsOptions EXPAND_DIMS
            2 2 TransposeOptions TRANSPOSE
            2 2 PadOptions PAD
            3 3 PadV2Options PADV2
            2 2 MirrorPadOptions! MIRROR_PAD
            1 9999 ConcatenationOptions! CONCATENATION
            1 9999 PackOptions! PACK
            1 1 UnpackOptions! UNPACK
            2 2 SplitOptions! SPLIT
            3 3 SplitVOptions! SPLIT_V
            3 3 SliceOptions SLICE
            4 4 StridedSliceOptions! STRIDED_SLICE
            2 2 GatherOptions! GATHER
            2 2 ArgMaxOptions! ARG_MAX
            2 2 ArgMinOptions! ARG_MIN
            2 2 TileOptions TILE
            2 2 FillOptions FILL
            2 2 BroadcastToOptions BROADCAST_TO
            2 2 ResizeBilinearOptions! RESIZE_BILINEAR
            2 2 ResizeNearestNeighborOptions! RESIZE_NEAREST_NEIGHBOR
            1 1 DepthToSpaceOptions! DEPTH_TO_SPACE
            1 1 SpaceToDepthOptions! SPACE_TO_DEPTH
            3 3 SpaceToBatchNDOptions SPACE_TO_BATCH_ND
            3 3 BatchToSpaceNDOptions BATCH_TO_SPACE_ND
        """.strip().splitlines()
    )
    for name in names
}
_SEVERAL_OUTPUTS = frozenset({Op.UNPACK, Op.SPLIT, Op.SPLIT_V})
_POOLS = frozenset({Op.AVERAGE_POOL_2D, Op.MAX_POOL_2D, Op.L2_POOL_2D})
_WEIGHTED = frozenset({Op.CONV_2D, Op.DEPTHWISE_CONV_2D, Op.FULLY_CONNECTED, Op.TRANSPOSE_CONV})
_BROADCASTING = frozenset({Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.POW, Op.MAXIMUM, Op.MINIMUM, Op.SQUARED_DIFFERENCE})
_POINTWISE = frozenset(
    {Op.RELU, Op.RELU6, Op.RELU_N1_TO_1, Op.LOGISTIC, Op.TANH, Op.ELU, Op.LOG, Op.SQRT, Op.RSQRT, Op.SIN, Op.FLOOR}
    | {Op.CEIL, Op.ROUND, Op.LEAKY_RELU, Op.GELU, Op.HARD_SWISH, Op.ABS, Op.NEG, Op.EXP, Op.SQUARE, Op.SOFTMAX}
    | {Op.LOG_SOFTMAX, Op.L2_NORMALIZATION, Op.LOCAL_RESPONSE_NORMALIZATION, Op.QUANTIZE, Op.DEQUANTIZE, Op.CAST}
)
_SCALED = _WEIGHTED | {Op.ADD, Op.SUB, Op.MUL, Op.SOFTMAX, Op.LOGISTIC, Op.TANH, Op.MEAN, Op.DEQUANTIZE, Op.QUANTIZE}
_CONTROL_FLOW = frozenset({Op.IF, Op.WHILE, Op.CALL, Op.CALL_ONCE, Op.DELEGATE})
_MAX_RATIO = 2.0**19
_MAX_PARAMETER_BYTES = 1024
_REDUCERS = frozenset({Op.MEAN, Op.SUM, Op.REDUCE_MAX, Op.REDUCE_MIN, Op.REDUCE_PROD})
_ALONG_AXES = _REDUCERS | {Op.ARG_MAX, Op.ARG_MIN, Op.EXPAND_DIMS, Op.SPLIT}
# Where axes, paddings or sizes stand among the inputs; the data is the other one of the first two.
_PARAMETERS: dict[int, int] = {
    **dict.fromkeys(_ALONG_AXES, 1),
    **dict.fromkeys((Op.PAD, Op.PADV2, Op.MIRROR_PAD, Op.TRANSPOSE, Op.TILE, Op.BROADCAST_TO), 1),
    **dict.fromkeys((Op.RESIZE_BILINEAR, Op.RESIZE_NEAREST_NEIGHBOR), 1),
    **dict.fromkeys((Op.SPLIT, Op.FILL, Op.TRANSPOSE_CONV), 0),
}
# Their batch does not stay where and what it is.
_MIXING = frozenset({Op.RESHAPE, Op.TRANSPOSE, Op.TILE, Op.BROADCAST_TO, Op.FILL, Op.FULLY_CONNECTED})
_STEPS = ("strideW", "strideH", "dilationWFactor", "dilationHFactor", "filterWidth", "filterHeight")


def check(content: bytes) -> Model:
    """Check a file and unpack it.

    Args:
        content: the whole ``.tflite`` file, from anywhere.

    Returns:
        ``schema.ModelT``, every index of which is in range.

    Raises:
        ModelError: not a TFLite file, or anything is wrong with it; the message names what.
    """
    if len(content) < 8 or content[4:8] != IDENTIFIER:
        raise ModelError(
            "model file",
            got=f"{len(content)} bytes that do not start as a TFLite file",
            expected="a .tflite file (identifier TFL3 at byte 4)",
        )
    try:
        _Verifier(content).table(struct.unpack_from("<I", content, 0)[0], "Model")
        model = schema.ModelT.InitFromPackedBuf(content, 0)
    except (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise _damaged(f"a flatbuffer that cannot be read ({str(error)[:200]})") from error
    _check_model(model, len(content))
    graph = model.subgraphs[0]
    constants = [_check_tensor(model, index, tensor) for index, tensor in enumerate(graph.tensors)]
    _check_order(model, constants)
    for number, operator in enumerate(graph.operators):
        _check_operator(model, number, operator)
    return model


def _damaged(reason: str) -> ModelError:
    return ModelError("model file", got=reason, do="export it again")


class _Verifier:
    """Walks the tables of a flatbuffer without unpacking any."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._tables = 0
        self._left = _UNPACKED_PER_BYTE * len(content) + _UNPACKED_FREE

    def table(self, position: int, name: str) -> None:
        """Check a table and all it points to, as laid out in ``_LAYOUTS``; raises ModelError or struct.error."""
        content = self._content
        self._tables += 1
        if self._tables > MAX_TABLES:
            raise _damaged(f"more than {MAX_TABLES} tables")
        vtable = position - struct.unpack_from("<i", content, position)[0]
        if position % 4 or vtable % 2 or not 0 <= vtable <= len(content) - 4:
            raise _damaged(f"a {name} at byte {position} that points outside the file")
        slots, size = struct.unpack_from("<HH", content, vtable)
        if slots < 4 or slots % 2 or size < 4 or vtable + slots > len(content) or position + size > len(content):
            raise _damaged(f"a {name} of {size} bytes at byte {position} of {len(content)}")
        self._spend(size, name)
        layout = _LAYOUTS.get(name, _SCALARS_ONLY)
        offsets = struct.unpack_from(f"<{slots // 2 - 2}H", content, vtable + 4)
        kind = 0
        for code, offset in zip(layout, offsets, strict=False):
            if not offset:
                kind = 0
            elif code.isdigit():
                width = int(code)
                if offset < 4 or offset + width > size or (position + offset) % width:
                    raise _damaged(f"a {name} with a field outside it")
                kind = content[position + offset] if width == 1 else 0
            elif code != "-":
                if offset < 4 or offset + 4 > size or (position + offset) % 4:
                    raise _damaged(f"a {name} with a field outside it")
                self._pointed(position + offset, code, name, kind)

    def _pointed(self, field: int, code: str, name: str, kind: int) -> None:
        """Follow the offset that stands at ``field``."""
        content = self._content
        target = field + struct.unpack_from("<I", content, field)[0]
        if code[0] == "?":
            family = _UNIONS[code[1:]]
            if kind not in family:
                raise _damaged(f"a {name} with {code[1:]} of the kind {kind}, which is not supported")
            self.table(target, family[kind])
        elif code[0] == "+":
            for entry in self._vector(target, 4, name):
                self.table(entry + struct.unpack_from("<I", content, entry)[0], code[1:])
        elif code[0] == "*":
            self._vector(target, int(code[1:]), name)
        elif code == "s":
            end = self._vector(target, 1, name).stop
            if end >= len(content) or content[end]:
                raise _damaged(f"a {name} with a text that does not end")
        else:
            self.table(target, code)

    def _vector(self, start: int, width: int, name: str) -> range:
        """Positions of a vector's entries."""
        count = struct.unpack_from("<I", self._content, start)[0]
        end = start + 4 + count * width
        if start % 4 or (count and (start + 4) % width) or end > len(self._content):
            raise _damaged(f"a {name} with a vector of {count} entries at byte {start} of {len(self._content)}")
        self._spend(count * width, name)
        return range(start + 4, end, width)

    def _spend(self, size: int, name: str) -> None:
        self._left -= size
        if self._left < 0:
            raise _damaged(f"a {name} that is used so often that the model is many times as large as its file")


def _check_model(model: Model, size: int) -> None:
    if model.version != _VERSION:
        raise _damaged(f"version {model.version} of the format, not {_VERSION}")
    if len(model.subgraphs or []) != 1:
        raise ModelError("model file", got=f"{len(model.subgraphs or [])} subgraphs", expected="one")
    if model.externalBuffers or model.externalBufferGroups:
        raise ModelError("model file", got="constants that lie in other files", expected="one file")
    graph = model.subgraphs[0]
    for what, entries, most in (
        ("tensors", graph.tensors, MAX_TENSORS),
        ("operators", graph.operators, MAX_OPERATORS),
        ("inputs", graph.inputs, MAX_OPERANDS),
        ("outputs", graph.outputs, MAX_OPERANDS),
        ("buffers", model.buffers, MAX_TENSORS),
        ("operator codes", model.operatorCodes, MAX_OPERATORS),
    ):
        if entries is None or not 1 <= len(entries) <= most:
            raise ModelError(
                "model file", got=f"{0 if entries is None else len(entries)} {what}", expected=f"1 to {most}"
            )
    tensors, buffers = len(graph.tensors), len(model.buffers)
    for code in model.operatorCodes:
        if _builtin(code) == Op.CUSTOM and not code.customCode:
            raise _damaged("a custom operator without a name")
    _in_range("output", graph.outputs, tensors)
    _in_range("input", graph.inputs, tensors)
    for entry in model.metadata or []:
        _named("metadata", entry.name)
        _in_range("metadata buffer", [entry.buffer], buffers)
    for signature in model.signatureDefs or []:
        _named("signature", signature.signatureKey)
        _in_range("signature subgraph", [signature.subgraphIndex], 1)
        for entry in [*(signature.inputs or []), *(signature.outputs or [])]:
            _named("signature tensor", entry.name)
            _in_range("signature tensor", [entry.tensorIndex], tensors)
    for number, buffer in enumerate(model.buffers):
        if buffer.offset > 1 and (buffer.data is not None or buffer.offset + buffer.size > size):
            raise _damaged(f"buffer {number} of {buffer.size} bytes at byte {buffer.offset} of {size}")


def _in_range(what: str, indices: Sequence[int], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise _damaged(f"{what} {index} of {count}")


def _named(what: str, name: object) -> None:
    if name is None:
        raise _damaged(f"a {what} without a name")


def _builtin(code: Any) -> int:
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(_indices(tensor.shape))


def _indices(values: Any) -> list[int]:
    if values is None:
        return []
    numbers: list[int] = np.atleast_1d(values).tolist()
    return numbers


def _check_tensor(model: Model, index: int, tensor: Any) -> bool:
    """Whether a tensor is a constant."""
    for sizes in (tensor.shape, tensor.shapeSignature):
        if sizes is not None and len(sizes) > MAX_RANK:
            raise ModelError(f"tensor {index}", got=f"{len(sizes)} axes", expected=f"at most {MAX_RANK}")
    shape = _shape(tensor)
    if tensor.type not in _BITS:
        raise ModelError(
            f"tensor {index}",
            got=f"type {_KINDS.get(tensor.type, tensor.type)}",
            expected="numbers",
            do="export it again",
        )
    if tensor.sparsity is not None or tensor.variantTensors or tensor.externalBuffer:
        raise ModelError(f"tensor {index}", got="a sparse or external form", expected="a dense constant")
    _in_range("tensor buffer", [tensor.buffer], len(model.buffers))
    # An empty list, such as no axes at all, is the one shape with a zero that means something.
    empty = shape == (0,)
    if not empty and any(n < 1 for n in shape):
        raise ModelError(f"tensor {index}", got=f"shape {list(shape)}", expected="positive sizes")
    signature = _indices(tensor.shapeSignature)
    if signature and (
        len(signature) != len(shape) or any(s not in {-1, n} for s, n in zip(signature, shape, strict=True))
    ):
        raise _damaged(f"tensor {index} of shape {list(shape)} with the signature {signature}")
    size = _size(tensor)
    buffer = model.buffers[tensor.buffer]
    length = len(np.atleast_1d(buffer.data)) if buffer.data is not None else buffer.size if buffer.offset > 1 else 0
    if length and length != size:
        raise _damaged(f"tensor {index} of {size} bytes with a constant of {length}")
    if length and (tensor.isVariable or -1 in signature):
        raise _damaged(f"tensor {index}, a variable or of open shape, with a constant")
    _check_quantization(index, tensor, shape, constant=bool(length))
    return bool(length) or empty


def _size(tensor: Any) -> int:
    return math.ceil(math.prod(_shape(tensor)) * _BITS[tensor.type] / 8)


def _check_quantization(index: int, tensor: Any, shape: tuple[int, ...], *, constant: bool) -> None:
    quantization = tensor.quantization
    if quantization is None or quantization.scale is None or tensor.type not in _ZERO_POINTS:
        return
    scales, zeros = np.atleast_1d(quantization.scale), quantization.zeroPoint
    zeros = np.zeros(len(scales), dtype=np.int64) if zeros is None else np.atleast_1d(zeros)
    axis = int(quantization.quantizedDimension)
    if len(scales) > 1 and not (0 <= axis < len(shape) and len(scales) == shape[axis]):
        raise _damaged(f"tensor {index} of shape {list(shape)} with {len(scales)} scales along axis {axis}")
    if len(zeros) not in {1, len(scales)}:
        raise _damaged(f"tensor {index} with {len(scales)} scales and {len(zeros)} zero points")
    # Converters give a constant of zeros the scale 0; the kernels divide by the scale of an activation.
    smallest = 0.0 if constant or tensor.type not in {Kind.INT8, Kind.UINT8} else np.finfo(np.float32).tiny
    if not (np.isfinite(scales).all() and (scales >= smallest).all()):
        raise _damaged(f"tensor {index} with a scale that is not a positive number")
    least, most = _ZERO_POINTS[tensor.type]
    if len(zeros) and not (least <= zeros.min() and zeros.max() <= most):
        raise _damaged(f"tensor {index} with a zero point outside {least} to {most}")


def _check_order(model: Model, constants: list[bool]) -> None:
    graph = model.subgraphs[0]
    inputs = _indices(graph.inputs)
    ready = {
        i for i, (constant, t) in enumerate(zip(constants, graph.tensors, strict=True)) if constant or t.isVariable
    }
    if len(set(inputs)) != len(inputs) or ready & set(inputs):
        raise _damaged("a graph input that is a constant, or stands twice")
    ready |= set(inputs)
    total = sum(_size(graph.tensors[i]) for i in inputs)
    for number, operator in enumerate(graph.operators):
        _in_range("operator code", [operator.opcodeIndex], len(model.operatorCodes))
        for operands in (operator.inputs, operator.outputs, operator.intermediates):
            if operands is not None and len(operands) > MAX_OPERANDS:
                raise ModelError(
                    f"operator {number}", got=f"{len(operands)} tensors", expected=f"at most {MAX_OPERANDS}"
                )
        reads = [i for i in _indices(operator.inputs) if i != _OPTIONAL]
        writes, scratch = _indices(operator.outputs), _indices(operator.intermediates)
        for what, which in (("input", reads), ("output", writes), ("intermediate", scratch)):
            _in_range(f"operator {number}: {what}", which, len(graph.tensors))
        if not ready.issuperset(reads):
            raise _damaged(f"operator {number}, which reads tensor {min(set(reads) - ready)} before it is written")
        if len(set(writes)) != len(writes) or ready & set(writes):
            raise _damaged(f"operator {number}, which writes an input, a constant, or a tensor twice")
        ready |= set(writes)
        total += sum(_size(graph.tensors[i]) for i in writes)
    if not ready.issuperset(_indices(graph.outputs)):
        raise _damaged("an output that no operator writes")
    if total > MAX_ACTIVATION_BYTES:
        raise ModelError("model file", got=f"{total} bytes of activations", expected=f"at most {MAX_ACTIVATION_BYTES}")


def _check_operator(model: Model, number: int, operator: Any) -> None:
    code = _builtin(model.operatorCodes[operator.opcodeIndex])
    what = f"operator {number} ({_NAMES.get(code, code)})"
    inputs, outputs = _indices(operator.inputs), _indices(operator.outputs)
    if code in _CONTROL_FLOW:
        raise ModelError(what, got="control flow", expected="a plain graph of operators")
    if code not in _NAMES or operator.largeCustomOptionsOffset > 1:
        raise ModelError(what, got="unknown", expected="a built-in operator")
    if code not in _RULES:
        return
    least, most, options = _RULES[code]
    if not least <= len(inputs) <= most or _OPTIONAL in inputs[:least] or not outputs:
        raise _damaged(f"{what} with {len(inputs)} inputs, not {least} to {most}")
    if len(outputs) > 1 and code not in _SEVERAL_OUTPUTS:
        raise _damaged(f"{what} with {len(outputs)} outputs")
    found = type(operator.builtinOptions).__name__.removesuffix("T")
    if options.endswith("!") if found == "NoneType" else options not in {"-", found, f"{found}!"}:
        raise _damaged(f"{what} with options of {found}, not {options.removesuffix('!')}")
    _check_options(what, operator.builtinOptions)
    if code == Op.DEPTHWISE_CONV_2D and len(inputs) < 3:
        raise _damaged(f"{what} without a place for its bias, which XNNPACK reads unasked")
    _check_fit(model, code, what, operator)


def _check_fit(model: Model, code: int, what: str, operator: Any) -> None:
    """Whether the tensors of a common operator fit each other and its options."""
    inputs, outputs = _indices(operator.inputs), _indices(operator.outputs)
    tensors = model.subgraphs[0].tensors
    read, written = [tensors[i] for i in inputs if i != _OPTIONAL], tensors[outputs[0]]
    shapes, out = [_shape(t) for t in read], _shape(written)
    if code in _SCALED:
        _check_scales(code, what, read, written)
    closed = not any(_open(code, tensor) for tensor in (*read, written))
    if closed and not _weights_fit(code, shapes, out):
        raise _damaged(f"{what} with inputs of shapes {[list(shape) for shape in shapes]} that do not fit")
    if closed and not _output_fits(code, operator.builtinOptions, shapes, out):
        raise _damaged(f"{what} with an output of shape {list(out)} that does not fit its inputs")
    if code in {Op.SPACE_TO_BATCH_ND, Op.BATCH_TO_SPACE_ND}:
        for tensor, least in ((read[1], 1), (read[2], 0)):
            if not all(least <= n <= MAX_STEP for n in _whole_numbers(model, tensor) or []):
                raise _damaged(f"{what} with a block or padding that is not a small number")
    position = _PARAMETERS.get(code, len(read))
    values = _whole_numbers(model, read[position]) if position < len(read) else None
    if values is not None and not _parameters_fit(
        code, operator.builtinOptions, values, shapes[1 - position], out, closed=closed
    ):
        raise _damaged(f"{what} with parameters {values[:16]} that do not fit its input or output")


def _check_options(what: str, options: Any) -> None:
    for name in _STEPS:
        step = getattr(options, name, 1)
        if not 1 <= step <= MAX_STEP:
            raise _damaged(f"{what} with {name} {step}")
    if not 1 <= getattr(options, "blockSize", 1) <= MAX_STEP:
        raise _damaged(f"{what} with a block of {options.blockSize}")
    if getattr(options, "padding", 0) not in {0, 1} or not 0 <= getattr(options, "fusedActivationFunction", 0) <= 5:
        raise _damaged(f"{what} with an unknown padding or activation")


def _check_scales(code: int, what: str, read: list[Any], written: Any) -> None:
    """Whether the scales of an int8 operator are there, and their ratio is one that fixed-point numbers can hold."""
    largest = []
    for tensor in (*read, written):
        if tensor.type in {Kind.INT8, Kind.UINT8}:
            scales = None if tensor.quantization is None else tensor.quantization.scale
            if scales is None or not np.size(scales):
                raise _damaged(f"{what} with {_KINDS[tensor.type]} numbers without a scale")
            largest.append(float(np.max(scales)))
    if len(largest) > 1 and written.type in {Kind.INT8, Kind.UINT8}:
        product = max(largest[:-1]) if code in {Op.ADD, Op.SUB} else math.prod(largest[:-1])
        if not product / largest[-1] < _MAX_RATIO:
            raise _damaged(f"{what} with scales {largest} that are too far apart")


def _weights_fit(code: int, shapes: list[tuple[int, ...]], out: tuple[int, ...]) -> bool:
    """Whether the weights of an operator fit its data. ``shapes`` are its inputs', an absent one left out."""
    fits = True
    if code in _BROADCASTING:
        pairs = zip(reversed(shapes[0]), reversed(shapes[1]), strict=False)
        fits = all(1 in pair or pair[0] == pair[1] for pair in pairs)
    elif code in _POOLS:
        fits = len(shapes[0]) == len(out) == 4
    elif code == Op.FULLY_CONNECTED:
        data, weights = shapes[:2]
        fits = len(weights) == 2 and math.prod(data) % weights[1] == 0 and _bias_fits(shapes[2:], weights[0])
    elif code in _WEIGHTED:
        data, weights = (shapes[2], shapes[1]) if code == Op.TRANSPOSE_CONV else shapes[:2]
        bias = shapes[3:] if code == Op.TRANSPOSE_CONV else shapes[2:]
        fits = len(data) == len(weights) == len(out) == 4 and _bias_fits(bias, out[3])
        if fits and code == Op.TRANSPOSE_CONV:
            fits = shapes[0] == (4,) and weights[3] == data[3] and out[3] == weights[0]
        elif fits and code == Op.DEPTHWISE_CONV_2D:
            fits = weights[0] == 1 and weights[3] % data[3] == 0 and out[3] == weights[3]
        elif fits:
            groups, rest = divmod(data[3], weights[3])
            fits = not rest and weights[0] % groups == 0 and out[3] == weights[0]
    return fits


def _bias_fits(bias: list[tuple[int, ...]], channels: int) -> bool:
    return not bias or math.prod(bias[0]) == channels


def _open(code: int, tensor: Any) -> bool:
    """Whether a size is known at run time only; it is written as 1 until then.

    Most operators leave the batch as it is, so that it does not matter to them that it is open.
    """
    return -1 in _indices(tensor.shapeSignature)[0 if code in _MIXING else 1 :]


def _whole_numbers(model: Model, tensor: Any) -> list[int] | None:
    """The values of a short constant of whole numbers; None for anything else."""
    data = model.buffers[tensor.buffer].data
    if data is None or tensor.type not in {Kind.INT32, Kind.INT64} or _size(tensor) > _MAX_PARAMETER_BYTES:
        return None
    values: list[int] = np.frombuffer(bytes(data), dtype="<i4" if tensor.type == Kind.INT32 else "<i8").tolist()
    return values


def _parameters_fit(
    code: int, options: Any, values: list[int], data: tuple[int, ...], out: tuple[int, ...], *, closed: bool
) -> bool:
    """Whether the axes, paddings or sizes that an operator is given as a constant fit its input and output."""
    rank = len(data) + (code == Op.EXPAND_DIMS)
    if code in _ALONG_AXES:
        if not all(-rank <= axis < rank for axis in values):
            return False
    elif any(not 0 <= n <= MAX_SIZE for n in values):
        return False
    axes = {n % rank for n in values} if rank else set()
    expected = out  # of SPLIT, whose outputs depend on more
    if code in _REDUCERS:
        kept = [(1 if axis in axes else n) for axis, n in enumerate(data) if axis not in axes or options.keepDims]
        expected = tuple(kept)
    elif code in {Op.ARG_MAX, Op.ARG_MIN}:
        expected = tuple(n for axis, n in enumerate(data) if axis not in axes)
    elif code == Op.EXPAND_DIMS:
        at = min(axes, default=0)
        expected = (*data[:at], 1, *data[at:])
    elif code in {Op.PAD, Op.PADV2, Op.MIRROR_PAD}:
        added = [before + after for before, after in zip(values[::2], values[1::2], strict=False)]
        expected = tuple(n + more for n, more in zip(data, added, strict=False))
    elif code == Op.TRANSPOSE:
        expected = tuple(data[axis] for axis in values) if sorted(values) == list(range(len(data))) else ()
    elif code == Op.TILE:
        expected = tuple(n * times for n, times in zip(data, values, strict=False))
    elif code in {Op.RESIZE_BILINEAR, Op.RESIZE_NEAREST_NEIGHBOR}:
        expected = (*data[:1], *values, *data[3:])
    elif code in {Op.FILL, Op.BROADCAST_TO, Op.TRANSPOSE_CONV}:
        expected = tuple(values)
    return not closed or expected == out


def _output_fits(code: int, options: Any, shapes: list[tuple[int, ...]], out: tuple[int, ...]) -> bool:
    """Whether an output has the shape that its operator computes. XNNPACK does not look."""
    if code in _POINTWISE | _BROADCASTING:
        return out == np.broadcast_shapes(*shapes)
    if code in {Op.RESHAPE, Op.FULLY_CONNECTED}:
        into, each = (1, 1) if code == Op.RESHAPE else shapes[1]
        return math.prod(out) * each == math.prod(shapes[0]) * into
    if code in _POOLS:
        window = (options.filterHeight, options.filterWidth)
        return out == (shapes[0][0], *_windows(options, shapes[0], window), shapes[0][3])
    if code in {Op.CONV_2D, Op.DEPTHWISE_CONV_2D}:
        rows, columns = shapes[1][1:3]
        window = ((rows - 1) * options.dilationHFactor + 1, (columns - 1) * options.dilationWFactor + 1)
        return out[:3] == (shapes[0][0], *_windows(options, shapes[0], window))
    return True


def _windows(options: Any, data: tuple[int, ...], window: tuple[int, int]) -> tuple[int, ...]:
    """How many positions a window takes over rows and columns."""
    same = options.padding == schema.Padding.SAME
    covered = [n if same else n - w + 1 for n, w in zip(data[1:3], window, strict=True)]
    return tuple(-(-n // step) for n, step in zip(covered, (options.strideH, options.strideW), strict=True))


__all__ = ["Model", "check"]
