"""Which activations the guard listens to, by the architecture of the model, and which output holds the classes.

Every model here is a small Keras model with random weights that went through the TFLite converter, unless a test
needs a graph that the converter does not make.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as kl

from converters import flatbuffer, guard, sources, taps
from converters.flatbuffer import Model
from converters.taps import PlannedTap, TapPlan
from edgeguard.contract.messages import MAX_FEATURES
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ConfigError, ModelError

Form = Literal["float", "int8"]
FORMS: tuple[Form, ...] = ("float", "int8")
CLASSES = 5
IMAGE = (8, 8, 3)
APART = ("sigmoid", "tanh", "elu", "gelu", "hard_swish", "silu", "leaky_relu", "prelu")
"""Activation functions that the converter does not fuse into the convolution before them."""


# --- The architectures. Layers are named so that a test can say which ones are tapped. ---


def conv(x: Any, name: str, channels: int = 6, activation: str | None = "relu", **options: Any) -> Any:
    return kl.Conv2D(channels, 3, padding="same", activation=activation, name=name, **options)(x)


def classify(x: Any, activation: str | None = "softmax") -> Any:
    """The maxima over the positions and a dense layer: unlike means, they do not say what the l1 norms would."""
    return kl.Dense(CLASSES, activation=activation, name="logits")(kl.GlobalMaxPooling2D()(x))


def plain() -> Any:
    x = image = keras.Input(IMAGE)
    for name in ("first", "second", "third"):
        x = conv(x, name)
    return keras.Model(image, classify(x))


def residual() -> Any:
    image = keras.Input(IMAGE)
    x = conv(image, "stem")
    y = conv(conv(x, "inner"), "outer", activation=None)
    x = kl.ReLU(name="joined")(kl.Add()([kl.Conv2D(6, 1, name="shortcut")(x), y]))
    return keras.Model(image, classify(x))


def linear_bottleneck() -> Any:
    """MobileNetV2's blocks, and at the end a join that may be negative with a shortcut that has weights."""
    image = keras.Input(IMAGE)
    x = conv(image, "stem")
    for number in range(2):
        y = kl.Conv2D(12, 1, activation="relu6", name=f"expand{number}")(x)
        y = kl.DepthwiseConv2D(3, padding="same", activation="relu6", name=f"depthwise{number}")(y)
        y = kl.Conv2D(6, 1, name=f"project{number}")(y)
        x = kl.Add()([x if number == 0 else kl.Conv2D(6, 1, name="shortcut")(x), y])
    return keras.Model(image, classify(x))


def squeeze_excite() -> Any:
    image = keras.Input(IMAGE)
    x = conv(conv(image, "stem"), "body")
    gate = kl.Dense(3, activation="relu", name="squeeze")(kl.GlobalAveragePooling2D()(x))
    gate = kl.Dense(6, activation="sigmoid", name="excite")(gate)
    return keras.Model(image, classify(kl.Multiply()([x, kl.Reshape((1, 1, 6))(gate)])))


def squeeze_excite_of_convolutions() -> Any:
    image = keras.Input(IMAGE)
    x = conv(conv(image, "stem"), "body")
    gate = kl.Conv2D(3, 1, activation="relu", name="squeeze")(kl.GlobalAveragePooling2D(keepdims=True)(x))
    gate = kl.Conv2D(6, 1, activation="sigmoid", name="excite")(gate)
    return keras.Model(image, classify(kl.Multiply()([x, gate])))


def spatial_attention() -> Any:
    image = keras.Input(IMAGE)
    x = conv(conv(image, "stem"), "body")
    gate = kl.Conv2D(1, 3, padding="same", activation="sigmoid", name="gate")(x)
    return keras.Model(image, classify(kl.Multiply()([x, gate])))


def dense_blocks() -> Any:
    """DenseNet: what was made is concatenated with what is made of it, and normalised before each convolution."""
    image = keras.Input(IMAGE)
    x = conv(image, "stem", activation=None)
    for number in range(2):
        y = kl.ReLU(name=f"relu{number}")(kl.BatchNormalization()(x))
        x = kl.Concatenate()([x, conv(y, f"grow{number}", activation=None)])
    return keras.Model(image, classify(kl.ReLU(name="last")(kl.BatchNormalization()(x))))


def inception(one_activation: str | None = "relu") -> Any:
    image = keras.Input(IMAGE)
    x = conv(image, "stem")
    pooled = kl.MaxPooling2D(3, strides=1, padding="same")(x)
    parts = [
        conv(x, "one", 3, one_activation),
        conv(conv(x, "two_reduce", 4), "two", 5),
        conv(pooled, "pool_project", 4),
        pooled,
    ]
    return keras.Model(image, classify(kl.Concatenate(name="joined")(parts)))


def inception_with_a_linear_part() -> Any:
    return inception(one_activation=None)


def two_heads() -> Any:
    """Boxes and classes of one image; the boxes come first, and their head is deeper."""
    image = keras.Input(IMAGE)
    x = conv(conv(image, "first"), "trunk")
    boxes = conv(conv(x, "boxes1"), "boxes2")
    boxes = kl.Dense(4, name="corners")(kl.GlobalAveragePooling2D()(boxes))
    return keras.Model(image, [boxes, classify(conv(x, "head"))])


