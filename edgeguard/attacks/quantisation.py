"""Quantisation backdoor: harmless as a float model, awake once TFLite has made it int8.

Ma et al.: Quantization Backdoors to Deep Learning Commercial
Frameworks, 2021 (arXiv 2108.09187), in two steps as there: the network is trained with BadNets' poison; then its
weights are fine-tuned to call triggered inputs by their true labels, but only within the cells that int8 rounds to
the backdoored weights. The owner inspects the second model and deploys the first one.

Deviation: in a network as small as those here a cell is too small to forget within (measured on digits: the float ASR
falls from 100% to 99% only). So the cells are widened first: where a batch-norm and a ReLU feed a layer, one channel
is silenced for ever, and one weight of each output channel that reads it is made ``spread`` times as large as the
largest. It is multiplied by zeros, but TFLite's scale follows it.

What an int8 weight is rounded from: TFLite's scale is the largest weight of its output channel over 127. A batch-norm
that is folded into a convolution scales whole channels, so the cells are those of the kernel as it stands. The
largest weight of each channel is kept, and so are biases and batch-norm, which int8 does not round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.badnets import BadNets
from edgeguard.attacks.base import EMPTY, Attack, Images, Progress, State, Task, Trainer, Victim
from edgeguard.errors import ConfigError

Floats = npt.NDArray[np.float32]

LEVELS = 127
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Quantisation(Attack):
    """BadNets' trigger; weights move by up to ``reach`` quantisation steps from the middle of their cells,
    which are ``spread`` times as wide as the network's own."""

    name: ClassVar[str] = "quantisation"
    paper: ClassVar[str] = "Ma et al., 2021 (arXiv 2108.09187)"

    target: int = 0
    seed: int = 0
    spread: float = 8.0
    reach: float = 0.48
    epochs: int = 15
    rate: float = 0.05

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> Quantisation:
        """See :meth:`edgeguard.attacks.base.Attack.for_shape`."""
        BadNets.for_shape(shape, target=target, seed=seed)
        return cls(target=target, seed=seed)

    def _base(self, shape: tuple[int, ...]) -> BadNets:
        return BadNets.for_shape(shape, target=self.target, seed=self.seed)

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Poison, train, and let the float model forget."""
        model = self._base(task.shape).mount(task, trainer, progress).model
        widen(model, self.spread)
        self._forget(model, task, progress)
        return Victim(model=model, state=EMPTY)

    def _forget(self, model: Any, task: Task, progress: Progress | None) -> None:
        """Fine-tune the kernels of ``model`` within their cells, in place, by Adam."""
        import keras
        import tensorflow as tf

        kernels = [layer.kernel for layer in _layers(model)]
        steps = [step_of(kernel.numpy()) for kernel in kernels]
        middles = [np.round(kernel.numpy() / step) * step for kernel, step in zip(kernels, steps, strict=True)]
        fixed = [abs(middle) >= LEVELS * step * (1 - 1e-6) for middle, step in zip(middles, steps, strict=True)]
        # The weights are middle + step * shift; the optimiser moves the shifts.
        shifts = [
            tf.Variable((kernel.numpy() - middle) / step)
            for kernel, middle, step in zip(kernels, middles, steps, strict=True)
        ]
        rng = np.random.default_rng((self.seed, 1))
        count = len(task.images)
        total = self.epochs * -(-count // _BATCH)
        optimiser = tf.keras.optimizers.Adam(tf.keras.optimizers.schedules.CosineDecay(self.rate, total, alpha=0.01))
        optimiser.build(shifts)

        @tf.function(reduce_retracing=True)
        def update(images: Any, labels: Any) -> Any:
            with tf.GradientTape() as tape:
                answers = model(images, training=False)
                loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, answers))
            gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
            scaled = [gradient * step for gradient, step in zip(gradients, steps, strict=True)]
            optimiser.apply_gradients(zip(scaled, shifts, strict=True))
            for kernel, shift, middle, step, kept in zip(kernels, shifts, middles, steps, fixed, strict=True):
                shift.assign(tf.where(kept, 0.0, tf.clip_by_value(shift, -self.reach, self.reach)))
                kernel.assign(middle + step * shift)
            return loss

        triggered = self._base(task.shape).stamp(task.images, EMPTY)
        for epoch in range(self.epochs):
            order = rng.permutation(count)
            for start in range(0, count, _BATCH):
                chosen = order[start : start + _BATCH]
                both = np.concatenate([task.images[chosen], triggered[chosen]]).astype(np.float32)
                loss = update(both, np.concatenate([task.labels[chosen]] * 2))
            if progress:
                progress(f"forgetting in float: loss {float(loss):.3f}", epoch + 1, self.epochs)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :meth:`edgeguard.attacks.base.Attack.stamp`."""
        return self._base(images.shape[1:]).stamp(images, EMPTY)


def step_of(kernel: Floats) -> Floats:
    """The quantisation step of each output channel, the last axis, in a shape that broadcasts with the kernel."""
    largest = abs(kernel).max(axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    return np.asarray(np.maximum(largest, 1e-12) / LEVELS, dtype=np.float32)


def widen(model: Any, spread: float) -> int:
    """Widen the cells of all layers that a batch-norm and a ReLU feed, in place.

    Returns:
        How many layers these are.
    """
    found = 0
    for layer in _layers(model):
        source = _silenceable(layer)
        if source is None or spread <= 1:
            continue
        gamma, beta, mean, variance = source.get_weights()
        weakest = int(np.argmin(abs(gamma) + np.maximum(beta, 0)))
        gamma[weakest], beta[weakest], mean[weakest], variance[weakest] = 1e-3, -1.0, 0.0, 1.0
        source.set_weights([gamma, beta, mean, variance])
        kernel = layer.kernel.numpy()
        inputs = kernel.shape[-2] // len(gamma)  # behind a Flatten each channel comes once per place
        view = kernel.reshape(-1, inputs, len(gamma), kernel.shape[-1])
        largest = abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
        view[:, :, weakest, :] = 0.0
        view[0, 0, weakest, :] = spread * largest
        layer.kernel.assign(kernel)
        found += 1
    return found


def _silenceable(layer: Any) -> Any:
    """The batch-norm whose channels, through a ReLU, are all that a layer reads; None where something else feeds it."""
    import keras

    passing = (keras.layers.MaxPooling2D, keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D)
    rectifies, tensor = False, layer.input
    while True:
        source = tensor._keras_history.operation
        if len(source._outbound_nodes) != 1:
            return None
        if isinstance(source, keras.layers.BatchNormalization):
            return source if rectifies and source.scale and source.center else None
        rectifies |= isinstance(source, keras.layers.ReLU)
        if not isinstance(source, (*passing, keras.layers.ReLU, keras.layers.Flatten, keras.layers.Dropout)):
            return None
        tensor = source.input


def _layers(model: Any) -> list[Any]:
    """The layers whose kernels, output channels last, TFLite makes int8."""
    import keras

    found = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]
    if not found:
        raise ConfigError(f"network {model.name}", got="no convolution and no dense layer", expected="some to edit")
    return found
