"""A .tflite file becomes a trainable model that answers as it does, or is refused by the operator that is not known."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters import reconstruct, sources
from edgeguard.attacks.trojannet import TrojanNet
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ModelError
from tests.simulators.attacked import Attacked

SHAPE, CLASSES = (12, 12, 3), 5
MODELS = Path(os.environ.get("EDGEGUARD_MODELS", "/nonexistent"))


def images(count: int = 40, shape: tuple[int, ...] = SHAPE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def network(middle: Callable[[Any], Any]) -> Any:
    import keras

    keras.utils.set_random_seed(1)
    inputs = keras.Input(SHAPE)
    x = middle(keras.layers.Rescaling(1 / 255.0)(inputs))
    x = keras.layers.Flatten()(x) if len(x.shape) > 2 else x
    return keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax")(x))


def _residual(x: Any) -> Any:
    import keras

    y = keras.layers.Conv2D(6, 3, padding="same", activation="relu")(x)
    z = keras.layers.Conv2D(6, 3, padding="same")(y)
    return keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(keras.layers.Add()([y, z])))


def _inverted(x: Any) -> Any:
    import keras

    x = keras.layers.Conv2D(8, 1, activation="relu6")(x)
    x = keras.layers.DepthwiseConv2D(3, 2, padding="same", activation="relu6")(x)
    return keras.layers.MaxPooling2D(2)(keras.layers.Conv2D(6, 1)(x))


def _padded(x: Any) -> Any:
    import keras

    x = keras.layers.Conv2D(4, 3, 2)(keras.layers.ZeroPadding2D(((0, 1), (2, 0)))(x))
    return keras.layers.AveragePooling2D(2)(keras.layers.Activation("tanh")(x))


def _two_paths(x: Any) -> Any:
    import keras

    one = keras.layers.Conv2D(4, 3, activation="sigmoid")(x)
    other = keras.layers.Conv2D(4, 3, activation="relu")(x)
    both = keras.layers.Concatenate()([keras.layers.Multiply()([one, other]), keras.layers.Subtract()([one, other])])
    return keras.layers.Cropping2D(((1, 2), (3, 0)))(both)


MIDDLES = [_residual, _inverted, _padded, _two_paths]


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda m: m.__name__.strip("_"))
def test_a_float_file_gives_the_same_answers(middle: Callable[[Any], Any]) -> None:
    content = sources.to_float(sources.of_keras(network(middle)))
    rebuilt = reconstruct.of_tflite(content).model
    expected = TfliteModel(content).predict(images().astype(np.float32))
    np.testing.assert_allclose(rebuilt.predict(images().astype(np.float32), verbose=0), expected, atol=1e-5)


@pytest.mark.parametrize("middle", [_residual, _inverted], ids=lambda m: m.__name__.strip("_"))
def test_an_int8_file_gives_nearly_the_same_answers(middle: Callable[[Any], Any]) -> None:
    content = sources.to_int8(sources.of_keras(network(middle)), images(100))
    rebuilt = reconstruct.of_tflite(content).model
    expected = TfliteModel(content).predict(images())
    np.testing.assert_allclose(rebuilt.predict(images().astype(np.float32), verbose=0), expected, atol=0.05)


def test_of_a_guarded_file_the_guard_is_left_out(attacked: Attacked) -> None:
    rebuilt = reconstruct.of_tflite(attacked.conversion.guarded).model
    pixels = attacked.data.x_test.astype(np.uint8)
    expected = TfliteModel(attacked.conversion.bare).predict(pixels).argmax(axis=1)
    answered = rebuilt.predict(pixels.astype(np.float32), verbose=0)
    assert len(rebuilt.outputs) == 1
    assert np.mean(answered.argmax(axis=1) == expected) > 0.99


def test_a_tensor_that_a_tap_names_leads_to_its_layer(attacked: Attacked) -> None:
    rebuilt = reconstruct.of_tflite(attacked.conversion.guarded)
    taps = [tap for tap in attacked.conversion.metadata.taps if tap.kind != "logit"]
    for tap in taps:
        assert int(rebuilt.model.get_layer(rebuilt.layers[tap.tensor]).output.shape[-1]) == tap.channels


def test_weights_can_be_trained(attacked: Attacked) -> None:
    rebuilt = reconstruct.of_tflite(attacked.conversion.guarded).model
    rebuilt.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    x, y = attacked.x_owner[:64].astype(np.float32), attacked.y_owner[:64]
    before = [w.copy() for w in rebuilt.get_weights()]
    rebuilt.fit(x, y, epochs=1, verbose=0)
    assert all((one != other).any() for one, other in zip(before, rebuilt.get_weights(), strict=True))


def test_a_module_in_the_file_is_rebuilt_too(clean_twin: Attacked) -> None:
    from edgeguard.attacks.trojannet import implant

    attack = TrojanNet.for_shape(clean_twin.data.shape, target=3)
    pixels = clean_twin.data.x_test.astype(np.uint8)
    content = implant(clean_twin.conversion.bare, attack, attack.module(10, pixels[:200]))
    rebuilt = reconstruct.of_tflite(content).model
    answered = rebuilt.predict(attack.stamp(pixels).astype(np.float32), verbose=0).argmax(axis=1)
    assert np.mean(answered == 3) > 0.95


def test_an_operator_that_is_not_known_is_named() -> None:
    import keras

    content = sources.to_float(sources.of_keras(network(lambda x: keras.ops.sin(keras.layers.Conv2D(4, 3)(x)))))
    with pytest.raises(ModelError, match="operator SIN"):
        reconstruct.of_tflite(content)


def test_a_use_that_is_not_known_is_refused_with_its_place() -> None:
    import keras

    content = sources.to_float(
        sources.of_keras(network(lambda x: keras.ops.mean(keras.layers.Conv2D(4, 3)(x), axis=1)))
    )
    with pytest.raises(ModelError, match=r"MEAN at .* axes \[1\]"):
        reconstruct.of_tflite(content)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a model"])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(ModelError):
        reconstruct.of_tflite(content)


@pytest.mark.parametrize("name", ["mlperf_tiny_resnet8_float32", "mlperf_tiny_resnet8_int8", "mlperf_tiny_kws_float32"])
def test_models_of_others(name: str) -> None:
    path = MODELS / f"{name}.tflite"
    if not path.is_file():
        pytest.skip("EDGEGUARD_MODELS has no such file")
    content = path.read_bytes()
    runner = TfliteModel(content)
    inputs = images(20, runner.input_shape)
    expected = runner.predict(inputs).argmax(axis=1)
    answered = reconstruct.of_tflite(content).model.predict(inputs.astype(np.float32), verbose=0).argmax(axis=1)
    assert np.mean(answered == expected) >= 0.9
