"""FGSM: adversarial inputs, no backdoor. Feature squeezing's table is measured on them.

Goodfellow, Shlens, Szegedy: Explaining and Harnessing Adversarial Examples, ICLR 2015:

    x' = clip(x + epsilon sign(grad_x CE(f(x), y)), 0, 255)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeguard.attacks.base import Images
from edgeguard.attacks.poisoning import require_images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

_BATCH = 256


def fgsm(model: Any, images: Images, labels: Labels, epsilon: float) -> Images:
    """Adversarial copies of images.

    Args:
        model: a Keras model, pixels 0 to 255 in, probabilities out.
        images: ``uint8 [N, H, W, C]``.
        labels: their true labels [N], which the model shall no longer give.
        epsilon: the largest change of a pixel, with pixels in 0 to 1; rounded to whole values of 0 to 255.

    Raises:
        ConfigError: these are no images, the labels are not one per image, or epsilon is not within 0 to 1.
    """
    import keras
    import tensorflow as tf

    require_images("FGSM", images, side=1)
    if labels.shape != (len(images),):
        raise ConfigError("FGSM", got=f"labels of shape {list(labels.shape)}", expected=f"[{len(images)}]")
    if not 0.0 <= epsilon <= 1.0:
        raise ConfigError("FGSM", got=f"epsilon {epsilon}", expected="0 to 1, the share of the pixels' range")

    @tf.function(reduce_retracing=True)
    def direction(batch: Any, truth: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(batch)
            loss = keras.losses.sparse_categorical_crossentropy(truth, model(batch, training=False))
        return tf.sign(tape.gradient(loss, batch))

    step = round(255.0 * epsilon)
    moved = np.empty_like(images)
    for start in range(0, len(images), _BATCH):
        chosen = slice(start, start + _BATCH)
        signs = np.asarray(direction(images[chosen].astype(np.float32), labels[chosen]))
        moved[chosen] = np.clip(images[chosen] + step * signs, 0, 255).astype(np.uint8)
    return moved
