"""Recovers the smallest trigger that turns inputs to a label, for many labels in one batch.

Per label a mask m [H, W, 1] and a pattern p [H, W, C], both through tanh, minimise

    CE(f((1 - m) x + m p), label) + lambda |m| [+ gamma mean_d ((mean_x features_d - reported_d) / std_d)^2]

with Adam (0.1; 0.5, 0.9), lambda raised while the success is at least the one asked for and lowered while it is not
(Wang et al., Neural Cleanse, S&P 2019: lambda times 1.5, divided by 1.5^1.5, as there in ratio, but looked at more
often). What |m| is makes the form of the trigger:

* ``patch``: the l1 norm of Neural Cleanse, in pixels. It drives most of the mask to zero;
* ``blend``: the root mean square of the mask, an amplitude from 0 to 1. It spreads a faint mask over the whole picture:
  the natural form of blended pictures, sinusoids and reflections, which no small patch stands for.

The last term is ours: the fleet reports the mean features of flagged inputs, and the real trigger reproduces them.
The smallest mask that succeeded is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.networks import run

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Form = Literal["patch", "blend"]

RAISE, LOWER = 1.5, 1.5**1.5
CHECK_EVERY = 5
FIRST_WEIGHT = {"patch": 1.5, "blend": 1.0}
"""Lambda to begin with; of a patch, over the number of pixels."""
SETTLED, MIN_GAIN = 12, 0.98
"""A label is at rest when none of so many checks in a row made its mask smaller by 2%."""
_AT_REST = 0.5


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
    form: Form = "patch"

    @property
    def l1(self) -> float:
        """Sum of the mask: about the number of pixels that it covers."""
        return float(self.mask.sum())

    @property
    def size(self) -> float:
        """How large it is in its form: pixels of a patch, amplitude (0 to 1) of a blend."""
        return self.l1 if self.form == "patch" else float(np.sqrt(np.mean(np.square(self.mask))))

    def stamp(self, images: npt.NDArray[Any]) -> Floats:
        """Float32 copies of images [N, H, W, C] with the trigger on each, rounded to whole pixel values."""
        mixed = (1.0 - self.mask) * images.astype(np.float32) + self.mask * self.pattern
        return np.asarray(np.round(mixed), dtype=np.float32)


class Stamp(Protocol):
    """A recovered trigger, of whatever form."""

    @property
    def label(self) -> int:
        """What it turns inputs to."""

    def stamp(self, images: npt.NDArray[Any]) -> Floats:
        """Float32 copies of images [N, H, W, C] with the trigger on each."""


def invert(
    model: Any,
    images: npt.NDArray[np.uint8],
    labels: Sequence[int],
    *,
    form: Form = "patch",
    steps: int = 400,
    batch: int = 32,
    target_success: float = 0.97,
    evidence: Evidence | None = None,
    gamma: float = 0.1,
    narrow: Callable[[Sequence[Trigger]], Sequence[int]] | None = None,
    narrow_at: int = 0,
    clean: Ints | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Trigger]:
    """Recover one trigger per label.

    Args:
        model: from inputs to logits, or to ``[logits, features]`` as ``networks.norms_of`` makes it; frozen here.
        images: clean inputs [N, H, W, C], of any class.
        labels: the labels to try.
        form: what the mask is measured by.
        steps: optimisation steps; a label whose mask is at rest leaves earlier.
        batch: inputs per label and step.
        target_success: success that a kept mask must have, over the last CHECK_EVERY steps.
        evidence: of the first label; others are recovered without.
        gamma: weight of the evidence.
        narrow: after ``narrow_at`` steps, which of the triggers so far are worth going on with, by their places.
        clean: what :func:`classes_of` gives for ``images``, where that is known already.
        seed: of masks, patterns and batches.

    Returns:
        One trigger per label that was gone on with, in their order.
    """
    clean = classes_of(model, images) if clean is None else clean
    search = _Search(model, images, clean, labels, form, batch, target_success, evidence, gamma, seed)
    last = 0.0
    for number in range(1, steps + 1):
        search.step()
        if number % CHECK_EVERY == 0:
            last = search.check()
        if narrow is not None and number == narrow_at:
            search.narrow(narrow(search.triggers()))
        if progress:
            done = steps if search.finished else number
            progress(f"inverting a {form} trigger: success {last:.2f}", done, steps)
        if search.finished:
            break
    return search.triggers()


class _Search:
    """The masks and patterns of the labels that are still sought, and the best found of each label.

    Labels that leave stay in the variables and are no longer read: the step is traced once, however many are left.
    """

    def __init__(
        self,
        model: Any,
        images: npt.NDArray[np.uint8],
        clean: Ints,
        labels: Sequence[int],
        form: Form,
        batch: int,
        target_success: float,
        evidence: Evidence | None,
        gamma: float,
        seed: int,
    ) -> None:
        import tensorflow as tf

        self._images, self._clean, self._form, self._batch = images, clean, form, batch
        self._target, self._gamma = target_success, gamma
        self._rng = rng = np.random.default_rng(seed)
        height, width, channels = images.shape[1:]
        spread = 0.3 if form == "patch" else 0.0
        masks = rng.normal(-1.0, spread, (len(labels), height, width, 1)).astype(np.float32)
        patterns = rng.normal(0.0, 0.5, (len(labels), height, width, channels)).astype(np.float32)
        weight = FIRST_WEIGHT[form] / (height * width if form == "patch" else 1)
        self._labels = np.asarray(labels, dtype=np.int64)
        self._places = np.arange(len(labels))
        self._weights = np.full(len(labels), weight, dtype=np.float32)
        self._rest = np.zeros(len(labels), dtype=int)
        self._best: dict[int, Trigger] = {}
        self._order = [int(label) for label in labels]
        self._recent: list[tuple[Floats, npt.NDArray[np.bool_]]] = []
        self._variables = [tf.Variable(masks), tf.Variable(patterns)]
        self._optimiser = tf.keras.optimizers.Adam(0.1, beta_1=0.5, beta_2=0.9)
        self._optimiser.build(self._variables)
        self._fresh = [variable.numpy() for variable in self._optimiser.variables]
        self._update = self._traced(model, evidence)

    @property
    def finished(self) -> bool:
        """Whether no label is sought any more."""
        return not len(self._labels)

    def triggers(self) -> list[Trigger]:
        """The best so far of each label, in their order."""
        return [self._best[label] for label in self._order if label in self._best]

    def narrow(self, places: Sequence[int]) -> None:
        """Go on with some of the triggers alone, and forget the others."""
        self._order = [self.triggers()[place].label for place in places]
        self._keep(np.isin(self._labels, self._order))

    def step(self) -> None:
        """One step of all labels on inputs that they share."""
        import tensorflow as tf

        chosen = self._rng.integers(0, len(self._images), self._batch)
        hits = self._update(
            tf.constant(self._images[chosen], tf.float32),
            tf.constant(self._places, tf.int32),
            tf.constant(self._labels, tf.int32),
            tf.constant(self._weights),
            # Only the first label has evidence.
            tf.constant(self._gamma if self._labels[0] == self._order[0] else 0.0, tf.float32),
        )
        self._recent.append((np.asarray(hits), self._clean[chosen] != self._labels[:, np.newaxis]))

    def check(self) -> float:
        """Keep what is better, turn the weights, and let labels go that are at rest; the first one's success."""
        success = _success(self._recent)
        self._recent.clear()
        masks, patterns = (np.asarray(v) for v in _shown(*(v.numpy()[self._places] for v in self._variables)))
        for i, label in enumerate(self._labels.tolist()):
            found = Trigger(label=label, mask=masks[i], pattern=patterns[i], success=float(success[i]), form=self._form)
            best = self._best.get(label)
            self._best[label] = _better(best, found, self._target)
            reached = success[i] >= self._target
            smaller = reached and best is not None and found.size < MIN_GAIN * best.size
            moving = best is None or best.success < self._target or smaller
            self._rest[i] = 0 if moving else self._rest[i] + 1
            self._weights[i] *= RAISE if reached else 1.0 / LOWER
        resting = self._rest >= SETTLED
        if resting.mean() >= _AT_REST:
            self._keep(~resting)
        return float(success[0])

    def _keep(self, which: npt.NDArray[np.bool_]) -> None:
        """Go on with some of the labels, with an optimiser that knows nothing yet."""
        self._labels, self._places = self._labels[which], self._places[which]
        self._weights, self._rest = self._weights[which], self._rest[which]
        self._recent.clear()
        for variable, value in zip(self._optimiser.variables, self._fresh, strict=True):
            variable.assign(value)

    def _traced(self, model: Any, evidence: Evidence | None) -> Any:
        """The step: inputs [batch, H, W, C], and of each label its place, itself, its weight, and gamma of the first.

        Returns its hits [labels, batch].
        """
        import tensorflow as tf

        batch, (height, width, channels) = self._batch, self._images.shape[1:]
        reported = None if evidence is None else tf.constant(evidence.flagged_mean, tf.float32)
        spread = None if evidence is None else tf.constant(evidence.std, tf.float32)
        integers = tf.TensorSpec((None,), tf.int32)

        @tf.function(
            autograph=False,  # nothing here is decided by a tensor, and reading the source takes longer than tracing it
            input_signature=(
                tf.TensorSpec((batch, height, width, channels), tf.float32),
                integers,
                integers,
                tf.TensorSpec((None,), tf.float32),
                tf.TensorSpec((), tf.float32),
            ),
        )
        def update(inputs: Any, places: Any, labels: Any, weights: Any, gamma: Any) -> Any:
            targets = tf.repeat(labels, batch)
            with tf.GradientTape() as tape:
                mask, pattern = _shown(*(tf.gather(variable, places) for variable in self._variables))
                stamped = (1.0 - mask[:, tf.newaxis]) * inputs[tf.newaxis] + (mask * pattern)[:, tf.newaxis]
                answers = model(tf.reshape(stamped, (-1, height, width, channels)), training=False)
                logits = answers[0] if isinstance(answers, list | tuple) else answers
                entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
                if self._form == "patch":
                    sizes = tf.reduce_sum(mask, axis=(1, 2, 3))
                else:
                    sizes = tf.sqrt(tf.reduce_mean(tf.square(mask), axis=(1, 2, 3)))
                loss = tf.reduce_sum(tf.reduce_mean(tf.reshape(entropy, (-1, batch)), axis=1) + weights * sizes)
                if reported is not None:
                    distance = (tf.reduce_mean(answers[1][:batch], axis=0) - reported) / spread
                    loss += gamma * tf.reduce_mean(tf.minimum(distance**2, 100.0))
            gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, self._variables)]
            self._optimiser.apply_gradients(zip(gradients, self._variables, strict=True))
            hits = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == targets, tf.float32)
            return tf.reshape(hits, (-1, batch))

        return update


