"""Reads what a user brings: a Keras file, a SavedModel folder, an ONNX file or a ``.tflite`` file.

TensorFlow is imported for all but the last, here, in the caller's process: a file that is not trusted goes through
``lowering``, which calls this in a child. An ONNX model becomes a Keras model first, channels last, so that it can be
trained: the calibration data must be channels last too.

A model has one input of known shape, but for its batch axis, which becomes 1. An input of whole numbers, which only a
SavedModel can have, stays one.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from converters import flatbuffer
from edgeguard.detection.metadata import IDENTIFIER
from edgeguard.errors import ConfigError, ModelError

InputType = Literal["int8", "uint8"]

_KERAS = (".keras", ".h5")
_ONNX = ".onnx"
_DEFAULT_SIGNATURE = "serving_default"
_INIT_SIGNATURES = frozenset({"__saved_model_init_op"})
_INPUT_TYPES = ("float32", "uint8", "int8", "int16")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it came: either ready TFLite bytes, or a function with frozen weights that is still to be quantised.

    ``layers`` are the names of the trainable model's layers, the first one first; empty where there is none. ``keras``
    is that model.
    """

    name: str
    tflite: bytes | None = None
    function: Any = None
    layers: tuple[str, ...] = ()
    keras: Any = None


def read(path: Path) -> Source:
    """Read a model.

    Raises:
        ConfigError: there is no such file or folder.
        ModelError: it is of no kind that can be read, or damaged.
    """
    if not path.exists():
        raise ConfigError(f"model {path}", got="no such file or folder", do="check the path")
    if path.is_dir():
        if not (path / "saved_model.pb").is_file():
            raise ModelError(f"model folder {path}", got="no saved_model.pb in it", expected="a SavedModel")
        return _saved_model(path)
    if path.suffix in _KERAS:
        return _keras(path)
    if path.suffix == _ONNX:
        from converters.onnx_import import to_keras

        return of_keras(to_keras(path), path.stem)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model {path}", got=error.strerror or str(error), do="check its permissions") from error
    if content[4:8] == IDENTIFIER:
        return Source(name=path.stem, tflite=content)
    raise ModelError(
        f"model {path}",
        got=f"a {path.suffix or 'nameless'} file of {len(content)} bytes that is not TFLite",
        expected=".tflite, .keras, .h5, .onnx or a SavedModel folder",
        do="export it to one of these",
    )


def needs_framework(path: Path) -> bool:
    """Whether reading a model means TensorFlow, and for an ONNX file its package: for all but ``.tflite``."""
    return path.is_dir() or path.suffix in {*_KERAS, _ONNX}


def of_keras(model: Any, name: str = "model") -> Source:
    """The source that a Keras model in memory is.

    Raises:
        ModelError: several inputs, or an input of unknown shape.
    """
    import tensorflow as tf

    inputs = getattr(model, "inputs", None)
    if not inputs:  # a subclassed model that was never called, or a bare layer
        raise ModelError(f"model {name}", got="no known input", expected="a model that was built or called once")
    if len(inputs) != 1:
        raise ModelError(f"model {name}", got=f"{len(inputs)} inputs", expected="one input")
    shape = tuple(inputs[0].shape[1:])
    if None in shape:
        raise ModelError(f"model {name}", got=f"an input of shape {list(shape)}", expected="a known shape")
    call = tf.function(lambda pixels: model(pixels, training=False))
    concrete = call.get_concrete_function(tf.TensorSpec((1, *shape), tf.float32, name="pixels"))
    layers = tuple(layer.name for layer in model.layers)
    return Source(name=name, function=_frozen(concrete), layers=layers, keras=model)


def _keras(path: Path) -> Source:
    import keras

    try:
        model = keras.models.load_model(path, compile=False)
    except MemoryError:
        raise
    except Exception as error:  # Keras raises anything from KeyError to its own on a damaged file
        raise ModelError(f"Keras model {path}", got=_reason(error), do="save it again") from error
    return of_keras(model, path.stem)


