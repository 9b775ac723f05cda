"""An int8 model answers as its float original did, or is refused by the name of the layer that spoils it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters import flatbuffer, quantise, sources
from converters.quantise import LayerError, Parity
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

SHAPE = (8, 8, 1)
INPUTS = 120
LAYER = LayerError(tensor="conv7/Relu", relative_rms=0.42, added=0.4)


@dataclass(frozen=True)
class Pair:
    """One model as float and as int8, and what it was quantised with."""

    float_tflite: bytes
    int8_tflite: bytes
    inputs: Array


def pixels(shape: tuple[int, ...] = SHAPE, count: int = INPUTS) -> Array:
    return np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)


def pair(model: Any, inputs: Array) -> Pair:
    source = sources.of_keras(model)
    return Pair(sources.to_float(source), sources.to_int8(source, inputs), inputs)


def classifier(lopsided: float) -> Any:
    """Three convolutions; the first channel of the second is that many times as large as the others."""
    import keras

    keras.utils.set_random_seed(3)
    x = inputs = keras.Input(SHAPE)
    x = keras.layers.Rescaling(1.0 / 255.0)(x)
    for name in ("first", "second", "third"):
        x = keras.layers.Conv2D(8, 3, activation="relu", name=name)(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(4, activation="softmax", name="classes")(x))
    # What the third makes of it stays the same, so that the float model does not change.
    for name, axis, factor in (("second", 3, lopsided), ("third", 2, 1.0 / lopsided)):
        kernel, bias = model.get_layer(name).get_weights()
        np.moveaxis(kernel, axis, 0)[0] *= factor
        model.get_layer(name).set_weights([kernel, bias])
    return model


def autoencoder(lopsided: float = 1.0) -> Any:
    """A dense autoencoder of 16 numbers; the first of its code is that many times as large as the others."""
    import keras

    keras.utils.set_random_seed(4)
    x = inputs = keras.Input((16,))
    x = keras.layers.Dense(8, name="code")(x)
    model = keras.Model(inputs, keras.layers.Dense(16, name="decoded")(x))
    for name, axis, factor in (("code", 1, lopsided), ("decoded", 0, 1.0 / lopsided)):
        kernel, bias = model.get_layer(name).get_weights()
        np.moveaxis(kernel, axis, 0)[0] *= factor
        model.get_layer(name).set_weights([kernel, bias])
    return model


@pytest.fixture(scope="module")
def sound() -> Pair:
    return pair(classifier(1.0), pixels())


@pytest.fixture(scope="module")
def spoilt() -> Pair:
    return pair(classifier(3000.0), pixels())


def unasked() -> LayerError:
    raise AssertionError("the layer was looked for without need")


@pytest.mark.parametrize(
    "parity",
    [
        Parity(),
        Parity(int8_accuracy=0.2),
        Parity(agreement=0.98),
        Parity(agreement=0.90, float_accuracy=0.900, int8_accuracy=0.896),
        Parity(agreement=0.90, float_accuracy=0.80, int8_accuracy=0.85),
        Parity(output_error=0.10),
    ],
)
def test_a_model_that_answers_as_before_passes_and_its_layers_are_not_searched(parity: Parity) -> None:
    quantise.gate(parity, unasked)


@pytest.mark.parametrize(
    ("parity", "message"),
    [
        (Parity(agreement=0.979), r"97\.9% of its answers.*at least 98%"),
        (
            Parity(agreement=0.90, float_accuracy=0.90, int8_accuracy=0.89),
            r"accuracy 89\.0% after 90\.0%.*within 0\.5 points",
        ),
        (Parity(agreement=0.90, float_accuracy=0.90), r"90\.0% of its answers"),
        (Parity(output_error=0.101), r"10\.1% off.*at most 10%"),
        (Parity(output_error=float("nan")), "nan% off"),
    ],
)
def test_a_model_that_does_not_is_refused_with_the_figures_and_the_layer(parity: Parity, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        quantise.gate(parity, lambda: LAYER)
    assert "arises in conv7/Relu (42% RMS error)" in str(caught.value.got)
    assert "--float" in str(caught.value.do)


def test_a_layer_of_wildly_different_ranges_fails_the_gate_and_is_named(spoilt: Pair) -> None:
    parity = quantise.compare(spoilt.float_tflite, spoilt.int8_tflite, spoilt.inputs)
    with pytest.raises(ModelError, match="arises in") as caught:
        quantise.gate(parity, lambda: quantise.layer_errors(*vars(spoilt).values())[0])
    named = str(caught.value.got).split("arises in ")[1]
    assert "second" in named
    assert "third" not in named


def test_the_layer_that_passes_an_error_on_ranks_behind_the_one_that_made_it(spoilt: Pair) -> None:
    errors = quantise.layer_errors(spoilt.float_tflite, spoilt.int8_tflite, spoilt.inputs)
    made, passed_on = (next(e for e in errors if name in e.tensor) for name in ("second", "third"))
    assert made.relative_rms > 0.5
    assert passed_on.relative_rms > 0.2
    assert made.added > 0.5 > passed_on.added


def test_the_same_model_without_that_layer_passes(sound: Pair) -> None:
    parity = quantise.compare(sound.float_tflite, sound.int8_tflite, sound.inputs)
    quantise.gate(parity, unasked)
    errors = quantise.layer_errors(sound.float_tflite, sound.int8_tflite, sound.inputs)
    assert max(error.relative_rms for error in errors) < 0.1


def test_every_layer_is_found_in_both_files(sound: Pair) -> None:
    found = [e.tensor for e in quantise.layer_errors(sound.float_tflite, sound.int8_tflite, sound.inputs)]
    for layer in ("first", "second", "third", "classes"):
        assert any(layer in name for name in found), (layer, found)


def test_a_namesake_with_a_number_or_more_parts_is_found(sound: Pair) -> None:
    renamed = flatbuffer.parse(sound.int8_tflite)
    for tensor in renamed.subgraphs[0].tensors:
        name = flatbuffer.text(tensor.name)
        if "classes" in name:
            tensor.name = f"{name}1".encode()
        if "third" in name:
            tensor.name = f"{name};more/BiasAdd".encode()
    exact = quantise.layer_errors(sound.float_tflite, sound.int8_tflite, sound.inputs)
    assert quantise.layer_errors(sound.float_tflite, flatbuffer.pack(renamed), sound.inputs) == exact


def test_without_any_namesake_the_input_is_still_compared(sound: Pair) -> None:
    renamed = flatbuffer.parse(sound.int8_tflite)
    for index, tensor in enumerate(renamed.subgraphs[0].tensors):
        tensor.name = f"t{index}".encode()
    errors = quantise.layer_errors(sound.float_tflite, flatbuffer.pack(renamed), sound.inputs)
    assert len(errors) == 1
    assert errors[0].relative_rms < 0.01


def test_agreement_and_accuracy_are_shares_of_the_inputs(sound: Pair) -> None:
    truth = TfliteModel(sound.float_tflite).predict(sound.inputs).argmax(axis=1)
    answers = TfliteModel(sound.int8_tflite).predict(sound.inputs).argmax(axis=1)
    labels = truth.copy()
    labels[:30] = (labels[:30] + 1) % 4
    parity = quantise.compare(sound.float_tflite, sound.int8_tflite, sound.inputs, labels)
    assert parity.float_accuracy == 0.75
    assert parity.agreement == np.mean(truth == answers)
    assert parity.int8_accuracy == np.mean(answers == labels)
    assert parity.output_error is None


def test_without_an_original_only_the_accuracy_is_known(sound: Pair) -> None:
    labels = np.zeros(INPUTS, dtype=np.int64)
    alone = quantise.compare(None, sound.int8_tflite, sound.inputs, labels)
    assert alone.int8_accuracy is not None
    assert (alone.agreement, alone.float_accuracy, alone.output_error) == (None, None, None)
    assert quantise.compare(None, sound.int8_tflite, sound.inputs, None) == Parity()


@pytest.mark.parametrize(("lopsided", "passes"), [(1.0, True), (3000.0, False)])
def test_a_model_without_classes_is_judged_by_its_output(lopsided: float, passes: bool) -> None:
    inputs = np.random.default_rng(2).normal(size=(INPUTS, 16)).astype(np.float32)
    made = pair(autoencoder(lopsided), inputs)
    parity = quantise.compare(made.float_tflite, made.int8_tflite, inputs, class_output=None)
    assert parity.agreement is None
    assert parity.output_error is not None
    if passes:
        quantise.gate(parity, unasked)
        return
    with pytest.raises(ModelError, match=r"off the float model's.*arises in \S*code"):
        quantise.gate(parity, lambda: quantise.layer_errors(made.float_tflite, made.int8_tflite, inputs)[0])


def test_the_class_output_is_the_one_that_is_asked_for_or_the_first_that_can_be_one() -> None:
    import keras

    keras.utils.set_random_seed(5)
    inputs = keras.Input((6,))
    outputs = [keras.layers.Dense(n, name=f"out{n}")(inputs) for n in (1, 3, 5)]
    values = np.random.default_rng(3).normal(size=(INPUTS, 6)).astype(np.float32)
    made = pair(keras.Model(inputs, outputs), values)
    truths = {
        n: out.argmax(axis=1)
        for n, out in zip((1, 3, 5), keras.Model(inputs, outputs).predict(values, verbose=0), strict=True)
    }
    shapes = [tuple(d["shape"]) for d in TfliteModel(made.float_tflite).outputs]
    first, five = next(s[1] for s in shapes if s[1] > 1), shapes.index((1, 5))
    for n, position in ((first, "first"), (5, five)):
        parity = quantise.compare(made.float_tflite, made.int8_tflite, values, truths[n], class_output=position)  # type: ignore[arg-type]
        assert parity.float_accuracy == 1.0


def test_operators_that_stay_float_are_named_once_each_in_order() -> None:
    import keras

    x = inputs = keras.Input(SHAPE)
    x = keras.ops.cumsum(keras.ops.sin(keras.layers.Conv2D(2, 3)(x)), axis=1)
    x = keras.ops.sin(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    left = quantise.float_operators(flatbuffer.parse(sources.to_int8(sources.of_keras(model), pixels())))
    assert left == ("SIN", "CUMSUM")


def test_an_int8_model_leaves_none(sound: Pair) -> None:
    assert quantise.float_operators(flatbuffer.parse(sound.int8_tflite)) == ()
    assert "CONV_2D" in quantise.float_operators(flatbuffer.parse(sound.float_tflite))


def two_heads(lopsided: float) -> Any:
    """Classes, and a box whose first number is that many times as large as the others."""
    import keras

    keras.utils.set_random_seed(5)
    x = inputs = keras.Input(SHAPE)
    x = keras.layers.Rescaling(1.0 / 255.0)(x)
    x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, activation="relu")(x))
    box = keras.layers.Dense(4, name="box")
    model = keras.Model(inputs, [keras.layers.Dense(3, activation="softmax", name="classes")(x), box(x)])
    kernel, bias = box.get_weights()
    kernel[:, 0] *= lopsided
    box.set_weights([kernel, bias])
    return model


@pytest.mark.parametrize(("lopsided", "passes"), [(1.0, True), (3000.0, False)])
def test_what_stands_beside_the_classes_is_judged_too_each_channel_for_itself(lopsided: float, passes: bool) -> None:
    made = pair(two_heads(lopsided), pixels())
    parity = quantise.compare(made.float_tflite, made.int8_tflite, made.inputs)
    assert parity.agreement is not None
    assert parity.output_error is not None
    assert (parity.output_error <= quantise.MAX_OUTPUT_ERROR) == passes
    if not passes:
        with pytest.raises(ModelError, match="off the float model's"):
            quantise.gate(Parity(agreement=1.0, output_error=parity.output_error), lambda: LAYER)


def test_a_sigmoid_tells_two_classes_apart() -> None:
    import keras

    keras.utils.set_random_seed(6)
    x = inputs = keras.Input((16,))
    x = keras.layers.Dense(8, activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(x))
    values = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    made = pair(model, values)
    labels = (model.predict(values, verbose=0)[:, 0] > 0.5).astype(np.int64)
    parity = quantise.compare(made.float_tflite, made.int8_tflite, values, labels, class_output=None)
    assert parity.float_accuracy == 1.0
    assert parity.agreement == parity.int8_accuracy
    assert parity.agreement is not None
    assert parity.agreement > 0.9
