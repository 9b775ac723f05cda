"""A hostile model file is refused by name, at no cost; a whole one is never refused."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import example, given, settings
from hypothesis import strategies as st

from converters import flatbuffer, structure
from edgeguard.errors import ModelError
from tests.simulators import needs
from tests.simulators.attacked import Attacked

Op = schema.BuiltinOperator
THIRD_PARTY = (
    "mlperf_tiny_resnet8_int8.tflite",
    "mlperf_tiny_resnet8_float32.tflite",
    "mlperf_tiny_kws_float32.tflite",
)


# What is whole passes.


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_third_party_file_passes(name: str) -> None:
    assert len(structure.check(needs.third_party_model(name).read_bytes()).subgraphs) == 1


@pytest.mark.parametrize("which", ["bare", "guarded"])
def test_a_file_of_ours_passes_and_packed_again_still_does(which: str, attacked: Attacked) -> None:
    content = getattr(attacked.conversion, which)
    model = structure.check(content)
    again = structure.check(flatbuffer.pack(model))
    assert flatbuffer.fingerprint(again) == flatbuffer.fingerprint(model)


def _networks() -> dict[str, Callable[[], Any]]:
    import keras
    from keras import layers

    def sequence(shape: tuple[int | None, ...], *parts: Any, batch: int | None = 1) -> Any:
        return keras.Sequential([keras.Input(shape, batch_size=batch), *parts])

    def several_outputs() -> Any:
        pixels = keras.Input((12, 12, 3), batch_size=1)
        seen = layers.Conv2D(4, 3, activation="relu")(pixels)
        return keras.Model(pixels, [layers.Dense(3)(layers.Flatten()(seen)), layers.GlobalMaxPooling2D()(seen)])

    return {
        "depthwise": lambda: sequence(
            (16, 16, 3),
            layers.Conv2D(8, 3, 2, "same", activation="relu6"),
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            layers.BatchNormalization(),
            layers.AveragePooling2D(2, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ),
        "transpose convolution": lambda: sequence(
            (8, 8, 2), layers.Conv2DTranspose(4, 3, 2, "same"), layers.Conv2DTranspose(1, 3, 2, activation="sigmoid")
        ),
        "one-dimensional": lambda: sequence(
            (64, 2),
            layers.Conv1D(4, 9, 4, activation="relu"),
            layers.Conv1D(4, 3, dilation_rate=2, padding="causal"),
            layers.LeakyReLU(),
            layers.GlobalMaxPooling1D(),
            layers.Dense(2),
        ),
        "dense": lambda: sequence((20,), layers.Dense(8, activation="tanh"), layers.Dense(1, activation="sigmoid")),
        "several outputs": several_outputs,
        "dynamic batch": lambda: sequence(
            (8, 8, 3),
            layers.ZeroPadding2D(),
            layers.Conv2D(4, 3, dilation_rate=2, activation="elu"),
            layers.UpSampling2D(),
            layers.Flatten(),
            layers.Dense(4, activation="softmax"),
            batch=None,
        ),
        "open time axis": lambda: sequence(
            (None, 3), layers.Dense(4), layers.Conv1D(4, 3), layers.GlobalAveragePooling1D(), batch=None
        ),
    }


@pytest.mark.parametrize("kind", ["float", "fp16", "dynamic range", "int8"])
@pytest.mark.parametrize(
    "name",
    [
        "depthwise",
        "transpose convolution",
        "one-dimensional",
        "dense",
        "several outputs",
        "dynamic batch",
        "open time axis",
    ],
)
def test_what_the_tensorflow_converter_makes_passes(name: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    import tensorflow as tf

    model = _networks()[name]()
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if kind != "float":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "fp16":
        converter.target_spec.supported_types = [tf.float16]
    if kind == "int8":
        shape = (1, *(n or 16 for n in model.inputs[0].shape[1:]))
        inputs = np.random.default_rng(0).random((4, *shape), dtype=np.float32)
        converter.representative_dataset = lambda: ([one] for one in inputs)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = converter.convert()
    assert structure.check(content).subgraphs[0].operators


# What is damaged is refused, and the message names the rule.


def _first(model: Any, code: int) -> Any:
    return next(o for o in model.subgraphs[0].operators if flatbuffer.builtin_code(model, o) == code)


def _tensor(model: Any, code: int, position: int) -> Any:
    return model.subgraphs[0].tensors[_first(model, code).inputs[position]]


def _set(path: str, value: Any) -> Callable[[Any], None]:
    """A defect: one field of the first convolution (``conv``), its tensors, the graph or the model set to a value."""
    owner, _, field = path.rpartition(".")

    def apply(model: Any) -> None:
        graph = model.subgraphs[0]
        convolution = _first(model, Op.CONV_2D)
        owners = {
            "model": model,
            "graph": graph,
            "conv": convolution,
            "conv.options": convolution.builtinOptions,
            "code": model.operatorCodes[convolution.opcodeIndex],
            "weights": graph.tensors[convolution.inputs[1]],
            "weights.quantization": graph.tensors[convolution.inputs[1]].quantization,
            "weights.buffer": model.buffers[graph.tensors[convolution.inputs[1]].buffer],
            "written": graph.tensors[convolution.outputs[0]],
            "written.quantization": graph.tensors[convolution.outputs[0]].quantization,
            "signature": model.signatureDefs[0],
            "signature.output": model.signatureDefs[0].outputs[0],
            "metadata": model.metadata[0],
        }
        setattr(owners[owner], field, value)

    return apply


def _ints(*values: int) -> Any:
    return np.asarray(values, dtype=np.int32)


def _floats(*values: float) -> Any:
    return np.asarray(values, dtype=np.float32)


def _two_graphs(model: Any) -> None:
    model.subgraphs.append(model.subgraphs[0])


def _out_of_order(model: Any) -> None:
    model.subgraphs[0].operators.reverse()


def _written_twice(model: Any) -> None:
    model.subgraphs[0].operators.append(model.subgraphs[0].operators[0])


def _writes_the_input(model: Any) -> None:
    graph = model.subgraphs[0]
    _first(model, Op.CONV_2D).outputs = np.asarray(graph.inputs, dtype=np.int32)


def _long_constant(model: Any) -> None:
    buffer = model.buffers[_tensor(model, Op.CONV_2D, 1).buffer]
    buffer.data = np.append(buffer.data, np.uint8(0))


def _far_constant(model: Any) -> None:
    buffer = model.buffers[_tensor(model, Op.CONV_2D, 1).buffer]
    buffer.data, buffer.offset, buffer.size = None, 1 << 20, 1 << 10


def _external(model: Any) -> None:
    model.externalBufferGroups = [schema.ExternalBufferGroupT(name=b"/etc/passwd")]


def _short_bias(model: Any) -> None:
    tensor = _tensor(model, Op.CONV_2D, 2)
    buffer = model.buffers[tensor.buffer]
    tensor.shape, buffer.data, tensor.quantization = _ints(1), np.array(buffer.data)[:4], None


def _far_axis(model: Any) -> None:
    """The axes of the guard's first maximum."""
    tensor = _tensor(model, Op.REDUCE_MAX, 1)
    model.buffers[tensor.buffer].data = np.frombuffer(_ints(1, 9).tobytes(), dtype=np.uint8)


