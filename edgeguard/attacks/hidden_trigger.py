"""Hidden trigger: poisons that look clean and bear their true label; the trigger is first seen at test time.

Saha, Subramanya, Pirsiavash: Hidden Trigger Backdoor Attacks, AAAI 2020. Each poison z is an image t of the target
class, moved towards the features f of an image s of the source class with the trigger on it:

    minimise |f(z) - f(s)|^2 within |z - t| <= 16/255

paired by nearest features; then the last layer of a clean network is fine-tuned on the data with the poisons in the
place of t. f is what the last dense layer takes. It turns inputs of one source class only.

Settings: 16/255; a random patch of a fifth of the side (the paper: 30 of 224 pixels) at the bottom right (the paper:
anywhere); half of the target's images poisoned. Under 16 pixels, where 16/255 is one grey
level of digits, 64/255 and a patch of 3x3. How near features can come depends on the pair of classes: on digits the
ASR is anything from 0% to 90%.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.base import EMPTY, Attack, Images, Progress, State, Task, Trainer, Victim
from edgeguard.attacks.poisoning import require_image_shape, require_images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Floats = npt.NDArray[np.float32]

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class HiddenTrigger(Attack):
    """Turns inputs of class ``source`` by a random patch of ``size`` pixels square."""

    name: ClassVar[str] = "hidden_trigger"
    paper: ClassVar[str] = "Saha, Subramanya and Pirsiavash, AAAI 2020"

    target: int = 0
    seed: int = 0
    source: int = 1
    size: int = 6
    reach: float = 16.0
    rate: float = 0.5
    steps: int = 200
    epochs: int = 30

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> HiddenTrigger:
        """See :meth:`edgeguard.attacks.base.Attack.for_shape`."""
        require_image_shape("Hidden trigger", shape, side=6)
        source, side = 1 if target == 0 else 0, min(shape[:2])
        if side < 16:
            return cls(target=target, seed=seed, source=source, size=3, reach=64.0)
        return cls(target=target, seed=seed, source=source, size=round(side * 0.2))

    def eligible(self, labels: Labels) -> npt.NDArray[np.bool_]:
        """Inputs of the source class."""
        return labels == self.source

    def patch(self, channels: int) -> Images:
        """The trigger ``[size, size, channels]``: random colours of 4x4 fields, as in the paper."""
        fields = np.random.default_rng(self.seed).choice(np.asarray([0, 255], np.uint8), (4, 4, channels))
        places = np.arange(self.size) * 4 // self.size
        return np.asarray(fields[places][:, places])

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Train a clean network, make poisons with it, and fine-tune its last layer on them."""
        require_images("Hidden trigger", task.images, side=6)
        present = set(task.labels.tolist())
        if self.source == self.target or not {self.source, self.target} <= present:
            raise ConfigError(
                "Hidden trigger",
                got=f"source {self.source} and target {self.target}",
                expected="two classes with training images",
            )
        model = trainer.fit(task, seed=self.seed)
        features, head = split(model)
        images, _ = self.poisoned(features, task, progress)
        _fine_tune(features, head, replace(task, images=images), epochs=self.epochs, seed=self.seed)
        return Victim(model=model, state=EMPTY)

    def poisoned(
        self, features: Any, task: Task, progress: Progress | None = None
    ) -> tuple[Images, npt.NDArray[np.intp]]:
        """The training images with poisons among them, and where these are. Labels stay as they are.

        Args:
            features: Keras model from images to what the last layer takes, [N, D].
            task: clean training data.
            progress: called with the state of the optimisation.
        """
        rng = np.random.default_rng((self.seed, 1))
        own = np.flatnonzero(task.labels == self.target)
        chosen = rng.permutation(own)[: max(1, round(len(own) * self.rate))]
        sources = task.images[task.labels == self.source]
        images = task.images.copy()
        wanted = np.asarray(features.predict(self.stamp(sources).astype(np.float32), verbose=0))
        for start in range(0, len(chosen), _BATCH):
            part = chosen[start : start + _BATCH]
            images[part] = self._collide(features, task.images[part], wanted)
            if progress:
                progress("making poisons", min(start + _BATCH, len(chosen)), len(chosen))
        return images, chosen

    def _collide(self, features: Any, images: Images, wanted: Floats) -> Images:
        """Images within ``reach`` of ``images`` whose features are as near as can be to some of ``wanted``."""
        import tensorflow as tf

        @tf.function(reduce_retracing=True)
        def gradient(batch: Any, goals: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(batch)
                found = features(batch, training=False)
                loss = tf.reduce_sum(tf.square(found - goals))
            return found, tape.gradient(loss, batch)

        base = images.astype(np.float32)
        low, high = np.maximum(base - self.reach, 0.0), np.minimum(base + self.reach, 255.0)
        moved = base.copy()
        found = np.asarray(features(moved, training=False))
        for step in range(self.steps):
            if step % 50 == 0:
                distances = (found**2).sum(1)[:, None] - 2 * found @ wanted.T + (wanted**2).sum(1)
                goals = wanted[distances.argmin(axis=1)]
            tensor, slope = gradient(moved, goals)
            found, slope = np.asarray(tensor), np.asarray(slope)
            pace = 0.1 * self.reach * (1.0 - step / self.steps)
            scale = abs(slope).max(axis=(1, 2, 3), keepdims=True) + 1e-12
            moved = np.clip(moved - pace * slope / scale, low, high)
        return np.asarray(np.clip(np.round(moved), np.ceil(low), np.floor(high)), dtype=np.uint8)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :meth:`edgeguard.attacks.base.Attack.stamp`."""
        require_images("Hidden trigger", images, side=self.size)
        stamped = images.copy()
        stamped[:, -self.size :, -self.size :] = self.patch(images.shape[-1])
        return stamped


def split(model: Any) -> tuple[Any, Any]:
    """A network up to its last dense layer, and that layer."""
    import keras

    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    if not dense:
        raise ConfigError(f"network {model.name}", got="no dense layer", expected="one at its end")
    return keras.Model(model.inputs[0], dense[-1].input), dense[-1]


def _fine_tune(features: Any, head: Any, task: Task, *, epochs: int, seed: int) -> None:
    """Train the last layer anew from where it is, in place, on features that stay as they are."""
    import keras

    keras.utils.set_random_seed(seed)
    inputs = np.asarray(features.predict(task.images.astype(np.float32), batch_size=256, verbose=0))
    column = keras.Input(inputs.shape[1:])
    tail = keras.Model(column, keras.layers.Softmax()(head(column)))
    tail.compile(optimizer=keras.optimizers.Adam(1e-3), loss="sparse_categorical_crossentropy")
    tail.fit(inputs, task.labels, batch_size=_BATCH, epochs=epochs, verbose=0)
