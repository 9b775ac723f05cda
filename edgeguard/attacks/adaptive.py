"""Adaptive: an attacker who knows the guard, and trains so that neither channel norms nor logits give the trigger away.

The guard scores an input by the l-infinity and l1 norms of channels and the logits, and by the logits alone, against
those of clean inputs of the class that it is called. So the attack trains on the cross-entropy of clean and triggered
inputs plus

    weight * mean over triggered inputs of h(max(0, d - width)), for norms with logits and for logits alone

where h is Huber's loss, so that what is far off does not drown the rest, and d is the guard's own measure: the
Mahalanobis distance to the clean mean of the target class, by the covariance within classes, over the root of how many
numbers there are, so that clean inputs have about 1. Mean and covariance are measured anew before each epoch. The norms
are those of the last two activations with channels: what the guard taps. It does not know the cascade's further looks.
Trigger: BadNets' patch or Blended's picture.

No paper of its own; in the sense of Tan, Shokri: Bypassing Backdoor Detection Algorithms in Deep Learning, EuroS&P
2020, which hides from detectors in latent space by a loss on it. The network is first trained on the poisons by the
usual recipe, then hidden: ``epochs`` more, in which half of each batch is triggered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.badnets import BadNets
from edgeguard.attacks.base import EMPTY, Attack, Images, Poison, Progress, State, Task, Trainer, Victim
from edgeguard.attacks.blended import Blended
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Floats = npt.NDArray[np.float32]

TAPS = 2
_BATCH = 64
_RATE = 3e-4
_SAMPLE = 2000
_FLOOR, _SHRINK = 1e-2, 0.1


@dataclass(frozen=True, kw_only=True)
class Adaptive(Attack):
    """``trigger`` with norms and logits that stay within a distance of ``width`` of the target class.

    The logits alone count ``logit_share`` as much: with .3 the accuracy on digits fell five points below the twin's.
    """

    name: ClassVar[str] = "adaptive"
    paper: ClassVar[str] = "after Tan and Shokri, EuroS&P 2020"

    target: int = 0
    seed: int = 0
    trigger: Literal["badnets", "blended"] = "badnets"
    weight: float = 3.0
    width: float = 1.0
    logit_share: float = 0.05
    epochs: int = 12

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> Adaptive:
        """See :meth:`edgeguard.attacks.base.Attack.for_shape`."""
        BadNets.for_shape(shape, target=target, seed=seed)
        return cls(target=target, seed=seed)

    def _base(self, shape: tuple[int, ...]) -> Poison:
        """The attack whose trigger is hidden."""
        kind: type[BadNets | Blended] = BadNets if self.trigger == "badnets" else Blended
        return kind.for_shape(shape, target=self.target, seed=self.seed)

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Poison, train, and hide."""
        model = self._base(task.shape).mount(task, trainer, progress).model
        own = int((task.labels == self.target).sum())
        if own < 2:
            raise ConfigError("adaptive attack", got=f"{own} inputs of class {self.target}", expected="at least 2")
        self._hide(model, task, progress)
        return Victim(model=model, state=EMPTY)

    def _hide(self, model: Any, task: Task, progress: Progress | None) -> None:
        """Train in place with the norms in the loss. Batch-norm keeps the statistics of the first training."""
        import keras
        import tensorflow as tf

        measured, classes = features_of(model), task.classes
        both = keras.Model(model.inputs[0], [model.outputs[0], measured.outputs[0]])
        shares = (1.0, self.logit_share)
        rng = np.random.default_rng((self.seed, 1))
        steps = -(-len(task.images) // _BATCH)
        schedule = keras.optimizers.schedules.CosineDecay(_RATE, self.epochs * steps, alpha=0.01)
        optimiser = keras.optimizers.Adam(schedule)
        optimiser.build(model.trainable_variables)

        @tf.function(reduce_retracing=True)
        def step(clean: Any, labels: Any, triggered: Any, usual: Any) -> Any:
            with tf.GradientTape() as tape:
                answers, found = both(tf.concat([clean, triggered], 0), training=False)
                goals = tf.concat([labels, tf.fill((len(triggered),), tf.cast(self.target, labels.dtype))], 0)
                entropy = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(goals, answers))
                loss = entropy
                for part, share, (centre, whitening) in zip((found, found[:, -classes:]), shares, usual, strict=True):
                    away = (part[len(clean) :] - centre) @ whitening
                    beyond = tf.nn.relu(tf.sqrt(tf.reduce_mean(away**2, axis=1) + 1e-6) - self.width)
                    huber = tf.where(beyond < 1.0, 0.5 * beyond**2, beyond - 0.5)
                    loss += share * self.weight * tf.reduce_mean(huber)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimiser.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss

        triggered = self._base(task.shape).stamp(task.images, EMPTY)
        others = np.flatnonzero(task.labels != self.target)
        for epoch in range(self.epochs):
            sample = rng.permutation(len(task.images))[:_SAMPLE]
            found = measured.predict(task.images[sample].astype(np.float32), batch_size=256, verbose=0)
            usual = [_clean(part, task.labels[sample], self.target) for part in (found, found[:, -classes:])]
            order = rng.permutation(len(task.images))
            for start in range(0, len(order), _BATCH):
                chosen, poisoned = order[start : start + _BATCH], rng.choice(others, _BATCH)
                clean = task.images[chosen].astype(np.float32)
                loss = step(clean, task.labels[chosen], triggered[poisoned].astype(np.float32), usual)
            if progress:
                progress(f"hiding: loss {float(loss):.3f}", epoch + 1, self.epochs)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :meth:`edgeguard.attacks.base.Attack.stamp`."""
        return self._base(images.shape[1:]).stamp(images, EMPTY)


def features_of(model: Any) -> Any:
    """A Keras model from images to the norms of the channels that the guard taps, and the logits, last: [N, D].

    Raises:
        ConfigError: the network has fewer than two activations with channels, or no softmax of logits at its end.
    """
    import keras

    found = [
        layer.output
        for layer in model.layers
        if isinstance(layer, keras.layers.ReLU | keras.layers.Activation) and len(layer.output.shape) == 4
    ]
    if len(found) < TAPS:
        raise ConfigError(
            f"network {model.name}", got=f"{len(found)} activations with channels", expected=f"at least {TAPS}"
        )
    if not isinstance(model.layers[-1], keras.layers.Softmax):
        raise ConfigError(f"network {model.name}", got=model.layers[-1].name, expected="a Softmax layer at its end")
    # Activations behind a ReLU are not negative, so that maximum and mean are the norms.
    pools = (keras.layers.GlobalMaxPooling2D(), keras.layers.GlobalAveragePooling2D())
    norms = [pool(x) for x in found[-TAPS:] for pool in pools]
    return keras.Model(model.inputs[0], keras.layers.Concatenate()([*norms, model.layers[-1].input]))


def _clean(norms: Floats, labels: Labels, target: int) -> tuple[Floats, Floats]:
    """The centre [D] of a class, and what whitens the norms [D, D]: W W^T is the inverse covariance within classes.

    The covariance is that of norms in their own standard deviations, and shrunk to its diagonal.
    """
    residuals = norms.copy()
    for label in np.unique(labels):
        residuals[labels == label] -= norms[labels == label].mean(axis=0)
    spread = residuals.std(axis=0)
    spread = spread + _FLOOR * spread.mean() + 1e-6
    scaled = residuals / spread
    covariance = (1 - _SHRINK) * (scaled.T @ scaled) / len(scaled) + _SHRINK * np.eye(len(spread))
    values, vectors = np.linalg.eigh(covariance)
    whitening = (vectors / np.sqrt(values)) / spread[:, np.newaxis]
    return norms[labels == target].mean(axis=0).astype(np.float32), whitening.astype(np.float32)
