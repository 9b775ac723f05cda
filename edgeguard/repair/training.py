"""Gradient steps for the methods that train: batch-norm statistics and parameters frozen, a cosine, small steps.

Rules enforced here:

* the original teaches: its logits on clean inputs are what the student shall give, on these and on their triggered
  copies, relative to their mean, which softmax does not see. Logits say more of an input than its class;
* what is drawn follows from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Stamp
from edgeguard.inspection.networks import logits_of, run
from edgeguard.repair.methods.base import Progress

Floats = npt.NDArray[np.float32]

BATCH = 48
TRIGGERED_SHARE = 0.33
"""Triggered copies for each clean input."""
CROSS_ENTROPY = 0.3
FAINTEST = 0.7
"""A trigger that is faded so far shall do nothing either."""
TARGET_SHARE = 0.15


def teachings(teacher: Any, images: npt.NDArray[np.uint8]) -> Floats:
    """The original's logits [N, K] on clean inputs, each less its mean."""
    logits = run(logits_of(teacher), images)
    return np.asarray(logits - logits.mean(axis=1, keepdims=True), dtype=np.float32)


def distil(
    student: Any,
    images: npt.NDArray[np.uint8],
    taught: Floats,
    triggers: Sequence[Stamp] = (),
    *,
    steps: int,
    rate: float,
    seed: int,
    note: str,
    target_share: float = TARGET_SHARE,
    progress: Progress | None = None,
) -> None:
    """Train ``student`` in place to give clean inputs, and their triggered copies, the original's clean answers.

    Args:
        student: a Keras model.
        images: clean inputs [N, H, W, C].
        taught: what :func:`teachings` gave for them.
        triggers: to be unlearnt; with none only the clean answers are taught.
        steps: of ``BATCH`` clean inputs and a third as many triggered copies.
        rate: of Adam, falling along a cosine.
        seed: of everything that is drawn.
        note: what progress is called.
        target_share: at least this share of the clean inputs are ones that the original calls the triggers' label: who
            unlearns a trigger would else unlearn a rare label with it.
        progress: called now and then.
    """
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    scale = float(np.mean(taught**2))

    def loss_of(logits: Any, wanted: Any) -> Any:
        centred = logits - tf.reduce_mean(logits, axis=1, keepdims=True)
        entropy = tf.nn.softmax_cross_entropy_with_logits(labels=tf.nn.softmax(wanted), logits=logits)
        return tf.reduce_mean((centred - wanted) ** 2) / scale + CROSS_ENTROPY * tf.reduce_mean(entropy)

    label = triggers[0].label if triggers else -1
    chances = _chances(taught.argmax(axis=1) == label, target_share)
    victims = np.flatnonzero(taught.argmax(axis=1) != label)
    copies = round(BATCH * TRIGGERED_SHARE) if triggers and len(victims) else 0
    stamped = [trigger.stamp(images[victims]) for trigger in triggers]

    def draw() -> tuple[Floats, Floats]:
        chosen = rng.choice(len(images), BATCH, p=chances)
        clean = images[chosen].astype(np.float32)
        if not copies:
            return clean, taught[chosen]
        of, which = rng.integers(len(victims), size=copies), rng.integers(len(stamped), size=copies)
        plain = images[victims[of]].astype(np.float32)
        strength = rng.uniform(FAINTEST, 1.0, (copies, 1, 1, 1)).astype(np.float32)
        faded = plain + strength * (np.stack([stamped[w][o] for w, o in zip(which, of, strict=True)]) - plain)
        return np.concatenate([clean, faded]), taught[np.concatenate([chosen, victims[of]])]

    descend(student, draw, loss_of, steps=steps, rate=rate, note=note, progress=progress)


def descend(
    student: Any,
    draw: Callable[[], tuple[Floats, Any]],
    loss_of: Callable[[Any, Any], Any],
    *,
    steps: int,
    rate: float,
    note: str,
    progress: Progress | None = None,
) -> None:
    """Adam on all but batch-norm layers; ``loss_of`` takes logits and what ``draw`` gave beside the inputs."""
    import keras
    import tensorflow as tf

    logits = logits_of(student)
    frozen = {
        id(w) for layer in student.layers if isinstance(layer, keras.layers.BatchNormalization) for w in layer.weights
    }
    # The model of logits may have a copy of the last layer: its weights, not the student's, are what is trained.
    variables = [w for w in logits.trainable_variables if id(w) not in frozen]
    optimiser = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps), global_clipnorm=5.0)
    optimiser.build(variables)

    @tf.function(autograph=False, reduce_retracing=True)
    def step(inputs: Any, wanted: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(logits(inputs, training=False), wanted)
        optimiser.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    for number in range(1, steps + 1):
        inputs, wanted = draw()
        loss = step(tf.constant(inputs), tf.constant(wanted))
        if progress and (number % 25 == 0 or number == steps):
            progress(f"{note}: loss {float(loss):.3f}", number, steps)
    _take_back(student, logits)


def _take_back(student: Any, logits: Any) -> None:
    """Bring what was learnt by a copied last layer back into the student."""
    last = student.layers[-1]
    if last.weights and logits.layers[-1] is not last:
        last.set_weights(logits.layers[-1].get_weights())


def _chances(is_target: npt.NDArray[np.bool_], target_share: float) -> npt.NDArray[np.float64]:
    """How often each input is drawn: evenly, but the target label's at least ``target_share`` together."""
    share = float(is_target.mean())
    if share in (0.0, 1.0) or share >= target_share:
        return np.full(len(is_target), 1.0 / len(is_target))
    rest = (1.0 - target_share) / (1.0 - share)
    return np.where(is_target, target_share / share, rest) / len(is_target)
