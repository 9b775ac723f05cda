"""Inputs made up from the model alone, for an audit without clean data.

Chen et al., DeepInspect, IJCAI 2019: model inversion. From random starts, pixels are moved until the network is sure of
a class, and kept smooth by total variation, so that they look more like pictures than like noise. Deviation: triggers
are then sought as all are (:mod:`edgeguard.inspection.inversion`), one mask and pattern per label in one batch, where
the paper trains a generator that takes the label.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Progress
from edgeguard.inspection.networks import logits_of

STEPS, RATE = 150, 0.1
_SMOOTHNESS = 2.0
_COARSE = 4


def inputs_of(
    model: Any, *, each: int = 20, steps: int = STEPS, seed: int = 0, progress: Progress | None = None
) -> npt.NDArray[np.uint8]:
    """Made-up inputs ``uint8 [classes * each, H, W, C]``, those of one class after those of the other.

    Args:
        model: a Keras functional model from pixels, 0 to 255, to a softmax over classes; frozen here.
        each: how many for each class.
        steps: of the ascent.
        seed: of the starts.
        progress: called with a text, the steps done and the steps in total.

    Raises:
        ModelError: the model does not end in a softmax over classes.
    """
    import tensorflow as tf

    logits = logits_of(model)
    height, width, channels = model.inputs[0].shape[1:]
    classes = int(logits.outputs[0].shape[-1])
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0.0, 1.0, (classes * each, -(-height // _COARSE), -(-width // _COARSE), channels))
    raw = tf.Variable(tf.image.resize(coarse.astype(np.float32), (height, width), "bicubic"))
    targets = tf.repeat(tf.range(classes), each)
    optimiser = tf.keras.optimizers.Adam(RATE)
    optimiser.build([raw])

    @tf.function(autograph=False)
    def update() -> None:
        with tf.GradientTape() as tape:
            pixels = (tf.tanh(raw) + 1.0) / 2.0
            entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits(pixels * 255.0, training=False))
            loss = tf.reduce_sum(entropy) + _SMOOTHNESS / height * tf.reduce_sum(tf.image.total_variation(pixels))
        optimiser.apply_gradients([(tape.gradient(loss, raw), raw)])

    for step in range(1, steps + 1):
        update()
        if progress:
            progress("making inputs up from the model", step, steps)
    return np.round((np.tanh(raw.numpy()) + 1.0) * 127.5).astype(np.uint8)
