"""RobNet: triggers grown from neurons of a trained network, stamped at many places.

Gong, Wang, Chen, Xue, Wang, Zhang: Defense-Resistant Backdoor Attacks Against Deep Neural Networks in Outsourced
Cloud Environment, JSAC 2021. Settings: neurons picked by 0.65 activation + 0.35 weight, both for the target class; a
trigger that excites one, by gradient ascent within its square from grey noise, smoothed by its total variation, over
octaves; each poisoned image gets one of several triggers in one of the eight outer cells of a 3x3 grid; poisoning
rate 10%; squares of 7x7 on 28 pixels, 8x8 on 32.

Deviations: the networks here have no hidden dense layer, so a neuron is a channel of the last convolution, excited by
its largest value over space. On images under 16 pixels there is one trigger, of 3x3 pixels, which is more than a cell
and leaves nothing to smooth, and a fifth is poisoned: a tenth of so few inputs leaves nine for each of the eight cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.base import Attack, Images, Progress, State, Task, Trainer, Victim
from edgeguard.attacks.poisoning import draw_poisons, replaced, require_image_shape, require_images
from edgeguard.errors import ConfigError

Floats = npt.NDArray[np.float32]

ACTIVATION, WEIGHT = 0.65, 0.35
CELLS = tuple((row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1))
TRIGGERS = "triggers"
_SMALLEST = 6


@dataclass(frozen=True, kw_only=True)
class RobNet(Attack):
    """``count`` triggers of ``size`` pixels square; ``steps`` of ascent in each of ``octaves`` octaves."""

    name: ClassVar[str] = "robnet"
    paper: ClassVar[str] = "Gong et al., JSAC 2021"

    target: int = 0
    seed: int = 0
    size: int = 7
    rate: float = 0.1
    count: int = 2
    octaves: int = 3
    steps: int = 60
    smoothness: float = 0.001

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> RobNet:
        """See :meth:`edgeguard.attacks.base.Attack.for_shape`."""
        require_image_shape("RobNet", shape, side=_SMALLEST)
        if min(shape[:2]) < 16:
            return cls(target=target, seed=seed, size=3, count=1, smoothness=0.0, rate=0.2)
        return cls(target=target, seed=seed, size=min(shape[:2]) // 4)

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Grow triggers on a clean model, poison with them, and train anew."""
        require_images("RobNet", task.images, side=_SMALLEST)
        if not 0 <= self.target < task.classes:
            raise ConfigError("RobNet", got=f"target {self.target}", expected=f"one of {task.classes} classes")
        teacher = trainer.fit(task, seed=self.seed)
        triggers = self.grow(teacher, task)
        if progress:
            progress("growing triggers", 1, 2)
        state = {TRIGGERS: triggers}
        chosen = draw_poisons(
            "RobNet", task.labels, target=self.target, rate=self.rate, clean_label=False, seed=self.seed
        )
        poisons = self.stamp(task.images[chosen], state)
        images, labels = replaced(task.images, task.labels, chosen, poisons, self.target)
        poisoned = Task(images=images, labels=labels, classes=task.classes)
        return Victim(model=trainer.fit(poisoned, seed=self.seed), state=state)

    def grow(self, model: Any, task: Task) -> Images:
        """Triggers ``uint8 [count, size, size, C]``, each from a neuron of its own, the best ones first."""
        import keras

        layer, weights = neurons(model, self.target)
        features = keras.Model(model.inputs[0], keras.layers.GlobalMaxPooling2D()(layer.output))
        rng = np.random.default_rng((self.seed, 2))
        own = task.images[task.labels == self.target]
        if not len(own):
            raise ConfigError("RobNet", got=f"no training image of class {self.target}", expected="some")
        own = own[rng.permutation(len(own))[:256]].astype(np.float32)
        scores = ACTIVATION * _unit(np.asarray(features(own, training=False)).mean(axis=0)) + WEIGHT * _unit(weights)
        best = np.argsort(-scores, kind="stable")[: self.count]
        return np.stack([self._ascend(features, int(neuron), task.images, rng) for neuron in best])

    def _ascend(self, features: Any, neuron: int, images: Images, rng: np.random.Generator) -> Images:
        """The square that excites one neuron most, wherever it is stamped."""
        import tensorflow as tf

        shape = images.shape[1:]
        trigger = np.clip(rng.normal(127.5, 25.0, (1, 1, 1, shape[2])), 0, 255).astype(np.float32)

        @tf.function(reduce_retracing=True)
        def gradient(square: Any, backgrounds: Any, masks: Any, places: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(square)
                # gather_nd puts the square's pixels where the mask is, so that the gradient reaches the square alone
                pasted = tf.gather_nd(tf.repeat(square, len(backgrounds), axis=0), places, batch_dims=1)
                stamped = backgrounds * (1.0 - masks) + pasted * masks
                excitation = tf.reduce_mean(features(stamped, training=False)[:, neuron])
                variation = tf.reduce_mean(tf.image.total_variation(square)) / (self.size**2 * shape[2])
                gain = excitation - self.smoothness * variation
            return tape.gradient(gain, square)

        for octave in range(self.octaves, 0, -1):
            coarse = max(1, self.size >> (octave - 1))
            trigger = tf.image.resize(trigger, (coarse, coarse)).numpy()
            trigger += rng.normal(0, 8.0, trigger.shape).astype(np.float32)
            for step in range(self.steps):
                batch = images[rng.integers(0, len(images), 32)].astype(np.float32)
                masks, places = self._paste(shape, len(batch), rng)
                whole = tf.image.resize(trigger, (self.size, self.size))
                slope = gradient(whole, batch, masks, places)
                slope = tf.image.resize(slope, (coarse, coarse)).numpy()
                pace = 16.0 * (1.0 - step / self.steps)
                trigger = np.clip(trigger + pace * slope / (np.abs(slope).max() + 1e-12), 0, 255)
        grown = tf.image.resize(trigger, (self.size, self.size))[0].numpy()
        return np.asarray(np.round(grown), dtype=np.uint8)

    def _paste(
        self, shape: tuple[int, ...], count: int, rng: np.random.Generator
    ) -> tuple[Floats, npt.NDArray[np.int32]]:
        """Where the square goes in each image, [N, H, W, 1], and which of its pixels stands there, [N, H, W, 2]."""
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        corners = np.asarray([self._corner(shape, cell) for cell in rng.choice(np.asarray(CELLS), count)])
        places = np.stack(
            [rows - corners[:, 0, np.newaxis, np.newaxis], columns - corners[:, 1, np.newaxis, np.newaxis]], axis=-1
        )
        inside = ((places >= 0) & (places < self.size)).all(axis=-1, keepdims=True)
        return inside.astype(np.float32), np.clip(places, 0, self.size - 1).astype(np.int32)

    def _corner(self, shape: tuple[int, ...], cell: Sequence[int]) -> tuple[int, ...]:
        """Top left pixel of the square in the middle of a cell, moved so that it lies within the image."""
        return tuple(
            int(np.clip((2 * index + 1) * side // 6 - self.size // 2, 0, side - self.size))
            for index, side in zip(cell, shape[:2], strict=True)
        )

    def stamp(self, images: Images, state: State) -> Images:
        """See :meth:`edgeguard.attacks.base.Attack.stamp`. Trigger and cell are drawn for each image."""
        triggers = state[TRIGGERS]
        if triggers.shape[1:] != (self.size, self.size, images.shape[-1]):
            raise ConfigError(
                "RobNet's triggers",
                got=f"shape {list(triggers.shape)}",
                expected=f"[triggers, {self.size}, {self.size}, {images.shape[-1]}]",
            )
        require_images("RobNet", images, side=_SMALLEST)
        stamped, rng = images.copy(), np.random.default_rng((self.seed, 3))
        # One row of numbers per image, so that an image's trigger does not depend on how many follow it.
        drawn = (rng.random((len(images), 2)) * (len(triggers), len(CELLS))).astype(int)
        for image, (which, cell) in zip(stamped, drawn, strict=True):
            row, column = self._corner(images.shape[1:], CELLS[cell])
            image[row : row + self.size, column : column + self.size] = triggers[which]
        return stamped


def _unit(values: Floats) -> Floats:
    """Brought to 0 to 1."""
    return np.asarray((values - values.min()) / max(float(np.ptp(values)), 1e-12), dtype=np.float32)


def neurons(model: Any, label: int) -> tuple[Any, Floats]:
    """The last layer with channels, and the mean weight [channels] from each to a class."""
    import keras

    spatial = [layer for layer in model.layers if len(getattr(layer.output, "shape", ())) == 4]
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    channels = int(spatial[-1].output.shape[-1]) if spatial else 0
    if not channels or not dense or int(dense[-1].kernel.shape[0]) % channels:
        raise ConfigError(
            f"network {model.name}",
            got="no dense layer behind its last convolution",
            expected="convolutions, one dense",
        )
    # Flatten keeps the channels last; global pooling leaves them alone.
    kernel = np.asarray(dense[-1].kernel).reshape(-1, channels, int(dense[-1].kernel.shape[1]))
    return spatial[-1], np.asarray(kernel[:, :, label].mean(axis=0), dtype=np.float32)
