"""The small networks that the red team attacks: untrained Keras models, pixels 0 to 255 in, softmax out.

They stand for what runs on boards: a plain CNN, inverted residuals as in MobileNetV2, residual blocks as in the
ResNet-8 of MLPerf Tiny. All fit images of 8x8 pixels and more; images under 16 pixels are halved less often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

SMALL_CNN = "small-cnn-1"
MOBILENET_LIKE = "mobilenet-like-1"
RESNET8_LIKE = "resnet8-like-1"


class Network(Protocol):
    """Builds an untrained Keras model."""

    def __call__(self, shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any: ...


def small_cnn(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """A Keras CNN with batch-norm that takes pixels 0 to 255. Output: softmax over ``classes``.

    Three convolutions; from 32x32 pixels on four, of which the first two have stride 2: many classes take width, and
    width at full resolution takes hours on a CPU.
    """
    import keras

    keras.utils.set_random_seed(seed)
    if min(shape[:2]) >= 32:
        return _wide_cnn(shape, classes)
    large = min(shape[:2]) >= 16
    widths = (32, 64, 64) if large else (24, 48, 48)

    def convolutions(x: Any) -> Any:
        for index, width in enumerate(widths, start=1):
            x = _convolved(x, index, width)
            if index < len(widths) and (large or index == len(widths) - 1):
                x = keras.layers.MaxPooling2D(name=f"pool{index}")(x)
        return x

    return _small(shape, classes, convolutions, dropout=0.3)


def _wide_cnn(shape: tuple[int, ...], classes: int) -> Any:
    import keras

    def convolutions(x: Any) -> Any:
        for index, (width, size, stride) in enumerate(((32, 5, 2), (64, 3, 2), (128, 3, 1)), start=1):
            x = _convolved(x, index, width, size, stride)
        return _convolved(keras.layers.MaxPooling2D(name="pool3")(x), 4, 128)

    return _small(shape, classes, convolutions, dropout=0.4)


def _convolved(x: Any, index: int, width: int, size: int = 3, stride: int = 1) -> Any:
    import keras

    x = keras.layers.Conv2D(width, size, stride, padding="same", use_bias=False, name=f"conv{index}")(x)
    x = keras.layers.BatchNormalization(name=f"bn{index}")(x)
    return keras.layers.ReLU(name=f"relu{index}")(x)


def _small(shape: tuple[int, ...], classes: int, convolutions: Callable[[Any], Any], *, dropout: float) -> Any:
    import keras

    inputs = keras.Input(shape, name="pixels")
    x = convolutions(keras.layers.Rescaling(1.0 / 255.0, name="rescale")(inputs))
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dropout(dropout, name="dropout")(x)
    x = keras.layers.Dense(classes, name="logits")(x)
    outputs = keras.layers.Softmax(name="probabilities")(x)
    return keras.Model(inputs, outputs, name="small_cnn")


def mobilenet_like(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """Seven inverted residuals with linear bottlenecks and ReLU6, about 70,000 weights.

    Sandler et al.: MobileNetV2, CVPR 2018, with expansion 4 instead of 6.
    """
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers

    def normalised(x: Any, name: str, *, activation: bool) -> Any:
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        return layers.ReLU(max_value=6.0, name=f"{name}_relu6")(x) if activation else x

    def block(x: Any, width: int, stride: int, name: str) -> Any:
        before = x
        x = layers.Conv2D(4 * x.shape[-1], 1, use_bias=False, name=f"{name}_expand")(x)
        x = normalised(x, f"{name}_expand", activation=True)
        x = layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False, name=f"{name}_depthwise")(x)
        x = normalised(x, f"{name}_depthwise", activation=True)
        x = layers.Conv2D(width, 1, use_bias=False, name=f"{name}_project")(x)
        x = normalised(x, f"{name}_project", activation=False)
        return layers.Add(name=f"{name}_add")([before, x]) if x.shape == before.shape else x

    x = inputs = keras.Input(shape, name="pixels")
    x = layers.Rescaling(1.0 / 255.0, name="rescale")(x)
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(x)
    x = normalised(x, "stem", activation=True)
    large = min(shape[:2]) >= 16
    for index, (width, stride) in enumerate(
        ((16, 1), (24, 2 if large else 1), (24, 1), (32, 2), (32, 1), (48, 1), (48, 1)), start=1
    ):
        x = block(x, width, stride, f"block{index}")
    x = layers.Conv2D(96, 1, use_bias=False, name="head")(x)
    x = normalised(x, "head", activation=True)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(classes, name="logits")(x)
    outputs = layers.Softmax(name="probabilities")(x)
    return keras.Model(inputs, outputs, name="mobilenet_like")


def resnet8_like(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """Three residual blocks of 16, 32 and 64 channels, ReLU after each addition, about 77,000 weights.

    Banbury et al.: MLPerf Tiny Benchmark, 2021, its image classification model.
    """
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers

    def convolved(x: Any, width: int, stride: int, name: str, *, size: int = 3) -> Any:
        x = layers.Conv2D(width, size, stride, padding="same", use_bias=False, name=name)(x)
        return layers.BatchNormalization(name=f"{name}_bn")(x)

    x = inputs = keras.Input(shape, name="pixels")
    x = layers.Rescaling(1.0 / 255.0, name="rescale")(x)
    x = layers.ReLU(name="stem_relu")(convolved(x, 16, 1, "stem"))
    large = min(shape[:2]) >= 16
    for index, (width, stride) in enumerate(((16, 1), (32, 2 if large else 1), (64, 2)), start=1):
        name = f"block{index}"
        y = layers.ReLU(name=f"{name}_relu")(convolved(x, width, stride, f"{name}_conv1"))
        y = convolved(y, width, 1, f"{name}_conv2")
        if x.shape != y.shape:
            x = convolved(x, width, stride, f"{name}_shortcut", size=1)
        x = layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(classes, name="logits")(x)
    outputs = layers.Softmax(name="probabilities")(x)
    return keras.Model(inputs, outputs, name="resnet8_like")


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {SMALL_CNN: small_cnn, MOBILENET_LIKE: mobilenet_like, RESNET8_LIKE: resnet8_like}
)
"""By name. What a cache of trained models knows each by: :func:`version`."""


def version(name: str, shape: tuple[int, ...]) -> str:
    """What stands for the layers of a network for inputs of this shape: to be changed with them.

    Two networks of one name that differ by shape have versions of their own, so that one can change without the other.
    """
    return f"{name}-wide" if name == SMALL_CNN and min(shape[:2]) >= 32 else name