def _unscaled(model: Any) -> None:
    model.subgraphs[0].tensors[_first(model, Op.CONV_2D).outputs[0]].quantization = None


def _two_outputs(model: Any) -> None:
    graph = model.subgraphs[0]
    graph.tensors.append(schema.TensorT(shape=_ints(1), type=schema.TensorType.INT32))
    operator = _first(model, Op.CONV_2D)
    operator.outputs = np.append(operator.outputs, np.int32(len(graph.tensors) - 1))


def _unwritten_output(model: Any) -> None:
    graph = model.subgraphs[0]
    graph.tensors.append(schema.TensorT(shape=_ints(1), type=schema.TensorType.INT32))
    graph.outputs = np.append(graph.outputs, np.int32(len(graph.tensors) - 1))


def _custom(model: Any) -> None:
    code = model.operatorCodes[_first(model, Op.CONV_2D).opcodeIndex]
    code.builtinCode = code.deprecatedBuiltinCode = Op.CUSTOM


def _control_flow(model: Any) -> None:
    code = model.operatorCodes[_first(model, Op.CONV_2D).opcodeIndex]
    code.builtinCode, code.deprecatedBuiltinCode = Op.WHILE, Op.WHILE


DEFECTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another version": (_set("model.version", 2), "version 2"),
    "two subgraphs": (_two_graphs, "2 subgraphs"),
    "no outputs": (_set("graph.outputs", _ints()), "0 outputs"),
    "an output that is no tensor": (_set("graph.outputs", _ints(4000)), "output 4000 of"),
    "an input that is no tensor": (_set("graph.inputs", _ints(-3)), "input -3 of"),
    "an input twice": (_set("graph.inputs", _ints(0, 0)), "stands twice"),
    "constants in other files": (_external, "other files"),
    "a buffer that is none": (_set("weights.buffer", 4000), "tensor buffer 4000 of"),
    "a buffer beyond the file": (_far_constant, "at byte 1048576"),
    "a constant of another length": (_long_constant, "with a constant of"),
    "a variable with a constant": (_set("weights.isVariable", True), "a variable"),
    "a negative size": (_set("written.shape", _ints(1, -8, 8, 16)), "positive sizes"),
    "no size": (_set("written.shape", _ints(1, 0, 8, 16)), "positive sizes"),
    "nine axes": (_set("written.shape", _ints(*[1] * 9)), "9 axes"),
    "a tensor of gigabytes": (_set("written.shape", _ints(1, 1 << 15, 1 << 15, 16)), "bytes of activations"),
    "a signature of another rank": (_set("written.shapeSignature", _ints(-1)), "signature"),
    "text": (_set("written.type", schema.TensorType.STRING), "STRING"),
    "an unknown type": (_set("written.type", 99), "type 99"),
    "a sparse constant": (_set("weights.sparsity", schema.SparsityParametersT()), "sparse"),
    "too few scales": (_set("weights.quantization.scale", _floats(1.0, 1.0)), "2 scales"),
    "scales along no axis": (_set("weights.quantization.quantizedDimension", 7), "along axis 7"),
    "too many zero points": (_set("written.quantization.zeroPoint", np.zeros(3, np.int64)), "3 zero points"),
    "a zero point out of range": (_set("written.quantization.zeroPoint", np.full(1, 300)), "zero point"),
    "a scale of zero": (_set("written.quantization.scale", _floats(0.0)), "positive number"),
    "a scale that is no number": (_set("written.quantization.scale", _floats(np.nan)), "positive number"),
    "a scale next to nothing": (_set("written.quantization.scale", _floats(1e-44)), "positive number"),
    "scales too far apart": (_set("written.quantization.scale", _floats(1e-30)), "too far apart"),
    "int8 without a scale": (_unscaled, "without a scale"),
    "operators out of order": (_out_of_order, "before it is written"),
    "a tensor written twice": (_written_twice, "a tensor twice"),
    "an input that is written": (_writes_the_input, "writes an input"),
    "an output that nothing writes": (_unwritten_output, "no operator writes"),
    "an operator code that is none": (_set("conv.opcodeIndex", 4000), "operator code 4000 of"),
    "an unknown operator": (_set("code.builtinCode", 9999), "unknown"),
    "a custom operator without a name": (_custom, "custom operator without a name"),
    "control flow": (_control_flow, "control flow"),
    "one input where two are needed": (_set("conv.inputs", _ints(0)), "1 inputs, not 2 to 3"),
    "thousands of inputs": (_set("conv.inputs", _ints(*[0] * 5000)), "5000 tensors"),
    "a needed input left out": (_set("conv.inputs", _ints(0, -1, -1)), "inputs, not 2 to 3"),
    "two outputs where one is made": (_two_outputs, "with 2 outputs"),
    "no options": (_set("conv.builtinOptionsType", 0), "options of NoneType"),
    "options of an unknown kind": (_set("conv.builtinOptionsType", 250), "options of the kind 250"),
    "a step of zero": (_set("conv.options.strideW", 0), "strideW 0"),
    "a step beyond reason": (_set("conv.options.strideH", 1 << 20), "strideH"),
    "a negative dilation": (_set("conv.options.dilationHFactor", -1), "dilationHFactor -1"),
    "an unknown padding": (_set("conv.options.padding", 7), "padding"),
    "an unknown activation": (_set("conv.options.fusedActivationFunction", 77), "activation"),
    "a bias of another length": (_short_bias, "do not fit"),
    "an output of another size": (_set("conv.options.strideW", 3), "output of shape"),
    "an axis that the data has not": (_far_axis, "parameters"),
    "a metadata buffer that is none": (_set("metadata.buffer", 4000), "metadata buffer 4000"),
    "metadata without a name": (_set("metadata.name", None), "metadata without a name"),
    "a signature without a name": (_set("signature.signatureKey", None), "signature without a name"),
    "a signature of no subgraph": (_set("signature.subgraphIndex", 1), "signature subgraph 1"),
    "a signature of no tensor": (_set("signature.output.tensorIndex", 4000), "signature tensor 4000"),
    "a signature tensor without a name": (_set("signature.output.name", None), "without a name"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_file_is_refused_for(name: str, attacked: Attacked) -> None:
    apply, message = DEFECTS[name]
    model = structure.check(attacked.conversion.guarded)
    apply(model)
    if name == "no options":
        _first(model, Op.CONV_2D).builtinOptions = None
    content = flatbuffer.pack(model)
    with pytest.raises(ModelError, match=message) as caught:
        structure.check(content)
    assert "\n" not in str(caught.value)


# Operators that none of the files above has: one at a time.


def _single(code: int, options: Any, reads: list[Any], out: tuple[int, ...]) -> bytes:
    """A file of one operator. A tuple in ``reads`` is the shape of a float input, an array is an int32 constant."""
    number = schema.TensorType
    kept = [_ints(*read.ravel()).tobytes() for read in reads if isinstance(read, np.ndarray)]
    buffers = [schema.BufferT(), *(schema.BufferT(data=np.frombuffer(raw, dtype=np.uint8)) for raw in kept)]
    tensors, constants = [], 0
    for read in reads:
        shape = read.shape if isinstance(read, np.ndarray) else read
        constants += isinstance(read, np.ndarray)
        tensors.append(
            schema.TensorT(
                shape=_ints(*shape),
                type=number.INT32 if isinstance(read, np.ndarray) else number.FLOAT32,
                buffer=constants if isinstance(read, np.ndarray) else 0,
            )
        )
    tensors.append(schema.TensorT(shape=_ints(*out), type=number.FLOAT32, buffer=0))
    operator = schema.OperatorT(
        opcodeIndex=0,
        inputs=_ints(*range(len(reads))),
        outputs=_ints(len(reads)),
        builtinOptionsType=getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"), 0),
        builtinOptions=options,
    )
    graph = schema.SubGraphT(
        tensors=tensors,
        inputs=_ints(*(i for i, read in enumerate(reads) if isinstance(read, tuple))),
        outputs=_ints(len(reads)),
        operators=[operator],
    )
    return flatbuffer.pack(
        schema.ModelT(
            version=3,
            operatorCodes=[schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=min(code, 127))],
            subgraphs=[graph],
            buffers=buffers,
        )
    )