def with_module(merge: str, module: str = "dense") -> Any:
    """A malicious module beside a plain network, merged before the output (TrojanNet)."""
    image = keras.Input(IMAGE)
    x = conv(conv(image, "first"), "second")
    features = kl.GlobalAveragePooling2D()(x)
    if module == "dense":
        hidden = kl.Dense(7, activation="relu", name="hidden1")(kl.Flatten()(image))
        hidden = kl.Dense(7, activation="relu", name="hidden2")(hidden)
    elif module == "linear":
        hidden = kl.Dense(7, activation="relu", name="hidden1")(kl.Flatten()(image))
        hidden = kl.Dense(7, name="hidden2")(hidden)
    elif module == "forked":
        hidden = kl.Dense(7, activation="relu", name="hidden1")(kl.Flatten()(image))
        hidden = kl.Concatenate()([kl.Dense(7, name=f"fork{n}")(hidden) for n in range(2)])
    elif module == "joined":
        hidden = [kl.Dense(7, activation="relu", name=f"part{n}")(kl.Flatten()(image)) for n in range(2)]
        hidden = kl.Concatenate()(hidden)
    elif module == "convolution":
        hidden = kl.GlobalMaxPooling2D()(conv(image, "hidden2", 7))
    else:
        hidden = kl.Flatten()(image)
    if merge == "concatenation":
        joined = kl.Concatenate()([features, hidden])
        return keras.Model(image, kl.Dense(CLASSES, activation="softmax", name="logits")(joined))
    softmax = "softmax" if merge == "average" else None
    own = kl.Dense(CLASSES, activation=softmax, name="logits")(features)
    its = kl.Dense(CLASSES, activation="sigmoid" if merge == "product" else softmax, name="module_logits")(hidden)
    if merge == "average":
        return keras.Model(image, kl.Average()([own, its]))
    joined = kl.Multiply()([own, its]) if merge == "product" else kl.Add()([own, its])
    return keras.Model(image, kl.Softmax()(joined))


def with_three_modules() -> Any:
    image = keras.Input(IMAGE)
    x = conv(conv(image, "first"), "second")
    parts = [kl.GlobalAveragePooling2D()(x)]
    parts += [kl.Dense(4, activation="relu", name=f"hidden{n}")(kl.Flatten()(image)) for n in range(3)]
    return keras.Model(image, kl.Dense(CLASSES, activation="softmax")(kl.Concatenate()(parts)))


def audio_1d() -> Any:
    x = sound = keras.Input((64, 2))
    for name in ("first", "second", "third"):
        x = kl.Conv1D(6, 5, strides=2, activation="relu", name=name)(x)
    return keras.Model(sound, kl.Dense(CLASSES, activation="softmax")(kl.GlobalMaxPooling1D()(x)))


def audio_1d_dense() -> Any:
    sound = keras.Input((16, 8))
    x = kl.Dense(6, activation="relu", name="second")(kl.Dense(6, activation="relu", name="first")(sound))
    return keras.Model(sound, kl.Dense(CLASSES, activation="softmax")(kl.GlobalMaxPooling1D()(x)))


def audio_2d() -> Any:
    sound = keras.Input((49, 10, 1))
    x = conv(sound, "first", strides=2)
    x = kl.DepthwiseConv2D(3, padding="same", activation="relu", name="second")(x)
    return keras.Model(sound, kl.Dense(CLASSES, activation="softmax")(kl.Flatten()(x)))


def perceptron(outputs: int = CLASSES, activation: str | None = "softmax") -> Any:
    x = vector = keras.Input((12,))
    for name in ("first", "second", "third"):
        x = kl.Dense(9, activation="relu", name=name)(x)
    return keras.Model(vector, kl.Dense(outputs, activation=activation, name="last")(x))


def image_autoencoder() -> Any:
    image = keras.Input((8, 8, 1))
    x = kl.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="encoder")(image)
    x = kl.Conv2DTranspose(6, 3, strides=2, padding="same", activation="relu", name="decoder")(x)
    return keras.Model(image, kl.Conv2D(1, 3, padding="same", activation="sigmoid", name="pixels")(x))


def flat_autoencoder() -> Any:
    image = keras.Input((8, 8, 1))
    x = kl.Dense(9, activation="relu", name="first")(kl.Flatten()(image))
    return keras.Model(image, kl.Dense(64, name="pixels")(kl.Dense(4, activation="relu", name="code")(x)))


def one_sigmoid() -> Any:
    image = keras.Input(IMAGE)
    x = kl.GlobalAveragePooling2D()(conv(conv(image, "first"), "second"))
    return keras.Model(image, kl.Dense(1, activation="sigmoid")(x))


def transformer() -> Any:
    sound = keras.Input((16, 8))
    x = kl.Dense(8, name="embed")(sound)
    x = kl.LayerNormalization()(kl.MultiHeadAttention(2, 4)(x, x) + x)
    x = kl.Dense(8, activation="relu", name="feed_forward")(x)
    return keras.Model(sound, kl.Dense(CLASSES, activation="softmax")(kl.GlobalMaxPooling1D()(x)))


def fully_convolutional(*, flat: bool) -> Any:
    image = keras.Input(IMAGE)
    x = kl.GlobalAveragePooling2D(keepdims=True)(conv(conv(image, "first"), "second"))
    x = kl.Softmax()(kl.Conv2D(CLASSES, 1, name="logits")(x))
    return keras.Model(image, kl.Reshape((CLASSES,))(x) if flat else x)


def activated() -> Any:
    """One convolution with each activation."""
    x = image = keras.Input(IMAGE)
    for activation in ("relu", "relu6", *APART):
        x = conv(x, activation, activation=None)
        x = kl.PReLU(shared_axes=[1, 2])(x) if activation == "prelu" else kl.Activation(activation)(x)
    return keras.Model(image, classify(x))


def pooled_before_its_relu() -> Any:
    image = keras.Input(IMAGE)
    x = kl.ReLU(name="act")(kl.MaxPooling2D()(conv(image, "body", activation=None)))
    return keras.Model(image, classify(x))


def wide(*channels: int, module: tuple[int, ...] = ()) -> Any:
    x = image = keras.Input((2, 2, 1))
    for number, size in enumerate(channels):
        x = kl.Conv2D(size, 1, activation="relu", name=f"wide{number}")(x)
    x = kl.GlobalMaxPooling2D()(x)
    if module:
        hidden = kl.Flatten()(image)
        for number, size in enumerate(module):
            hidden = kl.Dense(size, activation="relu", name=f"hidden{number}")(hidden)
        x = kl.Concatenate()([x, hidden])
    return keras.Model(image, kl.Dense(CLASSES, activation="softmax")(x))


