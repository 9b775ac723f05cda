"""The small networks that the red team attacks: architecture, training with progress, cache by content hash.

A trained model is cached outside the project (``EDGEGUARD_CACHE``, else ``~/.cache/edgeguard``) under the SHA-256 of
everything that determines it: data, labels, architecture version, epochs, seed and Keras version.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard.attacks.base import Images
from edgeguard.data import Labels

Progress = Callable[[str, int, int], None]
"""Called with a text, the steps done and the steps in total."""

ARCHITECTURE = "small-cnn-1"


def small_cnn(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """A Keras CNN with batch-norm that takes pixels 0 to 255: three or four convolutions, by image size.

    Output: softmax over ``classes``.
    """
    import keras

    keras.utils.set_random_seed(seed)
    large = min(shape[:2]) >= 16
    widths = (32, 64, 64) if large else (24, 48, 48)
    x = inputs = keras.Input(shape, name="pixels")
    x = keras.layers.Rescaling(1.0 / 255.0, name="rescale")(x)
    for index, width in enumerate(widths, start=1):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{index}")(x)
        x = keras.layers.BatchNormalization(name=f"bn{index}")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
        if index < len(widths) and (large or index == len(widths) - 1):
            x = keras.layers.MaxPooling2D(name=f"pool{index}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dropout(0.3, name="dropout")(x)
    x = keras.layers.Dense(classes, name="logits")(x)
    outputs = keras.layers.Softmax(name="probabilities")(x)
    return keras.Model(inputs, outputs, name="small_cnn")


def train(
    images: Images,
    labels: Labels,
    classes: int,
    *,
    epochs: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """Train :func:`small_cnn`: Adam with a cosine from 2e-3, batch 128 (32 on fewer than 5,000 inputs).

    Returns:
        The trained Keras model.
    """
    import keras

    batch = 128 if len(images) >= 5000 else 32
    model = small_cnn(images.shape[1:], classes, seed=seed)
    steps = epochs * -(-len(images) // batch)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, steps, alpha=0.01)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    order = np.random.default_rng(seed).permutation(len(images))

    class Report(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            if progress:
                progress(f"training: accuracy {(logs or {}).get('accuracy', 0):.3f}", epoch + 1, epochs)

    model.fit(
        images[order].astype(np.float32),
        labels[order],
        batch_size=batch,
        epochs=epochs,
        verbose=0,
        callbacks=[Report()],
    )
    return model


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
) -> tuple[Any, bool]:
    """Like :func:`train`, but from ``cache`` where this very training ran before.

    Returns:
        The model, and whether it came from the cache.
    """
    import keras

    if cache is None:
        return train(images, labels, classes, epochs=epochs, seed=seed, progress=progress), False
    key = hashlib.sha256()
    key.update(repr((ARCHITECTURE, keras.__version__, images.shape, classes, epochs, seed)).encode())
    key.update(np.ascontiguousarray(images).tobytes())
    key.update(np.ascontiguousarray(labels).tobytes())
    file = cache / "models" / f"{key.hexdigest()}.keras"
    if file.is_file():
        try:
            return keras.models.load_model(file), True
        except (ValueError, OSError):
            file.unlink()  # half-written by an interrupted run of an older version; train anew
    model = train(images, labels, classes, epochs=epochs, seed=seed, progress=progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.{os.getpid()}.keras")
    model.save(partial)
    partial.replace(file)
    return model, False
