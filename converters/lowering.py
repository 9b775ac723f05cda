"""Makes a float and an int8 TFLite file of any source. What others wrote is read in a child process.

Rules enforced here:

* Keras, SavedModel and ONNX files meet TensorFlow in a child (``untrusted.Child``) that is given the path, the
  calibration array and plain options, and hands back files; this process never imports a framework for them. Where the
  kernel has Landlock, the child writes nowhere but into its own folder, and connects to nobody; it can read;
* a ``.tflite`` file, foreign or from the child, is parsed and run in a child before a runtime of this process has it;
* a float ``.tflite`` file, be its weights half-precision or int8, has no TensorFlow graph behind it: its weights become
  float32, and TensorFlow's own calibrator and quantiser work on the flatbuffer, in a child too;
* int8 means int8: a model that keeps an operator in float is refused by that operator's name;
* a file that is quantised already stays as it is.

A model in memory (``sources.of_keras``) is the caller's own, and converted in this process.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from converters import calibration as calibrating
from converters import confine, flatbuffer, guard, quantise, sources, untrusted
from converters.sources import InputType, Source
from converters.untrusted import Child, Limits, Progress, probe
from edgeguard.errors import ConfigError, ModelError

Array = npt.NDArray[Any]
Kind = schema.TensorType

MAX_RANGE_INPUTS = 500
"""How many inputs set the ranges of the activations; more take longer and change little."""

MAX_FILE_BYTES = (2 << 30) - 1
LIMITS = Limits(memory_bytes=12 << 30, cpu_seconds=1800, wall_seconds=900.0, file_bytes=MAX_FILE_BYTES)
"""Of the child. TensorFlow maps several GiB of addresses before it does anything."""

_CALIBRATION, _FLOAT, _INT8, _KERAS = "calibration.npy", "float.tflite", "int8.tflite", "trainable"
_INTEGERS = {Kind.INT8: np.int8, Kind.UINT8: np.uint8, Kind.INT16: np.int16}
_REPORT_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A source as TFLite.

    Attributes:
        name: the source's, without its suffix.
        float_tflite: the reference that the int8 file is held against; None when the source was quantised already.
        int8_tflite: None when quantising was not asked for and the source was float.
        layers: names of the trainable model's layers, the first one first; empty where there is none.
        keras: the file of the trainable model, where it was asked for.
    """

    name: str
    float_tflite: bytes | None
    int8_tflite: bytes | None
    layers: tuple[str, ...] = ()
    keras: bytes | None = None


class _Order(msgspec.Struct, frozen=True):
    """What a child is to do. Paths are bytes, because not every file name is a text."""

    path: bytes
    folder: bytes
    quantise: bool
    input_type: InputType | None
    keras: str


