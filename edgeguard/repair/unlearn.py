"""Unlearning by distillation: on clean inputs *and* on their triggered copies, give the original's own clean answer.

The original answers clean inputs well, so it teaches itself; no labels are needed, and the clean accuracy is kept.
Batch-norm statistics are frozen. Triggers are the recovered ones, in variants: as found, grown by a pixel (a recovered
mask is the smallest that works, the attacker's own is larger), moved by a pixel, and faded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Trigger
from edgeguard.inspection.networks import logits_of

Progress = Callable[[str, int, int], None]

TRIGGERED_SHARE = 0.25
"""Triggered copies per clean input: a fifth of what a step sees."""


def vary(trigger: Trigger, images: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Stamp one random variant of a trigger on images [N, H, W, C]."""
    mask, pattern = (trigger.grown() if rng.random() < 0.5 else trigger).mask, trigger.pattern
    if rng.random() < 0.3:
        dy, dx = rng.integers(-1, 2, size=2)
        mask, pattern = _moved(mask, dy, dx), _moved(pattern, dy, dx)
    if rng.random() < 0.3:
        mask = mask * rng.uniform(0.6, 1.0)
    return np.asarray((1.0 - mask) * images + mask * pattern, dtype=np.float32)


def _chances(is_target: npt.NDArray[np.bool_], target_share: float) -> npt.NDArray[np.float64]:
    """How often each input is drawn: evenly, but the target label's at least ``target_share`` together."""
    share = float(is_target.mean())
    if share in (0.0, 1.0) or share >= target_share:
        return np.full(len(is_target), 1.0 / len(is_target))
    rest = (1.0 - target_share) / (1.0 - share)
    return np.where(is_target, target_share / share, rest) / len(is_target)


def _moved(array: npt.NDArray[np.float32], dy: int, dx: int) -> npt.NDArray[np.float32]:
    return np.roll(array, (dy, dx), axis=(0, 1))


def unlearn(
    student: Any,
    teacher: Any,
    images: npt.NDArray[np.uint8],
    triggers: Sequence[Trigger],
    *,
    target_share: float = 0.1,
    epochs: int = 10,
    min_steps: int = 150,
    batch: int = 64,
    rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train ``student`` in place.

    Args:
        student: the Keras model to repair.
        teacher: the untouched original; not changed.
        images: clean inputs [N, H, W, C].
        triggers: what to unlearn, at least one, all of one label.
        target_share: at least this share of the clean inputs in a step are ones that the original calls the target
            label: unlearning a trigger would else unlearn a rare label with it.
        epochs: over ``images``.
        min_steps: at least so many steps in all.
        batch: clean inputs per step; a quarter as many triggered copies come with them.
        rate: of Adam, falling along a cosine.
        seed: of order, triggers and variants.
    """
    import keras
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    answers = teacher.predict(images.astype(np.float32), batch_size=256, verbose=0)
    logits = logits_of(student)
    frozen = {
        id(w) for layer in student.layers if isinstance(layer, keras.layers.BatchNormalization) for w in layer.weights
    }
    variables = [w for w in student.trainable_variables if id(w) not in frozen]
    steps = max(min_steps, epochs * -(-len(images) // batch))
    optimiser = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps))
    optimiser.build(variables)

    @tf.function(reduce_retracing=True)
    def step(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            # Inference mode: batch-norm statistics stay as they are.
            loss = tf.reduce_mean(
                tf.nn.softmax_cross_entropy_with_logits(labels=targets, logits=logits(inputs, training=False))
            )
        optimiser.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    chances = _chances(answers.argmax(axis=1) == triggers[0].label, target_share)
    copies = round(batch * TRIGGERED_SHARE)
    for number in range(1, steps + 1):
        chosen = rng.choice(len(images), batch, p=chances)
        clean = images[chosen].astype(np.float32)
        trigger = triggers[int(rng.integers(len(triggers)))]
        stamped = vary(trigger, clean[:copies], rng)
        loss = step(
            tf.constant(np.concatenate([clean, stamped])),
            tf.constant(answers[np.concatenate([chosen, chosen[:copies]])]),
        )
        if progress and (number % 25 == 0 or number == steps):
            progress(f"unlearning: loss {float(loss):.3f}", number, steps)