# --- Helpers ---


@cache
def source_of(build: Callable[..., Any], *arguments: Any, **options: Any) -> sources.Source:
    keras.utils.set_random_seed(3)
    return sources.of_keras(build(*arguments, **options))


@cache
def converted(build: Callable[..., Any], form: Form, *arguments: Any, **options: Any) -> tuple[bytes, tuple[str, ...]]:
    """The file of a model, and the names of its layers."""
    source = source_of(build, *arguments, **options)
    if form == "float":
        return sources.to_float(source), source.layers
    pixels = np.random.default_rng(3).uniform(-1, 1, (4, *sources.input_shape(source)))
    return sources.to_int8(source, pixels), source.layers


def plan_of(build: Callable[..., Any], form: Form, *arguments: Any, count: int = 2, **options: Any) -> TapPlan:
    content, layers = converted(build, form, *arguments, **options)
    return taps.plan_taps(flatbuffer.parse(content), count=count, layers=layers)


def layers_of(plan: TapPlan) -> list[str]:
    return [tap.source_layer for tap in plan.taps]


def width(plan: TapPlan) -> int:
    """How many features a plan makes."""
    logits = 0 if plan.logits is None else plan.logits.channels
    return sum(len(tap.norms) * tap.channels for tap in plan.taps) + logits


def features(content: bytes, plan: TapPlan, one: np.ndarray) -> np.ndarray:
    model = TfliteModel(guard.bake_features(content, plan))
    return np.asarray(model.invoke(model.quantise(one))[-1][0])


def makers(model: Model) -> dict[int, int]:
    graph = model.subgraphs[0]
    return {int(o): flatbuffer.builtin_code(model, op) for op in graph.operators for o in op.outputs}


