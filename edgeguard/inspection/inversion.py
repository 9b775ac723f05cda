"""Recovers the smallest trigger that turns inputs to a label, for several labels in one batch.

Per label a mask m [H, W, 1] and a pattern p [H, W, C], both through tanh, minimise

    CE(f((1 - m) x + m p), label) + lambda |m|_1 [+ gamma mean_d ((mean_x features_d - reported_d) / std_d)^2]

with Adam (0.1; 0.5, 0.9), lambda raised while the success is at least the one asked for and lowered while it is not
(Wang et al., Neural Cleanse, S&P 2019, after the official code: initial lambda 1e-3, times 2, divided by 2^1.5). The
last term is ours: the fleet reports the mean features of flagged inputs, and the real trigger reproduces them.
The smallest mask that succeeded is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float32]

PATIENCE = 5
RAISE, LOWER = 2.0, 2.0**1.5
CHECK_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What devices reported of flagged inputs: mean features [D], and the spread [D] to measure a distance in."""

    flagged_mean: Floats
    std: Floats


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A recovered trigger. ``mask`` [H, W, 1] in 0 to 1, ``pattern`` [H, W, C] in 0 to 255.

    ``success`` is the share of the inputs it was recovered on that it turns to ``label``, of those that the model does
    not call so anyway.
    """

    label: int
    mask: Floats
    pattern: Floats
    success: float

    @property
    def l1(self) -> float:
        """Sum of the mask: about the number of pixels that it covers."""
        return float(self.mask.sum())

    def grown(self) -> Trigger:
        """The same with a mask grown by a pixel: a recovered mask is the smallest that works, the real one larger."""
        height, width = self.mask.shape[:2]
        padded = np.pad(self.mask, ((1, 1), (1, 1), (0, 0)))
        mask = np.max([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
        return replace(self, mask=np.asarray(mask, dtype=np.float32))

    def stamp(self, images: npt.NDArray[Any]) -> Floats:
        """Float32 copies of images [N, H, W, C] with the trigger on each, rounded to whole pixel values."""
        mixed = (1.0 - self.mask) * images.astype(np.float32) + self.mask * self.pattern
        return np.asarray(np.round(mixed), dtype=np.float32)


def invert(
    model: Any,
    images: npt.NDArray[np.uint8],
    labels: Sequence[int],
    *,
    steps: int = 400,
    batch: int = 32,
    target_success: float = 0.97,
    evidence: Evidence | None = None,
    gamma: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Trigger]:
    """Recover one trigger per label.

    Args:
        model: from inputs to ``[logits, features]``, as ``networks.norms_of`` makes it; frozen here.
        images: clean inputs [N, H, W, C], of any class.
        labels: the labels to try.
        steps: optimisation steps.
        batch: inputs per label and step.
        target_success: success that a kept mask must have, over the last CHECK_EVERY steps.
        evidence: of the first label; others are recovered without.
        gamma: weight of the evidence.
        seed: of masks, patterns and batches.

    Returns:
        One trigger per label, in their order.
    """
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    before = classes_of(model, images)
    count, height, width, channels = len(labels), *images.shape[1:]
    raw_mask = tf.Variable(rng.normal(-1.0, 0.3, (count, height, width, 1)).astype(np.float32))
    raw_pattern = tf.Variable(rng.normal(0.0, 0.5, (count, height, width, channels)).astype(np.float32))
    optimiser = tf.keras.optimizers.Adam(0.1, beta_1=0.5, beta_2=0.9)
    optimiser.build([raw_mask, raw_pattern])
    targets = tf.repeat(tf.constant(list(labels), tf.int32), batch)
    # Only the first label has evidence; the others' part of the distance is weighted with zero.
    reported = tf.constant(evidence.flagged_mean if evidence else [0.0], tf.float32)
    spread = tf.constant(evidence.std if evidence else [1.0], tf.float32)

    @tf.function(jit_compile=False)
    def step(inputs: Any, weights: Any) -> Any:
        with tf.GradientTape() as tape:
            mask = (tf.tanh(raw_mask) + 1.0) / 2.0
            pattern = (tf.tanh(raw_pattern) + 1.0) * 127.5
            stamped = (1.0 - mask[:, tf.newaxis]) * inputs[tf.newaxis] + (mask * pattern)[:, tf.newaxis]
            logits, features = model(tf.reshape(stamped, (count * batch, height, width, channels)), training=False)
            entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
            sizes = tf.reduce_sum(mask, axis=(1, 2, 3))
            loss = tf.reduce_sum(tf.reduce_mean(tf.reshape(entropy, (count, batch)), axis=1) + weights * sizes)
            if evidence is not None:
                distance = (tf.reduce_mean(features[:batch], axis=0) - reported) / spread
                loss += gamma * tf.reduce_mean(tf.minimum(distance**2, 100.0))
        gradients = tape.gradient(loss, [raw_mask, raw_pattern])
        optimiser.apply_gradients(zip(gradients, [raw_mask, raw_pattern], strict=True))
        hits = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == targets, tf.float32)
        return tf.reshape(hits, (count, batch)), mask, pattern

    weights = np.full(count, 1e-3, dtype=np.float32)
    ups, downs = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    recent: list[tuple[Floats, npt.NDArray[np.bool_]]] = []
    best: list[Trigger | None] = [None] * count
    for number in range(1, steps + 1):
        chosen = rng.integers(0, len(images), batch)
        hits, mask, pattern = step(tf.constant(images[chosen], tf.float32), tf.constant(weights))
        recent.append((np.asarray(hits), before[chosen] != np.asarray(labels)[:, np.newaxis]))
        if number % CHECK_EVERY:
            continue
        success = _success(recent)
        recent.clear()
        for i, label in enumerate(labels):
            found = Trigger(
                label=int(label),
                mask=np.asarray(mask[i]),
                pattern=np.asarray(pattern[i]),
                success=float(success[i]),
            )
            best[i] = _better(best[i], found, target_success)
            reached = success[i] >= target_success
            ups[i], downs[i] = (ups[i] + 1, 0) if reached else (0, downs[i] + 1)
            if ups[i] >= PATIENCE // 2:
                weights[i], ups[i] = weights[i] * RAISE, 0
            elif downs[i] >= PATIENCE // 2:
                weights[i], downs[i] = weights[i] / LOWER, 0
        if progress:
            progress(f"inverting a trigger: success {success[0]:.2f}", number, steps)
    return [trigger for trigger in best if trigger is not None]


def _success(recent: Sequence[tuple[Floats, npt.NDArray[np.bool_]]]) -> Floats:
    """Per label, the share of hits [count, batch] among the inputs that count. Nothing counted is no success."""
    hit = np.sum([(hits * counts).sum(axis=1) for hits, counts in recent], axis=0)
    counted = np.sum([counts.sum(axis=1) for _, counts in recent], axis=0)
    return np.asarray(hit / np.maximum(counted, 1), dtype=np.float32)


def _better(best: Trigger | None, found: Trigger, target_success: float) -> Trigger:
    """The smaller of those that succeed; while none does, the more successful."""
    if best is None:
        return found
    if found.success >= target_success:
        return found if best.success < target_success or found.l1 < best.l1 else best
    return best if best.success >= found.success else found


def held_out_success(model: Any, trigger: Trigger, images: npt.NDArray[np.uint8], *, batch: int = 256) -> float:
    """Share of inputs, not already called the label, that the trigger turns to it. NaN when there is none.

    Args:
        model: a Keras model whose first or only output's argmax is the class.
        trigger: the trigger.
        images: clean inputs that it was *not* recovered on.
        batch: inputs per step.
    """
    before = classes_of(model, images, batch=batch)
    after = classes_of(model, trigger.stamp(images), batch=batch)
    others = before != trigger.label
    return float(np.mean(after[others] == trigger.label)) if others.any() else float("nan")


def classes_of(model: Any, images: npt.NDArray[Any], *, batch: int = 256) -> npt.NDArray[np.int64]:
    """The class that a Keras model predicts for each input [N, ...]."""
    answers = model.predict(images.astype(np.float32), batch_size=batch, verbose=0)
    first = answers[0] if isinstance(answers, list) else answers
    return np.asarray(first).argmax(axis=1)
