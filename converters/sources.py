"""Reads what a user brings: a Keras file, a SavedModel folder, an ONNX file or a ``.tflite`` file.

TensorFlow is imported for all but the last. An ONNX model becomes a Keras model first, channels last, so that it can be
trained: the calibration data must be channels last too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import flatbuffer
from edgeguard.detection.metadata import IDENTIFIER
from edgeguard.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it came: either ready TFLite bytes, or a function with frozen weights that is still to be quantised.

    ``layers`` are the names of the trainable model's layers, the first one first; empty where there is none.
    """

    name: str
    tflite: bytes | None = None
    function: Any = None
    layers: tuple[str, ...] = ()


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
    if path.suffix in {".keras", ".h5"}:
        return _keras(path)
    if path.suffix == ".onnx":
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


def of_keras(model: Any, name: str = "model") -> Source:
    """The source that a Keras model in memory is.

    Raises:
        ModelError: several inputs, or an input of unknown shape.
    """
    import tensorflow as tf

    if len(model.inputs) != 1:
        raise ModelError(f"model {name}", got=f"{len(model.inputs)} inputs", expected="one input")
    shape = tuple(model.inputs[0].shape[1:])
    if None in shape:
        raise ModelError(f"model {name}", got=f"an input of shape {list(shape)}", expected="a known shape")
    call = tf.function(lambda pixels: model(pixels, training=False))
    concrete = call.get_concrete_function(tf.TensorSpec((1, *shape), tf.float32, name="pixels"))
    return Source(name=name, function=_frozen(concrete), layers=tuple(layer.name for layer in model.layers))


def _keras(path: Path) -> Source:
    import keras

    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises anything from KeyError to its own on a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"Keras model {path}", got=reason[:200], do="save it again") from error
    return of_keras(model, path.stem)


def _saved_model(path: Path) -> Source:
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(path))
        concrete = loaded.signatures["serving_default"]
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"SavedModel {path}", got=reason[:200], expected="a signature serving_default", do="save it again"
        ) from error
    specs: Sequence[Any] = list(concrete.structured_input_signature[1].values())
    if len(specs) != 1 or None in tuple(specs[0].shape[1:]):
        raise ModelError(f"SavedModel {path}", got=f"inputs {specs}", expected="one input of known shape")
    shape = (1, *(int(n) for n in specs[0].shape[1:]))
    key = next(iter(concrete.structured_input_signature[1]))
    call = tf.function(lambda pixels: concrete(**{key: pixels}))
    fixed = call.get_concrete_function(tf.TensorSpec(shape, specs[0].dtype, name="pixels"))
    return Source(name=path.name, function=_frozen(fixed))


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


def to_int8(source: Source, calibration: npt.NDArray[Any]) -> bytes:
    """The source as an int8 TFLite file: weights per channel, activations, input and output.

    Args:
        source: one with a function.
        calibration: clean inputs [N, ...] in the owner's own type; they set the ranges of the activations.
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([source.function])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([one[np.newaxis].astype(np.float32)] for one in calibration)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.int8
    converter.inference_output_type = tf.int8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bytes(converter.convert())


def to_float(source: Source) -> bytes:
    """The source as a float32 TFLite file: the reference that the int8 one is held against."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bytes(tf.lite.TFLiteConverter.from_concrete_functions([source.function]).convert())