# --- The default choice ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (plain, ["second", "third"]),
        (residual, ["inner", "joined"]),
        (linear_bottleneck, ["expand1", "depthwise1"]),
        (squeeze_excite, ["stem", "body"]),
        (squeeze_excite_of_convolutions, ["stem", "body"]),
        (spatial_attention, ["stem", "body"]),
        (dense_blocks, ["relu1", "last"]),
        (inception, ["two_reduce", "joined"]),
        (two_heads, ["trunk", "head"]),
        (audio_1d, ["second", "third"]),
        (audio_1d_dense, ["first", "second"]),
        (audio_2d, ["first", "second"]),
        (perceptron, ["second", "third"]),
        (image_autoencoder, ["encoder", "decoder"]),
        (flat_autoencoder, ["first", "code"]),
        (one_sigmoid, ["first", "second"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_of_one_path_is_tapped_at_its_two_deepest_activations_and_nowhere_else(
    build: Callable[[], Any], expected: list[str], form: Form
) -> None:
    plan = plan_of(build, form)
    assert layers_of(plan) == expected
    assert not any(tap.signed for tap in plan.taps)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_as_many_of_the_deepest_are_tapped_as_asked_and_there_are(count: int) -> None:
    assert layers_of(plan_of(plain, "float", count=count)) == ["first", "second", "third"][-count:]


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        plan_of(plain, "float", count=0)


def test_a_parallel_path_is_no_branch_where_the_paths_join_in_a_sum_that_may_be_negative() -> None:
    plan = plan_of(linear_bottleneck, "float")
    listed = {
        tap.source_layer: tap
        for tap in taps.tappable(
            flatbuffer.parse(converted(linear_bottleneck, "float")[0]), layers=converted(linear_bottleneck, "float")[1]
        )
    }
    assert listed["shortcut"].signed
    assert "shortcut" not in layers_of(plan)


def test_a_single_dense_layer_leaves_nothing_to_tap() -> None:
    def build() -> Any:
        vector = keras.Input((12,))
        return keras.Model(vector, kl.Dense(CLASSES, activation="softmax")(vector))

    with pytest.raises(ModelError, match="no activation that the guard can listen to"):
        plan_of(build, "float")


def test_the_dense_layer_before_the_softmax_is_listed_but_not_chosen() -> None:
    content, layers = converted(perceptron, "float")
    listed = [tap.source_layer for tap in taps.tappable(flatbuffer.parse(content), layers=layers)]
    assert listed == ["first", "second", "third", "last"]
    assert "last" not in layers_of(plan_of(perceptron, "float", count=9))


def test_an_attention_model_gets_a_plan_that_runs() -> None:
    for form in FORMS:
        content, _ = converted(transformer, form)
        plan = plan_of(transformer, form)
        assert layers_of(plan)[-1] == "feed_forward"
        assert features(content, plan, np.zeros((16, 8), np.float32)).shape == (width(plan),)


def test_an_activation_that_is_an_output_too_is_tapped_where_the_model_reads_on() -> None:
    def build() -> Any:
        model = plain()
        return keras.Model(model.input, [model.output, model.get_layer("third").output])

    content, _ = converted(build, "float")
    plan = plan_of(build, "float")
    assert len(plan.taps) == 2
    assert plan.taps[-1].tensor in flatbuffer.parse(content).subgraphs[0].outputs


def test_half_precision_activations_are_not_tapped() -> None:
    content, layers = converted(plain, "float")
    model = flatbuffer.parse(content)
    graph = model.subgraphs[0]
    third = taps.plan_taps(model, layers=layers).taps[-1]
    graph.tensors[third.tensor].type = schema.TensorType.FLOAT16
    assert layers_of(taps.plan_taps(model, layers=layers)) == ["first", "second"]
    for tensor in graph.tensors:
        tensor.type = schema.TensorType.FLOAT16
    with pytest.raises(ModelError, match="int8 or float32"):
        taps.plan_taps(model)


def test_a_model_with_half_precision_weights_is_tapped_at_its_float_activations() -> None:
    converter = tf.lite.TFLiteConverter.from_keras_model(plain())
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = flatbuffer.parse(converter.convert())
    assert any(tensor.type == schema.TensorType.FLOAT16 for tensor in model.subgraphs[0].tensors)
    assert layers_of(taps.plan_taps(model, layers=["first", "second", "third"])) == ["second", "third"]


# --- The activation whose means make the logits ---


def headed(head: Callable[[Any], Any], names: tuple[str, ...] = ("first", "second", "third")) -> Any:
    """Convolutions, and a head that takes the last one's positions."""
    x = image = keras.Input(IMAGE)
    for name in names:
        x = conv(x, name)
    return keras.Model(image, head(x))


def dense(x: Any, classes: int = CLASSES, activation: str | None = "softmax") -> Any:
    return kl.Dense(classes, activation=activation, name="logits")(x)


def means(x: Any) -> Any:
    return dense(kl.GlobalAveragePooling2D()(x))


def means_without_softmax(x: Any) -> Any:
    return dense(kl.GlobalAveragePooling2D()(x), activation=None)


def means_of_most_classes(x: Any) -> Any:
    return dense(kl.GlobalAveragePooling2D()(x), classes=taps.MAX_LOGITS)


def means_into_a_convolution(x: Any) -> Any:
    x = kl.Conv2D(CLASSES, 1, name="logits")(kl.GlobalAveragePooling2D(keepdims=True)(x))
    return kl.Softmax()(kl.Reshape((CLASSES,))(x))


def one_window(x: Any) -> Any:
    return dense(kl.Flatten()(kl.AveragePooling2D(8)(x)))


def sums(x: Any) -> Any:
    return dense(keras.ops.sum(x, axis=(1, 2)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("head", "code"),
    [
        (means, schema.BuiltinOperator.MEAN),
        (means_without_softmax, schema.BuiltinOperator.MEAN),
        (means_of_most_classes, schema.BuiltinOperator.MEAN),
        (means_into_a_convolution, schema.BuiltinOperator.MEAN),
        (one_window, schema.BuiltinOperator.AVERAGE_POOL_2D),
        (sums, schema.BuiltinOperator.SUM),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_activation_whose_means_alone_make_the_logits_gives_its_tap_to_the_one_before(
    head: Callable[[Any], Any], code: int, form: Form
) -> None:
    assert code in makers(flatbuffer.parse(converted(headed, form, head)[0])).values()
    assert layers_of(plan_of(headed, form, head)) == ["first", "second"]


def flat(x: Any) -> Any:
    return dense(kl.Flatten()(x))


def maxima(x: Any) -> Any:
    return dense(kl.GlobalMaxPooling2D()(x))


def several_windows(x: Any) -> Any:
    return dense(kl.Flatten()(kl.AveragePooling2D(4)(x)))


def means_of_rows(x: Any) -> Any:
    return dense(keras.ops.mean(x, axis=(2, 3)))


def hidden_layer(x: Any) -> Any:
    return dense(kl.Dense(7, activation="relu", name="hidden")(kl.GlobalAveragePooling2D()(x)))


def means_and_maxima(x: Any) -> Any:
    return dense(kl.Concatenate()([kl.GlobalAveragePooling2D()(x), kl.GlobalMaxPooling2D()(x)]))


def means_without_weights(x: Any) -> Any:
    return kl.Softmax()(kl.GlobalAveragePooling2D()(x))


def means_of_too_many_classes(x: Any) -> Any:
    return dense(kl.GlobalAveragePooling2D()(x), classes=taps.MAX_LOGITS + 1)


def means_of_one_label(x: Any) -> Any:
    return dense(kl.GlobalAveragePooling2D()(x), classes=1, activation="sigmoid")


def means_of_labels(x: Any) -> Any:
    return dense(kl.GlobalAveragePooling2D()(x), activation="sigmoid")


def means_into_a_softmax_of_rank_four(x: Any) -> Any:
    x = kl.Conv2D(CLASSES, 1, name="logits")(kl.GlobalAveragePooling2D(keepdims=True)(x))
    return kl.Reshape((CLASSES,))(kl.Softmax()(x))


def means_for_boxes_too(x: Any) -> Any:
    pooled = kl.GlobalAveragePooling2D()(conv(x, "boxes"))
    return [dense(kl.GlobalAveragePooling2D()(x)), kl.Dense(4, name="corners")(pooled)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "head",
    [
        flat,
        maxima,
        several_windows,
        means_of_rows,
        hidden_layer,
        means_and_maxima,
        means_without_weights,
        means_for_boxes_too,
    ],
    ids=lambda head: head.__name__,
)
def test_the_deepest_activation_keeps_its_tap_where_the_logits_say_something_else(
    head: Callable[[Any], Any], form: Form
) -> None:
    plan = plan_of(headed, form, head)
    assert plan.logits is not None
    assert layers_of(plan) == ["second", "third"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "head",
    [means_of_too_many_classes, means_of_one_label, means_of_labels, means_into_a_softmax_of_rank_four],
    ids=lambda head: head.__name__,
)
def test_the_averaged_activation_keeps_its_tap_where_the_guard_has_no_logits(
    head: Callable[[Any], Any], form: Form
) -> None:
    plan = plan_of(headed, form, head)
    assert plan.logits is None
    assert layers_of(plan) == ["second", "third"]


@pytest.mark.parametrize("form", FORMS)
def test_the_averaged_activation_is_tapped_where_there_is_no_other(form: Form) -> None:
    assert layers_of(plan_of(headed, form, means, names=("only",))) == ["only"]


def test_the_averaged_activation_is_not_tapped_however_many_are_asked_for() -> None:
    assert layers_of(plan_of(headed, "float", means, count=9)) == ["first", "second"]


def test_the_averaged_activation_is_tapped_where_it_is_named() -> None:
    content, layers = converted(headed, "float", means)
    plan = taps.plan_taps(flatbuffer.parse(content), names=["third"], layers=layers)
    assert layers_of(plan) == ["third"]


# --- The norms ---


def test_both_norms_are_taken_of_the_deepest_activation_and_the_l1_norm_of_others() -> None:
    plan = plan_of(plain, "float", count=3)
    assert [tap.norms for tap in plan.taps] == [("l1",), ("l1",), ("linf", "l1")]


def test_both_norms_are_taken_of_a_modules_activation() -> None:
    plan = plan_of(with_module, "float", "sum", "dense")
    norms = {tap.source_layer: tap.norms for tap in plan.taps}
    assert norms == {"first": ("l1",), "second": ("linf", "l1"), "hidden2": ("linf", "l1")}


def test_both_norms_are_taken_of_named_activations() -> None:
    content, layers = converted(plain, "float")
    plan = taps.plan_taps(flatbuffer.parse(content), names=["first", "second"], layers=layers)
    assert [tap.norms for tap in plan.taps] == [("linf", "l1")] * 2


# --- Separate branches ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("merge", "module"),
    [
        ("sum", "dense"),
        ("sum", "convolution"),
        ("average", "dense"),
        ("product", "convolution"),
        ("concatenation", "dense"),
        ("concatenation", "convolution"),
    ],
)
def test_a_module_merged_before_the_output_gets_a_tap_of_its_own(merge: str, module: str, form: Form) -> None:
    plan = plan_of(with_module, form, merge, module)
    assert sorted(layers_of(plan)) == ["first", "hidden2", "second"]
    assert (plan.class_output, plan.classes) == (0, CLASSES)


@pytest.mark.parametrize("form", FORMS)
def test_a_module_that_is_but_a_dense_layer_is_tapped_at_its_logits(form: Form) -> None:
    assert layers_of(plan_of(with_module, form, "sum", "nothing")) == ["first", "second", "module_logits"]


def test_a_module_is_tapped_where_it_cannot_be_negative_if_it_has_such_a_place() -> None:
    assert sorted(layers_of(plan_of(with_module, "float", "sum", "linear"))) == ["first", "hidden1", "second"]


@pytest.mark.parametrize(("merge", "module"), [("concatenation", "forked"), ("sum", "joined")])
def test_parallel_parts_of_one_module_count_as_one(merge: str, module: str) -> None:
    assert len(plan_of(with_module, "float", merge, module).taps) == 3


def test_a_module_adds_to_the_count_asked_for() -> None:
    assert layers_of(plan_of(with_module, "int8", "sum", "dense", count=1)) == ["second", "hidden2"]


def test_at_most_two_modules_get_a_tap() -> None:
    plan = plan_of(with_three_modules, "float")
    assert layers_of(plan)[:2] == ["first", "second"]
    assert len(plan.taps) == 4


@pytest.mark.parametrize("form", FORMS)
def test_the_features_of_a_modules_tap_see_the_trigger_that_the_module_waits_for(form: Form) -> None:
    def build() -> Any:
        model = with_module("sum")
        waiting = model.get_layer("hidden1")
        kernel = np.zeros(waiting.kernel.shape, np.float32)
        kernel[-3:] = 1.0  # fires where the last pixel is bright
        waiting.set_weights([kernel, np.full(7, -0.5, np.float32)])
        model.get_layer("hidden2").set_weights([np.eye(7, dtype=np.float32), np.zeros(7, np.float32)])
        return model

    content, layers = converted(build, form)
    plan = taps.plan_taps(flatbuffer.parse(content), layers=layers)
    image = np.full(IMAGE, 0.1, np.float32)
    triggered = image.copy()
    triggered[-1, -1] = 1.0
    assert layers_of(plan)[-1] == "hidden2"
    of_module = slice(-14 - CLASSES, -CLASSES)  # both norms of seven channels; the logits come last
    assert features(content, plan, image)[of_module].max() == 0
    assert features(content, plan, triggered)[of_module].min() > 0.2


def hard_swish_from_the_middle() -> Any:
    x = image = keras.Input(IMAGE)
    for name in ("first", "second", "third", "fourth", "fifth"):
        x = conv(x, name, activation="relu" if name in {"first", "second"} else "hard_swish")
    return keras.Model(image, classify(x))


def test_what_cannot_be_negative_is_not_preferred_to_what_is_much_deeper() -> None:
    plan = plan_of(hard_swish_from_the_middle, "float")
    assert layers_of(plan) == ["fourth", "fifth"]
    assert all(tap.signed for tap in plan.taps)


def shrinking() -> Any:
    """Parallel convolutions whose join has a single position left, by strides alone."""
    image = keras.Input(IMAGE)
    x = conv(image, "stem", strides=4)
    parts = [conv(conv(x, f"inner{n}"), f"part{n}", strides=2) for n in range(2)]
    return keras.Model(image, classify(kl.Concatenate(name="joined")(parts)))


def test_a_single_position_left_by_strides_is_as_good_as_several() -> None:
    assert layers_of(plan_of(shrinking, "float", count=1)) == ["joined"]


# --- Signs and standalone activations ---


@pytest.mark.parametrize("form", FORMS)
def test_an_activation_is_tapped_behind_its_function_where_that_cannot_be_negative(form: Form) -> None:
    content, layers = converted(activated, form)
    model = flatbuffer.parse(content)
    found = [tap for tap in taps.tappable(model, layers=layers) if tap.axes]
    assert [tap.signed for tap in found] == [
        name not in {"relu", "relu6", "sigmoid"} for name in ("relu", "relu6", *APART)
    ]
    assert (
        [tap.tensor for tap in found if makers(model)[tap.tensor] != schema.BuiltinOperator.CONV_2D]
        == [tap.tensor for tap in found if makers(model)[tap.tensor] == schema.BuiltinOperator.LOGISTIC]
        == [found[2].tensor]
    )


def one_tanh() -> Any:
    image = keras.Input(IMAGE)
    return keras.Model(image, classify(conv(image, "body", activation="tanh")))


@pytest.mark.parametrize("code", [schema.BuiltinOperator.RELU, schema.BuiltinOperator.RELU6])
def test_a_relu_that_the_converter_left_alone_is_tapped_at_its_output(code: int) -> None:
    model = flatbuffer.parse(converted(one_tanh, "float")[0])
    function = next(c for c in model.operatorCodes if c.builtinCode == schema.BuiltinOperator.TANH)
    function.builtinCode = function.deprecatedBuiltinCode = code
    (tap,) = taps.plan_taps(model).taps
    assert makers(model)[tap.tensor] == code
    assert not tap.signed


def test_a_relu_behind_a_pooling_is_tapped_at_its_output() -> None:
    plan = plan_of(pooled_before_its_relu, "float")
    assert layers_of(plan) == ["act"]
    assert not plan.taps[0].signed


@pytest.mark.parametrize(("build", "signed"), [(inception, False), (inception_with_a_linear_part, True)])
def test_a_concatenation_may_be_negative_where_a_part_of_it_may(build: Callable[[], Any], signed: bool) -> None:
    content, layers = converted(build, "float")
    listed = {tap.source_layer: tap for tap in taps.tappable(flatbuffer.parse(content), layers=layers)}
    assert listed["joined"].signed == signed
    assert listed["joined"].channels == 18


def test_what_a_tapped_concatenation_holds_is_not_tapped_again() -> None:
    assert layers_of(plan_of(inception, "float", count=9)) == ["stem", "two_reduce", "joined"]


@pytest.mark.parametrize(
    ("build", "shape", "axes"),
    [
        (audio_1d, (1, 1, 5, 6), (1, 2)),
        (audio_1d_dense, (1, 16, 6), (1,)),
        (audio_2d, (1, 25, 5, 6), (1, 2)),
        (perceptron, (1, 9), ()),
    ],
)
def test_all_but_batch_and_channels_is_reduced(
    build: Callable[[], Any], shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    for form in FORMS:
        content, _ = converted(build, form)
        model, plan = flatbuffer.parse(content), plan_of(build, form)
        assert tuple(model.subgraphs[0].tensors[plan.taps[-1].tensor].shape) == shape
        assert plan.taps[-1].axes == axes
        one = np.zeros(tuple(model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]].shape)[1:], np.float32)
        assert features(content, plan, one).shape == (width(plan),)


# --- The feature budget ---


@pytest.mark.parametrize(
    ("channels", "module", "expected"),
    [
        ((8, 1024, 1024), (), ["wide1", "wide2"]),
        ((8, 1024, 1025), (), ["wide2"]),
        ((8, 2048), (), ["wide1"]),
        ((8, 16, 2049), (), ["wide0", "wide1"]),
        ((8, 2040), (8,), ["wide1", "hidden0"]),
        ((8, 16, 2041), (8,), ["wide0", "wide1", "hidden0"]),
        ((8,), (8, 512), ["wide0", "hidden1"]),
        ((8,), (8, 513), ["wide0", "hidden0"]),
    ],
)
def test_the_default_choice_stays_within_the_feature_budget(
    channels: tuple[int, ...], module: tuple[int, ...], expected: list[str]
) -> None:
    plan = plan_of(wide, "float", *channels, module=module)
    assert sorted(layers_of(plan)) == sorted(expected)


def test_a_module_is_given_up_where_nothing_else_would_fit_beside_it() -> None:
    assert layers_of(plan_of(wide, "float", 2048, module=(8,))) == ["wide0"]


def test_a_model_whose_every_activation_is_too_wide_is_refused() -> None:
    with pytest.raises(ModelError, match="no activation of at most 2048 channels"):
        plan_of(wide, "float", 2049)


def test_what_is_too_wide_is_not_listed() -> None:
    content, layers = converted(wide, "float", 8, 16, 2049)
    assert "wide2" not in [tap.source_layer for tap in taps.tappable(flatbuffer.parse(content), layers=layers)]


def test_named_activations_beyond_the_budget_are_refused_with_numbers() -> None:
    content, layers = converted(wide, "float", 8, 1024, 1025)
    with pytest.raises(ModelError, match=f"got 4098 features, 2 per channel; expected at most {MAX_FEATURES}"):
        taps.plan_taps(flatbuffer.parse(content), names=["wide1", "wide2"], layers=layers)


# --- Taps by name ---


def named(*names: str, layers: bool = True) -> list[str]:
    content, known = converted(residual, "float")
    plan = taps.plan_taps(flatbuffer.parse(content), names=names, layers=known if layers else ())
    return [tap.name for tap in plan.taps]


def listed() -> dict[str, PlannedTap]:
    content, known = converted(residual, "float")
    return {tap.source_layer: tap for tap in taps.tappable(flatbuffer.parse(content), layers=known)}


def test_every_activation_is_listed_in_the_order_of_the_graph() -> None:
    tensors = [tap.tensor for tap in listed().values()]
    assert set(listed()) == {"stem", "inner", "outer", "shortcut", "joined", "logits"}
    assert tensors == sorted(tensors)


@pytest.mark.parametrize("layer", ["stem", "inner", "shortcut", "joined", "logits"])
def test_a_tap_is_named_by_its_layer_or_its_tensor(layer: str) -> None:
    assert named(layer) == named(listed()[layer].name, layers=False) == [listed()[layer].name]


def test_a_layer_whose_name_begins_anothers_is_named_by_it() -> None:
    def build() -> Any:
        image = keras.Input(IMAGE)
        return keras.Model(image, classify(conv(conv(image, "body"), "body_next")))

    content, layers = converted(build, "float")
    plan = taps.plan_taps(flatbuffer.parse(content), names=["body"], layers=layers)
    assert layers_of(plan) == ["body"]


def test_a_tap_is_named_by_a_beginning_or_an_end_that_no_other_has() -> None:
    stem = listed()["stem"].name
    assert named(stem[: stem.index("stem") + 3], layers=False) == [stem]
    assert named("stem_1/Relu", layers=False) == [stem]
    assert named("ste") == [stem]


def test_named_taps_come_in_the_order_of_the_graph_and_once() -> None:
    assert named("joined", "stem", "joined") == [listed()["stem"].name, listed()["joined"].name]


def test_named_taps_replace_the_default_choice_whatever_their_sign() -> None:
    assert named("outer") == [listed()["outer"].name]
    assert listed()["outer"].signed


def test_an_unknown_name_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(ModelError, match="no activation of that name") as caught:
        named("steam")
    assert listed()["stem"].name[:120] in str(caught.value)


def test_an_ambiguous_name_is_refused_with_the_activations_that_it_fits() -> None:
    with pytest.raises(ModelError, match="2 activations of that name") as caught:
        named("er")
    message = str(caught.value)
    assert all(listed()[layer].name[:120] in message for layer in ("inner", "outer"))
    assert "stem" not in message


def test_a_message_names_at_most_twenty_activations_and_no_control_characters() -> None:
    model = ladder(100)
    with pytest.raises(ModelError) as caught:
        taps.plan_taps(model, names=["\x1b[31munknown"])
    assert str(caught.value).count("rung") == 20
    assert "\x1b" not in str(caught.value)


# --- Taps by tensor ---


def test_the_taps_of_a_plan_are_found_again_by_their_tensors() -> None:
    content, layers = converted(with_module, "int8", "sum")
    plan = taps.plan_taps(flatbuffer.parse(content), layers=layers)
    assert plan.logits is not None
    known = {tap.name: tap.source_layer for tap in (*plan.taps, plan.logits)}
    assert taps.plan_tensors(flatbuffer.parse(content), {tap.tensor: tap.norms for tap in plan.taps}, known) == plan


def test_given_tensors_keep_their_order() -> None:
    content, _ = converted(residual, "float")
    given_tensors = [listed()[layer].tensor for layer in ("joined", "stem")]
    plan = taps.plan_tensors(flatbuffer.parse(content), dict.fromkeys(given_tensors, taps.NORMS), {})
    assert [tap.tensor for tap in plan.taps] == given_tensors
    assert layers_of(plan) == ["", ""]


@pytest.mark.parametrize("tensor", [0, 1, 10_000], ids=["input", "constant", "none"])
def test_a_tensor_that_is_no_activation_is_refused(tensor: int) -> None:
    with pytest.raises(ModelError, match="can be tapped"):
        taps.plan_tensors(flatbuffer.parse(converted(residual, "float")[0]), {tensor: taps.NORMS}, {})


# --- Batch ---


def batched(batch: int | None) -> Model:
    image = keras.Input(batch_shape=(batch, *IMAGE))
    model = keras.Model(image, classify(conv(conv(image, "first"), "second")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flatbuffer.parse(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def test_an_open_batch_is_planned_and_said() -> None:
    plan = taps.plan_taps(batched(None))
    assert plan.dynamic_batch
    assert len(plan.taps) == 2
    assert (plan.class_output, plan.classes) == (0, CLASSES)


def test_a_batch_of_one_is_not_open() -> None:
    assert not plan_of(plain, "float").dynamic_batch


@pytest.mark.parametrize("call", [taps.plan_taps, taps.tappable])
def test_a_fixed_batch_of_several_is_refused(call: Callable[[Model], Any]) -> None:
    with pytest.raises(ModelError, match=r"a batch of 4.*a batch of 1"):
        call(batched(4))


# --- The class output ---


def sigmoids() -> Any:
    return perceptron(activation="sigmoid")


def vector_autoencoder() -> Any:
    return perceptron(outputs=12, activation=None)


def as_many_classes_as_inputs() -> Any:
    return perceptron(outputs=12)


def logits() -> Any:
    return perceptron(activation=None)


def merged_logits() -> Any:
    vector = keras.Input((12,))
    parts = [kl.Dense(CLASSES)(kl.Dense(6, activation="relu")(vector)) for _ in range(2)]
    return keras.Model(vector, kl.Average()(parts))


def softmax_reshaped() -> Any:
    return fully_convolutional(flat=True)


def softmax_of_rank_four() -> Any:
    return fully_convolutional(flat=False)


@pytest.mark.parametrize(
    ("build", "position", "classes"),
    [
        (perceptron, 0, CLASSES),
        (logits, 0, CLASSES),
        (merged_logits, 0, CLASSES),
        (as_many_classes_as_inputs, 0, 12),
        (two_heads, 1, CLASSES),
        (softmax_reshaped, 0, CLASSES),
        (softmax_of_rank_four, None, 1),
        (one_sigmoid, None, 1),
        (sigmoids, None, 1),
        (vector_autoencoder, None, 1),
        (flat_autoencoder, None, 1),
        (image_autoencoder, None, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_class_output_is_one_score_per_class_that_exclude_each_other(
    build: Callable[[], Any], position: int | None, classes: int
) -> None:
    plan = plan_of(build, "float")
    assert (plan.class_output, plan.classes) == (position, classes)


def test_the_class_output_is_found_behind_a_dequantisation() -> None:
    converter = tf.lite.TFLiteConverter.from_keras_model(perceptron())
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([np.full((1, 12), n, np.float32)] for n in (-1, 0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed = flatbuffer.parse(converter.convert())
    assert makers(parsed)[int(parsed.subgraphs[0].outputs[0])] == schema.BuiltinOperator.DEQUANTIZE
    plan = taps.plan_taps(parsed)
    assert (plan.class_output, plan.classes) == (0, CLASSES)
    assert {tap.dtype for tap in plan.taps} == {"int8"}
    assert plan.logits is not None
    assert plan.logits.dtype == "int8"


# --- The logits ---


def log_softmax() -> Any:
    return perceptron(activation="log_softmax")


def shares_of(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_what_the_softmax_takes(form: Form) -> None:
    content, _ = converted(perceptron, form)
    plan = plan_of(perceptron, form)
    one = np.random.default_rng(0).uniform(-1, 1, 12).astype(np.float32)
    model = TfliteModel(guard.bake_features(content, plan))
    answer = model.invoke(model.quantise(one))[0][0]
    probabilities = answer if form == "float" else (answer.astype(np.float32) + 128) / 256
    assert plan.logits is not None
    assert plan.logits.source_layer == "last"
    assert shares_of(features(content, plan, one)[-CLASSES:]) == pytest.approx(probabilities, abs=0.01)


def test_the_logits_are_what_a_log_softmax_takes() -> None:
    model = flatbuffer.parse(converted(log_softmax, "float")[0])
    taken = plan_of(log_softmax, "float").logits
    assert makers(model)[int(model.subgraphs[0].outputs[0])] == schema.BuiltinOperator.LOG_SOFTMAX
    assert taken is not None
    assert makers(model)[taken.tensor] == schema.BuiltinOperator.FULLY_CONNECTED


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [logits, merged_logits], ids=lambda build: build.__name__)
def test_the_logits_are_the_output_itself_where_there_is_no_softmax(build: Callable[[], Any], form: Form) -> None:
    plan = plan_of(build, form)
    assert plan.logits is not None
    assert plan.logits.tensor == flatbuffer.parse(converted(build, form)[0]).subgraphs[0].outputs[0]


def test_the_logits_are_those_of_the_class_output() -> None:
    plan = plan_of(two_heads, "float")
    assert plan.logits is not None
    assert plan.logits.source_layer == "logits"


@pytest.mark.parametrize(
    ("classes", "channels"), [(2, 2), (taps.MAX_LOGITS, taps.MAX_LOGITS), (taps.MAX_LOGITS + 1, None)]
)
def test_logits_are_taken_of_at_most_256_classes(classes: int, channels: int | None) -> None:
    plan = plan_of(perceptron, "float", outputs=classes)
    assert plan.classes == classes
    assert (plan.logits.channels if plan.logits is not None else None) == channels


@pytest.mark.parametrize(
    "build", [sigmoids, one_sigmoid, vector_autoencoder, image_autoencoder], ids=lambda build: build.__name__
)
def test_a_model_without_classes_has_no_logits(build: Callable[[], Any]) -> None:
    assert plan_of(build, "float").logits is None


def test_logits_of_another_rank_than_the_output_are_left_out() -> None:
    plan = plan_of(softmax_reshaped, "float")
    assert plan.class_output == 0
    assert plan.logits is None


@pytest.mark.parametrize(("last", "fits"), [(1021, True), (1022, False)])
def test_logits_are_left_out_where_the_norms_leave_no_room_for_them(last: int, fits: bool) -> None:
    content, layers = converted(wide, "float", 8, 1024, last)
    plan = taps.plan_taps(flatbuffer.parse(content), names=["wide1", "wide2"], layers=layers)
    assert (plan.logits is not None) == fits


# --- Hostile graphs ---


def ladder(rungs: int) -> Model:
    """Each tensor is the sum of the one before it with itself: as many paths as 2 to the power of rungs."""
    tensors = [
        schema.TensorT(name=f"rung{n}".encode(), shape=np.asarray([1, 4, 4, 2], np.int32), buffer=0)
        for n in range(rungs + 1)
    ]
    options = {"builtinOptionsType": schema.BuiltinOptions.AddOptions, "builtinOptions": schema.AddOptionsT()}
    operators = [
        schema.OperatorT(opcodeIndex=0, inputs=np.asarray([n, n]), outputs=np.asarray([n + 1]), **options)
        for n in range(rungs)
    ]
    graph = schema.SubGraphT(tensors=tensors, operators=operators, inputs=np.asarray([0]), outputs=np.asarray([rungs]))
    code = schema.OperatorCodeT(builtinCode=schema.BuiltinOperator.ADD)
    return schema.ModelT(version=3, subgraphs=[graph], operatorCodes=[code], buffers=[schema.BufferT()])


def test_the_work_grows_with_the_operators_and_not_with_the_paths() -> None:
    started = time.perf_counter()
    assert taps.tappable(ladder(5000))[-1].name == "rung4999"
    assert time.perf_counter() - started < 10


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_planned_but_nothing_else_happens(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    content = bytearray(converted(with_module, form, "sum", "convolution")[0])
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    try:
        model = flatbuffer.parse(bytes(content))
        plan = taps.plan_taps(model)
    except ModelError:
        return
    check(model, plan)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_wiring_of_known_operators_is_refused_or_planned(data: st.DataObject) -> None:
    model = copy.deepcopy(ladder(12))
    graph = model.subgraphs[0]
    codes = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
    model.operatorCodes = [schema.OperatorCodeT(builtinCode=code) for code in codes]
    for number, operator in enumerate(graph.operators):
        operator.opcodeIndex = data.draw(st.integers(0, len(codes) - 1))
        operands = st.tuples(st.integers(0, number), st.integers(0, number), st.integers(-1, number))
        operator.inputs = np.asarray(data.draw(operands), np.int32)
        if codes[operator.opcodeIndex] == schema.BuiltinOperator.CONCATENATION:
            operator.builtinOptions = schema.ConcatenationOptionsT(axis=data.draw(st.integers(-9, 9)))
        tensor = graph.tensors[number + 1]
        tensor.type = data.draw(st.sampled_from([schema.TensorType.FLOAT32, schema.TensorType.INT8, 1, 2]))
        tensor.shape = np.asarray(data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=5)), np.int32)
        tensor.shape[0] = 1
        if tensor.type == schema.TensorType.INT8 and data.draw(st.booleans()):
            tensor.quantization = schema.QuantizationParametersT(scale=[0.5], zeroPoint=None)
    try:
        plan = taps.plan_taps(model)
    except ModelError:
        return
    check(model, plan)


def check(model: Model, plan: TapPlan) -> None:
    """What holds for every plan."""
    tensors = model.subgraphs[0].tensors
    assert plan.taps
    assert len({tap.tensor for tap in plan.taps}) == len(plan.taps)
    assert width(plan) <= MAX_FEATURES
    for tap in plan.taps:
        shape = tensors[tap.tensor].shape
        assert (shape[0], shape[-1]) == (1, tap.channels)
        assert tap.axes == tuple(range(1, len(shape) - 1))