def _saved_model(path: Path) -> Source:
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(path))
        signatures = dict(loaded.signatures)
    except MemoryError:
        raise
    except Exception as error:  # as Keras does
        raise ModelError(f"SavedModel {path}", got=_reason(error), do="save it again") from error
    concrete = signatures[_signature(path, tuple(signatures))]
    specs = list(concrete.structured_input_signature[1].items())
    if len(specs) != 1:
        raise ModelError(f"SavedModel {path}", got=f"{len(specs)} inputs", expected="one input")
    key, spec = specs[0]
    if spec.shape.rank in {None, 0} or None in tuple(spec.shape[1:]):
        raise ModelError(f"SavedModel {path}", got=f"an input of shape {spec.shape}", expected="a known shape")
    if spec.dtype.name not in _INPUT_TYPES:
        raise ModelError(
            f"SavedModel {path}",
            got=f"an input of type {spec.dtype.name}",
            expected=f"one of {', '.join(_INPUT_TYPES)}",
        )
    call = tf.function(lambda pixels: concrete(**{key: pixels}))
    try:
        fixed = call.get_concrete_function(tf.TensorSpec((1, *spec.shape[1:]), spec.dtype, name="pixels"))
    except Exception as error:  # a signature of a fixed batch, or ops that this TensorFlow does not know
        raise ModelError(f"SavedModel {path}", got=_reason(error), expected="a batch of any size, or of 1") from error
    return Source(name=path.name, function=_frozen(fixed))


def _signature(path: Path, names: tuple[str, ...]) -> str:
    """The signature to convert: the default one, else the only one."""
    found = tuple(name for name in names if name not in _INIT_SIGNATURES)
    if _DEFAULT_SIGNATURE in found:
        return _DEFAULT_SIGNATURE
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"SavedModel {path}",
        got=f"the signatures {', '.join(sorted(found))}" if found else "no signature",
        expected=f"{_DEFAULT_SIGNATURE}, or one signature",
        do="save it again with one signature",
    )


def _reason(error: Exception) -> str:
    """The first line that says anything, in a few words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _frozen(concrete: Any) -> Any:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(concrete)


def input_shape(source: Source) -> tuple[int, ...]:
    """Shape of one input, without the batch axis. Raises ModelError where a TFLite file is damaged."""
    if source.tflite is None:
        return tuple(int(n) for n in source.function.inputs[0].shape[1:])
    graph = flatbuffer.parse(source.tflite).subgraphs[0]
    if len(graph.inputs) != 1:
        raise ModelError(f"model {source.name}", got=f"{len(graph.inputs)} inputs", expected="one input")
    return tuple(int(n) for n in graph.tensors[int(graph.inputs[0])].shape[1:])


def input_dtype(source: Source) -> np.dtype[Any]:
    """Type of the input that a source with a function takes."""
    return np.dtype(source.function.inputs[0].dtype.as_numpy_dtype)


def to_int8(source: Source, calibration: npt.NDArray[Any], input_type: InputType = "int8") -> bytes:
    """The source as an int8 TFLite file: weights per channel, activations, input and output.

    What has no int8 form stays float inside; see ``quantise.float_operators``.

    Args:
        source: one with a function.
        calibration: clean inputs [N, ...] in the owner's own type; they set the ranges of the activations.
        input_type: of the model's input, where the source takes float numbers.

    Raises:
        ModelError: it has operators that TFLite does not know.
    """
    import tensorflow as tf

    dtype = input_dtype(source)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([source.function])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([one[np.newaxis].astype(dtype)] for one in calibration)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.as_dtype(input_type)
    converter.inference_output_type = tf.int8
    return _converted(source, converter)


def to_float(source: Source) -> bytes:
    """The source as a float32 TFLite file: the reference that the int8 one is held against.

    Raises:
        ModelError: it has operators that TFLite does not know.
    """
    import tensorflow as tf

    return _converted(source, tf.lite.TFLiteConverter.from_concrete_functions([source.function]))


def _converted(source: Source, converter: Any) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bytes(converter.convert())
    except (MemoryError, OSError):
        raise
    except Exception as error:  # the converter's own, and whatever its native part raises
        _refuse(source, error)


def _refuse(source: Source, error: Exception) -> NoReturn:
    unknown = sorted(set(re.findall(r"'tf\.(\w+)' op is neither", str(error))))
    raise ModelError(
        f"model {source.name}",
        got=f"operators that TFLite does not have: {', '.join(unknown)}" if unknown else _reason(error),
        expected="TFLite's built-in operators",
        do="replace them" if unknown else "bring the model in another format",
    ) from error
