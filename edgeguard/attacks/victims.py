"""Trains the networks that the red team attacks: one recipe, progress, and a cache by content hash.

A trained model is cached outside the project (``EDGEGUARD_CACHE``, else ``~/.cache/edgeguard``) under the SHA-256 of
everything that determines it: data, labels, architecture version, epochs, seed and Keras version.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard.attacks.base import Images, Progress, Task
from edgeguard.attacks.networks import SMALL_CNN, Network, small_cnn, version
from edgeguard.data import Labels

AUGMENTATION = 2
"""What a cache of trained models knows the way by in which inputs are augmented: raise it when that changes."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The usual recipe for one architecture: a :class:`edgeguard.attacks.base.Trainer`.

    ``architecture`` is what the cache knows ``network`` by: change it with the network. Without ``cache`` every
    training runs. Training that goes on from a given model is never cached: the cache cannot know what made that model.
    """

    epochs: int
    network: Network = small_cnn
    architecture: str = SMALL_CNN
    augment: bool = False
    cache: Path | None = None
    progress: Progress | None = None

    def fresh(self, task: Task, *, seed: int) -> Any:
        """See :class:`edgeguard.attacks.base.Trainer`."""
        return self.network(task.shape, task.classes, seed=seed)

    def fit(self, task: Task, *, seed: int, model: Any = None) -> Any:
        """See :class:`edgeguard.attacks.base.Trainer`."""
        if model is not None:
            train(
                model,
                task.images,
                task.labels,
                epochs=self.epochs,
                seed=seed,
                progress=self.progress,
                augment=self.augment,
            )
            return model
        return trained(
            task.images,
            task.labels,
            task.classes,
            epochs=self.epochs,
            seed=seed,
            progress=self.progress,
            cache=self.cache,
            network=self.network,
            architecture=self.architecture,
            augment=self.augment,
        )[0]


def train(
    model: Any,
    images: Images,
    labels: Labels,
    *,
    epochs: int,
    seed: int = 0,
    progress: Progress | None = None,
    augment: bool = False,
) -> None:
    """Train a Keras model in place: Adam with a cosine from 2e-3, batch 128 (32 on fewer than 5,000 inputs).

    With ``augment`` each batch is moved, turned, zoomed, and changed in brightness and contrast at random, a little:
    the upright world that a camera on a board sees, so nothing is mirrored.
    """
    import keras
    import tensorflow as tf

    batch = 128 if len(images) >= 5000 else 32
    steps = epochs * -(-len(images) // batch)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, steps, alpha=0.01)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # XLA's convolutions took four times as long on a CPU
    )
    order = np.random.default_rng(seed).permutation(len(images))

    class Report(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            if progress:
                progress(f"training: accuracy {(logs or {}).get('accuracy', 0):.3f}", epoch + 1, epochs)

    data = tf.data.Dataset.from_tensor_slices((images[order], labels[order]))
    data = data.shuffle(len(images), seed=seed).batch(batch)
    data = data.map(_augmentation(seed) if augment else lambda x, y: (tf.cast(x, tf.float32), y))
    model.fit(data.prefetch(4), epochs=epochs, shuffle=False, verbose=0, callbacks=[Report()])


def _augmentation(seed: int) -> Any:
    """A function of a batch of images and labels that changes the images at random."""
    import tensorflow as tf

    source = tf.random.Generator.from_seed(seed)

    def augment(images: Any, labels: Any) -> tuple[Any, Any]:
        pixels = tf.cast(images, tf.float32)
        count, height, width = tf.shape(pixels)[0], pixels.shape[1], pixels.shape[2]
        # One projection does all three moves, about the middle: output (x, y) is taken from input (a x - b y + c, ...).
        angle, zoom = source.uniform([count], -0.1, 0.1), source.uniform([count], 0.9, 1.1)
        a, b = tf.cos(angle) * zoom, tf.sin(angle) * zoom
        middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
        right = source.uniform([count], -0.06, 0.06) * width + middle_x - a * middle_x + b * middle_y
        down = source.uniform([count], -0.06, 0.06) * height + middle_y - b * middle_x - a * middle_y
        zero = tf.zeros_like(a)
        moved = tf.raw_ops.ImageProjectiveTransformV3(
            images=pixels,
            transforms=tf.stack([a, -b, right, b, a, down, zero, zero], axis=1),
            output_shape=[height, width],
            fill_value=0.0,
            interpolation="BILINEAR",
            fill_mode="NEAREST",
        )
        contrast, brightness = source.uniform([count, 1, 1, 1], 0.7, 1.3), source.uniform([count, 1, 1, 1], -30.0, 30.0)
        mean = tf.reduce_mean(moved, axis=[1, 2, 3], keepdims=True)
        return tf.clip_by_value((moved - mean) * contrast + mean + brightness, 0.0, 255.0), labels

    return augment


def cache_folder() -> Path:
    """Where trained models are kept, outside the project."""
    return Path(os.environ.get("EDGEGUARD_CACHE") or "~/.cache/edgeguard").expanduser()


def trained(
    images: Images,
    labels: Labels,
    classes: int,
    *,
    epochs: int,
    seed: int = 0,
    progress: Progress | None = None,
    cache: Path | None,
    network: Network = small_cnn,
    architecture: str = SMALL_CNN,
    augment: bool = False,
) -> tuple[Any, bool]:
    """A network trained on ``images``, from ``cache`` where this very training ran before.

    Args:
        network: builds the untrained Keras model from the shape of an input, the number of classes and a seed.
        architecture: what the cache knows it by; change it with the network.

    Returns:
        The model, and whether it came from the cache.
    """
    import keras

    if cache is None:
        model = network(images.shape[1:], classes, seed=seed)
        train(model, images, labels, epochs=epochs, seed=seed, progress=progress, augment=augment)
        return model, False
    key = hashlib.sha256()
    layers, augmented = version(architecture, images.shape[1:]), AUGMENTATION if augment else False
    key.update(repr((layers, keras.__version__, images.shape, classes, epochs, seed, augmented)).encode())
    key.update(np.ascontiguousarray(images).tobytes())
    key.update(np.ascontiguousarray(labels).tobytes())
    file = cache / "models" / f"{key.hexdigest()}.keras"
    if file.is_file():
        try:
            return keras.models.load_model(file), True
        except (ValueError, OSError):
            file.unlink()  # half-written by an interrupted run of an older version; train anew
    model = network(images.shape[1:], classes, seed=seed)
    train(model, images, labels, epochs=epochs, seed=seed, progress=progress, augment=augment)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.{os.getpid()}.keras")
    model.save(partial)
    partial.replace(file)
    return model, False
