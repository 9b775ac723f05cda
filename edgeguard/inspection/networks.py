"""Views of a trainable Keras model that inspection and repair need: its logits, the norms that devices report, answers.

The norms are those of :mod:`converters.guard`, computed on the float model: per tapped layer, the maximum and the mean
of the absolute activation over the spatial axes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import Tap
from edgeguard.errors import ModelError

_CHUNK = 256


def logits_of(model: Any) -> Any:
    """A Keras model with the same input that ends before the softmax. Shares all weights.

    Raises:
        ModelError: the model does not end in a softmax over classes.
    """
    import keras

    last = model.layers[-1]
    if isinstance(last, keras.layers.Softmax):
        return keras.Model(model.inputs, last.input)
    if isinstance(last, keras.layers.Dense) and last.activation is keras.activations.softmax:
        plain = keras.layers.Dense(last.units, use_bias=last.use_bias, name=f"{last.name}_logits")
        outputs = plain(last.input)
        plain.kernel.assign(last.kernel)
        if last.use_bias:
            plain.bias.assign(last.bias)
        return keras.Model(model.inputs, outputs)
    raise ModelError(
        "trainable model",
        got=f"a last layer {last.name} ({type(last).__name__})",
        expected="a softmax over classes",
        do="bring the model with its softmax",
    )


def norms_of(model: Any, taps: Sequence[Tap]) -> Any:
    """A Keras model from inputs to ``[logits, norms]``: norms [N, D] in the order of ``edgeguard_features``.

    Raises:
        ModelError: a tap names no layer of this model.
    """
    import keras

    logits = logits_of(model)
    names = {layer.name for layer in model.layers}
    parts: list[Any] = []
    for tap in sorted(taps, key=lambda t: t.offset):
        if tap.kind == "logit":  # the logits are an output of their own
            continue
        if tap.source_layer not in names:
            raise ModelError(
                "trainable model",
                got=f"no layer {tap.source_layer!r}, which the guard taps",
                expected="the model that the guarded file was converted from",
            )
        activation = keras.ops.absolute(model.get_layer(tap.source_layer).output)
        axes = tuple(range(1, len(activation.shape) - 1))
        reduce = keras.ops.max if tap.kind == "linf" else keras.ops.mean
        parts.append(reduce(activation, axis=axes) if axes else activation)
    return keras.Model(model.inputs, [logits.output, keras.ops.concatenate(parts, axis=1)])


class Traced:
    """A Keras model that answers, to batches of any size, through a graph: worth its making from many inputs on.

    It has no weights of its own: what becomes of the model's is seen.
    """

    def __init__(self, model: Any) -> None:
        import tensorflow as tf

        self.inputs, self.outputs = model.inputs, model.outputs
        signature = (tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32),)
        self._answer = tf.function(lambda x: model(x, training=False), autograph=False, input_signature=signature)

    def __call__(self, inputs: npt.NDArray[np.float32], training: bool) -> Any:
        """As the model is called; it never trains."""
        return self._answer(inputs)


def run(model: Any, images: npt.NDArray[Any], output: int | None = None) -> npt.NDArray[np.float32]:
    """One output of a Keras model for images [N, H, W, C], without what ``predict`` compiles for every new model.

    Args:
        model: a Keras model, or a :class:`Traced` one.
        images: any images, 0 to 255.
        output: which output, of a model with several.
    """
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras says that a list of one input is not an input
        for start in range(0, len(images), _CHUNK):
            answers = model(images[start : start + _CHUNK].astype(np.float32), training=False)
            found.append(np.asarray(answers if output is None else answers[output]))
    return np.concatenate(found)