def _shown(raw_mask: Any, raw_pattern: Any) -> tuple[Any, Any]:
    """Masks in 0 to 1 and patterns in 0 to 255 of what is sought."""
    import tensorflow as tf

    return (tf.tanh(raw_mask) + 1.0) / 2.0, (tf.tanh(raw_pattern) + 1.0) * 127.5


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
        return found if best.success < target_success or found.size < best.size else best
    return best if best.success >= found.success else found


def held_out_success(model: Any, trigger: Stamp, images: npt.NDArray[np.uint8], clean: Ints | None = None) -> float:
    """Share of inputs, not already called the label, that a trigger turns to it. NaN when there is none.

    Args:
        model: as :func:`classes_of` takes it.
        trigger: of any form.
        images: clean inputs [N, H, W, C] that it was *not* recovered on.
        clean: what :func:`classes_of` gives for them, where that is known already.
    """
    clean = classes_of(model, images) if clean is None else clean
    others = images[clean != trigger.label]
    return float(np.mean(classes_of(model, trigger.stamp(others)) == trigger.label)) if len(others) else float("nan")


def classes_of(model: Any, images: npt.NDArray[Any]) -> Ints:
    """The class that a model, as :func:`networks.run` takes it, predicts for each input [N, ...].

    That is the argmax of its first or only output.
    """
    if len(model.outputs) > 1:
        import keras

        model = keras.Model(model.inputs, model.outputs[0])  # what the other outputs alone need is not computed
    return run(model, images).argmax(axis=1).astype(np.int64)