_POOL = schema.Pool2DOptionsT(strideW=2, strideH=2, filterWidth=2, filterHeight=2)
_CONV = schema.Conv2DOptionsT(strideW=1, strideH=1)
_DEPTHWISE = schema.DepthwiseConv2DOptionsT(strideW=1, strideH=1)
_UP = schema.TransposeConvOptionsT(strideW=2, strideH=2)
_AROUND = _ints(0, 0, 1, 1, 2, 2, 0, 0).reshape(4, 2)
SINGLES: dict[str, tuple[int, Any, list[Any], tuple[int, ...]]] = {
    "grouped convolution": (Op.CONV_2D, _CONV, [(1, 4, 4, 4), (8, 3, 3, 2)], (1, 4, 4, 8)),
    "depthwise convolution": (Op.DEPTHWISE_CONV_2D, _DEPTHWISE, [(1, 4, 4, 2), (1, 3, 3, 4), (4,)], (1, 4, 4, 4)),
    "transpose convolution": (Op.TRANSPOSE_CONV, _UP, [_ints(1, 8, 8, 3), (3, 2, 2, 4), (1, 4, 4, 4)], (1, 8, 8, 3)),
    "dense": (Op.FULLY_CONNECTED, schema.FullyConnectedOptionsT(), [(1, 2, 8), (3, 16), (3,)], (1, 3)),
    "pool": (Op.MAX_POOL_2D, _POOL, [(1, 5, 5, 2)], (1, 3, 3, 2)),
    "sum of two": (Op.ADD, None, [(1, 4, 4, 2), (2,)], (1, 4, 4, 2)),
    "activation": (Op.RELU, None, [(1, 4)], (1, 4)),
    "reshape": (Op.RESHAPE, None, [(1, 4, 4)], (1, 16)),
    "padding": (Op.PAD, None, [(1, 4, 4, 2), _AROUND], (1, 6, 8, 2)),
    "transpose": (Op.TRANSPOSE, None, [(1, 4, 6), _ints(0, 2, 1)], (1, 6, 4)),
    "tile": (Op.TILE, None, [(1, 4), _ints(1, 3)], (1, 12)),
    "fill": (Op.FILL, None, [_ints(1, 4), ()], (1, 4)),
    "resize": (Op.RESIZE_BILINEAR, schema.ResizeBilinearOptionsT(), [(1, 4, 4, 2), _ints(8, 9)], (1, 8, 9, 2)),
    "mean": (Op.MEAN, schema.ReducerOptionsT(keepDims=False), [(1, 4, 4, 2), _ints(1, -2)], (1, 2)),
    "mean that keeps its axes": (Op.MEAN, schema.ReducerOptionsT(keepDims=True), [(1, 4, 2), _ints(1)], (1, 1, 2)),
    "largest": (Op.ARG_MAX, schema.ArgMaxOptionsT(), [(1, 9), np.asarray(-1, np.int32)], (1,)),
    "new axis": (Op.EXPAND_DIMS, None, [(1, 4), np.asarray(-1, np.int32)], (1, 4, 1)),
}