def lower(
    source: Path | Source,
    calibration: Array,
    *,
    quantise: bool = True,
    input_type: InputType | None = None,
    keras: Literal[".keras", ".h5"] | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Lowered:
    """Make a source TFLite.

    Args:
        source: a file or folder that nobody checked, or a model in memory.
        calibration: clean inputs [N, ...] in the owner's own type; the first MAX_RANGE_INPUTS set the ranges of the
            activations.
        quantise: also make it int8.
        input_type: of the int8 model's input; int8 unless told. An input of whole numbers stays what it is.
        keras: also return the trainable Keras model, as a file of this kind.
        limits: of the child.
        progress: called with a text, the steps done and the steps in total.

    Raises:
        ConfigError: there is no such file, or options that contradict each other.
        ModelError: the source cannot be read, has other than one input, operators that TFLite or int8 does not have, or
            no trainable model where one was asked for; or the calibration inputs do not fit it.
        UntrustedError: reading it crashed, took too long, or too much memory.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    _check_options(quantise, input_type)
    ranges = calibration[:MAX_RANGE_INPUTS]
    options = _Options(ranges, quantise, input_type, keras, limits or LIMITS, progress or _silent)
    if isinstance(source, Path):
        if source.exists() and sources.needs_framework(source):
            return _from_path(source, options)
        source = sources.read(source)
    if source.tflite is None:
        return _from_function(source, options)
    return _from_tflite(source.name, source.tflite, options)


@dataclass(frozen=True)
class _Options:
    calibration: Array
    quantise: bool
    input_type: InputType | None
    keras: str | None
    limits: Limits
    progress: Progress


def _silent(text: str, done: int, total: int) -> None:
    pass


def _check_options(quantise: bool, input_type: InputType | None) -> None:
    if input_type is not None and not quantise:
        raise ConfigError(
            "input type", got=f"{input_type} for a model that stays float", do="leave --input or --float away"
        )


def _from_function(source: Source, options: _Options) -> Lowered:
    """A model in memory, in this process."""
    if options.keras is not None and source.keras is None:
        raise _not_trainable(f"model {source.name}")
    made = _convert(source, options)
    saved = None
    if options.keras is not None:
        with tempfile.TemporaryDirectory(prefix="edgeguard-") as folder:
            place = Path(folder) / f"{_KERAS}{options.keras}"
            source.keras.save(place)
            saved = place.read_bytes()
    return Lowered(name=source.name, layers=source.layers, keras=saved, **made)


def _convert(source: Source, options: _Options) -> dict[str, bytes | None]:
    if options.quantise:
        calibrating.check_fit(options.calibration, sources.input_shape(source), sources.input_dtype(source))
        _check_input_type(source.name, sources.input_dtype(source).name, options.input_type)
    options.progress("making it float TFLite", 1, 3)
    original = sources.to_float(source)
    quantised = None
    if options.quantise:
        options.progress("making it int8", 2, 3)
        quantised = sources.to_int8(source, options.calibration, options.input_type or "int8")
        _check_int8(source.name, quantised)
    return {"float_tflite": original, "int8_tflite": quantised}


def _check_input_type(name: str, dtype: str, asked: InputType | None) -> None:
    """Raise ModelError where a model takes whole numbers, and others were asked for."""
    if asked is not None and dtype not in {"float32", asked}:
        raise ModelError(f"model {name}", got=f"an input of type {dtype}", expected=asked, do="leave --input away")


def _check_int8(name: str, content: bytes) -> None:
    left = quantise.float_operators(flatbuffer.parse(content))
    if left:
        raise ModelError(
            f"model {name}",
            got=f"operators that have no int8 form: {', '.join(left)}",
            expected="operators that TFLite can quantise",
            do="replace them, or convert with --float",
        )


def _not_trainable(what: str) -> ModelError:
    return ModelError(
        what,
        got="no trainable model in it",
        expected="a .keras, .h5 or .onnx file, where a trainable model is asked for",
        do="leave --keras away, or convert the original",
    )


def _from_path(path: Path, options: _Options) -> Lowered:
    """A Keras, SavedModel or ONNX file, in a child."""
    if options.keras is not None and path.is_dir():
        raise _not_trainable(f"SavedModel {path}")
    with tempfile.TemporaryDirectory(prefix="edgeguard-") as temporary:
        folder = Path(temporary)
        order = _order(folder, options, path=os.fsencode(path.absolute()), keras=options.keras or "")
        layers = _call("convert_path", b"", order, options, returns=tuple[str, ...])
        original = _collect(folder / _FLOAT)
        probe(original)
        quantised = None
        if options.quantise:
            quantised = _collect(folder / _INT8)
            probe(quantised)
        saved = None if options.keras is None else _read_file(folder / f"{_KERAS}{options.keras}")
    name = path.name if path.is_dir() else path.stem
    return Lowered(name=name, float_tflite=original, int8_tflite=quantised, layers=layers, keras=saved)


def _from_tflite(name: str, content: bytes, options: _Options) -> Lowered:
    """A ``.tflite`` file, which only a child runs before it is known to be harmless."""
    if options.keras is not None:
        raise _not_trainable(f"model {name}")
    model = flatbuffer.parse(content)
    _check_batch(name, model)
    shape, dtype = flatbuffer.input_of(model)
    probe(content)
    if is_quantised(model):
        if options.input_type not in {None, dtype.name}:
            raise ModelError(
                f"model {name}",
                got=f"a file that is quantised already and takes {dtype.name}",
                expected=options.input_type,
                do="leave --input away, or bring the float model",
            )
        return Lowered(name=name, float_tflite=None, int8_tflite=content)
    if not options.quantise:
        return Lowered(name=name, float_tflite=content, int8_tflite=None)
    calibrating.check_fit(options.calibration, shape, dtype)
    _check_input_type(name, dtype.name, options.input_type)
    guard.strip(model)
    with_float_constants(model)
    with tempfile.TemporaryDirectory(prefix="edgeguard-") as temporary:
        folder = Path(temporary)
        order = _order(folder, options, path=os.fsencode(name))
        _call("convert_flatbuffer", flatbuffer.pack(model), order, options, returns=type(None))
        quantised = _collect(folder / _INT8)
    _check_int8(name, quantised)
    probe(quantised)
    quantised = flatbuffer.attach(quantised, flatbuffer.associated(content))
    return Lowered(name=name, float_tflite=content, int8_tflite=quantised)


def _check_batch(name: str, model: flatbuffer.Model) -> None:
    graph = model.subgraphs[0]
    shape = graph.tensors[int(graph.inputs[0])].shape
    found = [] if shape is None else [int(n) for n in shape]
    if found[:1] != [1]:
        raise ModelError(f"model {name}", got=f"an input of shape {found}", expected="a batch of 1, or of any size")


def is_quantised(model: flatbuffer.Model) -> bool:
    """Whether a model has activations of quantised whole numbers."""
    graph = model.subgraphs[0]
    made = [*graph.inputs, *(i for operator in graph.operators for i in operator.outputs)]
    return any(_scales(graph.tensors[int(i)]) is not None for i in made)


def with_float_constants(model: flatbuffer.Model) -> None:
    """Make the half-precision and quantised constants of a float model float32, in place.

    ``real = scale * (stored - zero_point)``, per tensor or along one axis. Operators that did the same at run time are
    taken out. Ranges noted on float tensors, from an earlier calibration, go too: the quantiser would trust them.
    """
    graph = model.subgraphs[0]
    constant = {i for i, tensor in enumerate(graph.tensors) if flatbuffer.constant(model, tensor)}
    for index in constant:
        tensor = graph.tensors[index]
        values = _real_values(tensor, flatbuffer.constant(model, tensor))
        if values is not None:
            tensor.buffer, tensor.type = len(model.buffers), Kind.FLOAT32
            model.buffers.append(schema.BufferT(data=np.frombuffer(values.tobytes(), dtype=np.uint8)))
    kept = []
    for operator in graph.operators:
        dequantises = flatbuffer.builtin_code(model, operator) == schema.BuiltinOperator.DEQUANTIZE
        if dequantises and int(operator.inputs[0]) in constant:
            graph.tensors[int(operator.outputs[0])].buffer = graph.tensors[int(operator.inputs[0])].buffer
        else:
            kept.append(operator)
    graph.operators = kept
    used = sorted({operator.opcodeIndex for operator in kept})  # the calibrator looks up versions that nothing uses
    model.operatorCodes = [model.operatorCodes[code] for code in used]
    for operator in kept:
        operator.opcodeIndex = used.index(operator.opcodeIndex)
    for tensor in graph.tensors:
        if tensor.type == Kind.FLOAT32:
            tensor.quantization = None


def _real_values(tensor: Any, stored: bytes) -> npt.NDArray[np.float32] | None:
    """A constant in real numbers; None where it is what it is."""
    shape = () if tensor.shape is None else tuple(int(n) for n in tensor.shape)
    if tensor.type == Kind.FLOAT16:
        return np.frombuffer(stored, dtype="<f2").astype("<f4")
    scales = _scales(tensor)
    if scales is None:
        return None
    zeros = tensor.quantization.zeroPoint
    zeros = np.zeros(1) if zeros is None else np.atleast_1d(zeros)
    along = [1] * len(shape)
    if len(scales) > 1:
        along[int(tensor.quantization.quantizedDimension)] = -1
    whole = np.frombuffer(stored, dtype=np.dtype(_INTEGERS[tensor.type]).newbyteorder("<")).reshape(shape)
    zeros = np.broadcast_to(zeros, scales.shape).reshape(along)
    return np.asarray((whole - zeros) * scales.astype(np.float64).reshape(along), dtype="<f4")


def _scales(tensor: Any) -> npt.NDArray[np.float32] | None:
    """The scales of a tensor of quantised whole numbers; None for any other."""
    quantization = tensor.quantization
    if tensor.type not in _INTEGERS or quantization is None or quantization.scale is None:
        return None
    scales = np.atleast_1d(quantization.scale)
    return scales if len(scales) else None


def _order(folder: Path, options: _Options, *, path: bytes, keras: str = "") -> _Order:
    """The order for a child, with the calibration array where the child finds it."""
    if options.quantise:
        np.save(folder / _CALIBRATION, options.calibration, allow_pickle=False)
    return _Order(path, os.fsencode(folder), options.quantise, options.input_type, keras)


def _call(function: str, content: bytes, order: _Order, options: _Options, *, returns: type[Any]) -> Any:
    options.progress("starting TensorFlow", 0, 3)
    with Child(options.limits) as child:
        return child.call(
            f"{__name__}:{function}",
            content,
            msgspec.json.encode(order).decode(),
            returns=returns,
            doing="TensorFlow",
            progress=options.progress,
        )


def _collect(path: Path) -> bytes:
    """A model that a child wrote, checked: whoever wrote the source may have had the child."""
    content = _read_file(path)
    flatbuffer.parse(content)
    return content


def _read_file(path: Path) -> bytes:
    try:
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_FILE_BYTES:
            return path.read_bytes()
    except FileNotFoundError:
        pass
    raise untrusted.UntrustedError("crashed", got=f"no {path.name} from TensorFlow", do="do not use it")


def convert_path(_: bytes, argument: str) -> tuple[str, ...]:
    """Convert the file or folder that an order names, and return its layers. Call it in a child only."""
    order, folder = _begin(argument)
    source = sources.read(Path(os.fsdecode(order.path)))
    calibration = np.load(folder / _CALIBRATION, allow_pickle=False) if order.quantise else np.empty(0)
    options = _Options(calibration, order.quantise, order.input_type, None, LIMITS, untrusted.report)
    made = _convert(source, options)
    for name, content in ((_FLOAT, made["float_tflite"]), (_INT8, made["int8_tflite"])):
        if content is not None:
            (folder / name).write_bytes(content)
    if order.keras:
        source.keras.save(folder / f"{_KERAS}{order.keras}")
    return source.layers


def convert_flatbuffer(content: bytes, argument: str) -> None:
    """Quantise a float ``.tflite`` file from :func:`with_float_constants`. Call it in a child only.

    The same three steps, of TensorFlow 2.19, that its converter takes once it has made a flatbuffer of a graph.
    """
    order, folder = _begin(argument)
    import tensorflow as tf
    from tensorflow.lite.python.convert import mlir_quantize
    from tensorflow.lite.python.optimize.calibrator import Calibrator, add_intermediate_tensors
    from tensorflow.lite.python.util import modify_model_io_type

    dtype = flatbuffer.input_of(flatbuffer.parse(content))[1]
    calibration = np.load(folder / _CALIBRATION, allow_pickle=False).astype(dtype, copy=False)
    try:
        calibrated = Calibrator(add_intermediate_tensors(content)).calibrate(lambda: _fed(calibration))
        input_type = tf.as_dtype(order.input_type or "int8") if dtype == np.float32 else tf.float32  # which leaves it
        made = modify_model_io_type(mlir_quantize(calibrated), input_type, tf.int8)
    except MemoryError:
        raise
    except Exception as error:  # whatever the native parts raise
        raise ModelError(
            f"model {os.fsdecode(order.path)}",
            got=f"a file that TensorFlow cannot quantise ({' '.join(str(error).split())[:300]})",
            do="convert with --float",
        ) from error
    (folder / _INT8).write_bytes(made)


def _fed(calibration: Array) -> Iterator[list[Array]]:
    for row, one in enumerate(calibration):
        if row % _REPORT_EVERY == 0:
            untrusted.report("setting ranges", row, len(calibration))
        yield [one[np.newaxis]]


def _begin(argument: str) -> tuple[_Order, Path]:
    """The order of a child, and where its files lie; keep TensorFlow within the child's limits and that folder."""
    order = msgspec.json.decode(argument, type=_Order)
    folder = os.fsdecode(order.folder)
    os.environ["TMPDIR"] = folder
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a GPU's driver maps more addresses than the child may have
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "2"
    confine.writes_to([Path(folder)])
    untrusted.report("reading the model", 0, 3)
    return order, Path(folder)


__all__ = ["LIMITS", "Lowered", "is_quantised", "lower", "with_float_constants"]