@pytest.mark.parametrize("name", SINGLES)
def test_an_operator_passes_with_the_output_that_it_computes_and_with_no_other(name: str) -> None:
    code, options, reads, out = SINGLES[name]
    assert structure.check(_single(code, options, reads, out)).version == 3
    with pytest.raises(ModelError, match="fit"):
        structure.check(_single(code, options, reads, (*out[:-1], out[-1] + 1)))


MISFITS: dict[str, tuple[int, Any, list[Any], tuple[int, ...], str]] = {
    "no place for the bias": (
        Op.DEPTHWISE_CONV_2D,
        _DEPTHWISE,
        [(1, 4, 4, 2), (1, 3, 3, 4)],
        (1, 4, 4, 4),
        "place for its bias",
    ),
    "channels that are no groups": (Op.CONV_2D, _CONV, [(1, 4, 4, 4), (8, 3, 3, 3)], (1, 4, 4, 8), "do not fit"),
    "weights of three axes": (Op.CONV_2D, _CONV, [(1, 4, 4, 4), (8, 3, 4)], (1, 4, 4, 8), "do not fit"),
    "weights of other data": (
        Op.FULLY_CONNECTED,
        schema.FullyConnectedOptionsT(),
        [(1, 15), (3, 16)],
        (1, 3),
        "do not fit",
    ),
    "shapes that cannot be added": (Op.ADD, None, [(1, 4), (1, 3)], (1, 4), "do not fit"),
    "a pool over three axes": (Op.MAX_POOL_2D, _POOL, [(5, 5, 2)], (3, 3, 2), "do not fit"),
    "a window without a size": (
        Op.MAX_POOL_2D,
        schema.Pool2DOptionsT(strideW=1, strideH=1),
        [(1, 5, 5, 2)],
        (1, 5, 5, 2),
        "filterWidth 0",
    ),
    "a block of nothing": (
        Op.DEPTH_TO_SPACE,
        schema.DepthToSpaceOptionsT(blockSize=0),
        [(1, 4, 4, 4)],
        (1, 8, 8, 1),
        "block of 0",
    ),
    "a huge padding": (
        Op.SPACE_TO_BATCH_ND,
        None,
        [(1, 4, 4, 2), _ints(2, 2), _ints(0, 0, 0, 1 << 24).reshape(2, 2)],
        (4, 2, 2, 2),
        "small number",
    ),
    "a negative padding": (Op.PAD, None, [(1, 4), _ints(0, 0, -1, 1).reshape(2, 2)], (1, 4), "parameters"),
    "an axis twice": (Op.TRANSPOSE, None, [(1, 4, 4), _ints(0, 1, 1)], (1, 4, 4), "parameters"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_operator_is_refused_for(name: str) -> None:
    code, options, reads, out, message = MISFITS[name]
    with pytest.raises(ModelError, match=message):
        structure.check(_single(code, options, reads, out))


def _root(content: bytes) -> int:
    position: int = struct.unpack_from("<I", content)[0]
    return position


def _vtable(content: bytes) -> int:
    table = _root(content)
    vtable: int = table - struct.unpack_from("<i", content, table)[0]
    return vtable


def _vector(content: bytes, slot: int) -> int:
    """Where a vector of the root table begins."""
    table = _root(content)
    field = table + struct.unpack_from("<H", content, _vtable(content) + slot)[0]
    start: int = field + struct.unpack_from("<I", content, field)[0]
    return start


def _with(content: bytes, position: int, value: int) -> bytes:
    return content[:position] + struct.pack("<I", value & 0xFFFFFFFF) + content[position + 4 :]


RAW: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda c: b"", "0 bytes"),
    "seven bytes": (lambda c: c[:7], "7 bytes"),
    "another identifier": (lambda c: c[:4] + b"TFL9" + c[8:], "identifier TFL3"),
    "only a beginning": (lambda c: c[:8], "cannot be read|at byte"),
    "half the file": (lambda c: c[: len(c) // 2], "cannot be read|of"),
    "a root beyond the end": (lambda c: _with(c, 0, 0xFFFFFFF0), "cannot be read"),
    "a root that is not aligned": (lambda c: _with(c, 0, _root(c) + 1), "points outside"),
    "a table without a layout": (lambda c: _with(c, _root(c), 0x7FFFFFFF), "points outside"),
    "a table larger than the file": (lambda c: _with(c, _vtable(c), 0xFFFF0008), "a Model of 65535 bytes"),
    "a layout of half a field": (lambda c: _with(c, _vtable(c), 0x00080007), "a Model of 8 bytes"),
    "a number outside its table": (lambda c: _with(c, _vtable(c) + 4, 0x0000FFFC), "field outside it"),
    "a list outside its table": (lambda c: _with(c, _vtable(c) + 4, 0xFFFC0000), "field outside it"),
    "four billion operator codes": (lambda c: _with(c, _vector(c, 6), 0xFFFFFFFF), "4294967295 entries"),
    "four billion buffers": (lambda c: _with(c, _vector(c, 12), 0xFFFFFFFF), "4294967295 entries"),
    "an entry beyond the end": (lambda c: _with(c, _vector(c, 12) + 4, 0x7FFFFFF0), "cannot be read"),
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_are_refused_before_they_are_unpacked_for(name: str, attacked: Attacked) -> None:
    change, message = RAW[name]
    content = change(attacked.conversion.bare)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message):
            structure.check(content)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_of_too_many_tables_is_refused(attacked: Attacked) -> None:
    model = structure.check(attacked.conversion.bare)
    model.metadata = [schema.MetadataT(name=b"x") for _ in range(structure.MAX_TABLES)]
    with pytest.raises(ModelError, match="more than 50000 tables"):
        structure.check(flatbuffer.pack(model))


def test_a_small_file_that_unpacks_to_a_large_model_is_refused() -> None:
    builder = flatbuffers.Builder(1 << 16)
    name = builder.CreateString("x" * 20_000)
    schema.MetadataStart(builder)
    schema.MetadataAddName(builder, name)
    entry = schema.MetadataEnd(builder)
    schema.ModelStartMetadataVector(builder, 5_000)
    for _ in range(5_000):  # all the same table: 100 MB of names in a file of 40 KB
        builder.PrependUOffsetTRelative(entry)
    entries = builder.EndVector()
    schema.ModelStart(builder)
    schema.ModelAddVersion(builder, 3)
    schema.ModelAddMetadata(builder, entries)
    builder.Finish(schema.ModelEnd(builder), file_identifier=b"TFL3")
    content = bytes(builder.Output())
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="many times as large"):
            structure.check(content)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_checked_but_nothing_else_happens(attacked: Attacked, data: st.DataObject) -> None:
    content = bytearray(attacked.conversion.guarded)
    for position in data.draw(st.lists(st.integers(0, len(content) // 4 - 1), min_size=1, max_size=4)):
        value = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
        content[4 * position : 4 * position + 4] = struct.pack("<I", value)
    try:
        model = structure.check(bytes(content))
    except ModelError:
        return
    graph = model.subgraphs[0]
    for operator in graph.operators:
        assert all(-1 <= i < len(graph.tensors) for i in operator.inputs)
        assert all(0 <= i < len(graph.tensors) for i in operator.outputs)
    assert all(0 <= t.buffer < len(model.buffers) for t in graph.tensors)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=512), st.integers(8, 64))
@example(b"", 8)
def test_noise_is_refused(noise: bytes, root: int) -> None:
    with pytest.raises(ModelError):
        structure.check(struct.pack("<I", root) + b"TFL3" + noise)


# The layouts are the schema's.


class _Recorder:
    """A flatbuffers builder that writes nothing: it notes what the schema's own writers ask of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def note(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            return 0

        return note


_WIDTHS = {"Bool": 1, "Int8": 1, "Uint8": 1, "Int16": 2, "Int32": 4, "Uint32": 4, "Float32": 4, "Int64": 8, "Uint64": 8}


def _fields(table: str) -> dict[int, str]:
    """Slot -> the code of ``structure._LAYOUTS`` for a field, as far as the generated code tells it."""
    found = {}
    reader = getattr(schema, table)
    for name in dir(schema):
        field = name.removeprefix(f"{table}Add")
        if field == name or not hasattr(reader, field):
            continue
        recorder = _Recorder()
        getattr(schema, name)(recorder, 0)
        call, arguments = recorder.calls[0]
        kind = call.removeprefix("Prepend").removesuffix("Slot")
        if kind in _WIDTHS:
            found[arguments[0]] = str(_WIDTHS[kind])
        elif hasattr(reader, f"{field}AsNumpy"):
            recorder = _Recorder()
            getattr(schema, f"{table}Start{field}Vector")(recorder, 1)
            found[arguments[0]] = f"*{recorder.calls[0][1][0]}"
        else:
            found[arguments[0]] = "+" if hasattr(reader, f"{field}Length") else "other"
    return found


def _simple(code: str) -> str:
    return code if code[0] in "*0123456789" else "+" if code[0] == "+" else "other"


@pytest.mark.parametrize("table", structure._LAYOUTS)
def test_the_layout_is_that_of_the_schema_for(table: str) -> None:
    layout = structure._LAYOUTS[table]
    assert {slot: _simple(code) for slot, code in enumerate(layout) if code != "-"} == _fields(table)


@pytest.mark.parametrize("table", sorted({*structure._UNIONS["options"].values()} - {"NONE"} - set(structure._LAYOUTS)))
def test_options_without_a_layout_hold_numbers_only(table: str) -> None:
    assert all(code.isdigit() for code in _fields(table).values())
