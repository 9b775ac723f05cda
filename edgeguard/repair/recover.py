"""Recovers triggers of three forms from a model, clean inputs, and what devices reported of triggered ones.

A mask with a pattern says nothing of a picture that is blended in, a signal that is added, or a warp. So three forms
are sought, each with the fewest numbers that can hold such triggers:

* ``patch``: ``(1 - m) x + m p``, a mask ``m`` [H, W, 1] in 0 to 1 and a pattern ``p`` [H, W, C];
* ``overlay``: ``(1 - a) x + b``, one fade ``a`` and a picture ``b`` [H, W, C]: blends, signals, reflections;
* ``warp``: each pixel is taken from where a smooth field [2, G, G] points.

All minimise the cross-entropy to the label, plus a size (the mask's sum, the mean change, the mean displacement) whose
weight rises while the trigger works and falls while it does not (Wang et al., Neural Cleanse, S&P 2019), plus the
distance of the mean features to those that devices reported of flagged inputs. With quarantined inputs the mean and the
spread of every pixel are held against theirs too: what a blend fades and a patch covers varies less.

Rules enforced here:

* the model is never trained here; all randomness follows from the seed;
* a trigger is judged by inputs that it was not recovered on: see ``inversion.held_out_success``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Progress, classes_of, held_out_success
from edgeguard.inspection.networks import Traced, logits_of, run

Floats = npt.NDArray[np.float32]
Form = Literal["patch", "overlay", "warp"]
FORMS: tuple[Form, ...] = ("patch", "overlay", "warp")

CHECK_EVERY = 10
RAISE, LOWER = 1.5, 2.0
GRID = 5
MAX_FADE = 0.6
MAX_SHIFT = 4.0
"""Pixels that a warp may move one."""
MIN_SUCCESS = 0.85
WORSE = 1.5
"""A form whose features lie that much further from the reported ones than the best form's is another trigger."""
_HELD_OUT = 300
_LEAST_VARIANCE = 0.01
_SIZE_WEIGHT: Mapping[Form, float] = MappingProxyType({"patch": 1e-3, "overlay": 1e-2, "warp": 1e-2})
_RATE: Mapping[Form, float] = MappingProxyType({"patch": 0.1, "overlay": 0.05, "warp": 0.05})


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What is known of triggered inputs. ``flagged_mean`` and ``std`` [D] are of the norms alone, without logits.

    ``quarantined`` [M, H, W, C] are inputs that owners shared, none where there are none.
    """

    flagged_mean: Floats
    std: Floats
    quarantined: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """A recovered trigger. ``parts``: what its form needs. ``success`` on the inputs it was recovered on."""

    label: int
    form: Form
    parts: tuple[Floats, ...]
    success: float

    @property
    def size(self) -> float:
        """Pixels covered; mean change in grey levels; mean displacement in pixels."""
        if self.form == "patch":
            return float(self.parts[0].sum())
        if self.form == "overlay":
            return float(np.abs(self.parts[1]).mean() + 127.5 * self.parts[0].mean())
        return float(np.abs(self.parts[0]).mean())

    def stamp(self, images: npt.NDArray[Any]) -> Floats:
        """Float32 copies of images [N, H, W, C] with the trigger on each, in whole numbers 0 to 255."""
        import tensorflow as tf

        x = tf.constant(images.astype(np.float32))
        parts = [tf.constant(part) for part in self.parts]
        return np.asarray(np.round(np.clip(_APPLY[self.form](parts, x).numpy(), 0, 255)), dtype=np.float32)


def _patch(parts: Any, x: Any) -> Any:
    mask, pattern = parts
    return (1.0 - mask) * x + mask * pattern


def _overlay(parts: Any, x: Any) -> Any:
    import tensorflow as tf

    fade, picture = parts
    return tf.clip_by_value((1.0 - fade) * x + picture, 0.0, 255.0)


def _warp(parts: Any, x: Any) -> Any:
    """Bilinear samples at positions moved by a field that is upsampled bicubically."""
    import tensorflow as tf

    height, width = x.shape[1], x.shape[2]
    field = tf.image.resize(tf.transpose(parts[0], (1, 2, 0))[tf.newaxis], (height, width), method="bicubic")[0]
    rows = tf.clip_by_value(tf.range(height, dtype=tf.float32)[:, tf.newaxis] + field[..., 0], 0.0, height - 1.0)
    columns = tf.clip_by_value(tf.range(width, dtype=tf.float32)[tf.newaxis] + field[..., 1], 0.0, width - 1.0)
    top, left = tf.floor(rows), tf.floor(columns)
    flat = tf.reshape(x, (tf.shape(x)[0], height * width, x.shape[3]))

    def at(row: Any, column: Any) -> Any:
        row = tf.clip_by_value(tf.cast(row, tf.int32), 0, height - 1)
        column = tf.clip_by_value(tf.cast(column, tf.int32), 0, width - 1)
        return tf.gather(flat, row * width + column, axis=1)

    down, along = (rows - top)[..., tf.newaxis], (columns - left)[..., tf.newaxis]
    upper = (1 - along) * at(top, left) + along * at(top, left + 1)
    lower = (1 - along) * at(top + 1, left) + along * at(top + 1, left + 1)
    return (1 - down) * upper + down * lower


_APPLY: Mapping[Form, Callable[[Any, Any], Any]] = MappingProxyType(
    {"patch": _patch, "overlay": _overlay, "warp": _warp}
)


def _begin(form: Form, shape: tuple[int, ...], rng: np.random.Generator) -> list[Floats]:
    """Where the search begins: raw numbers, before tanh or sigmoid."""
    height, width, channels = shape
    if form == "patch":
        return [
            rng.normal(-1.0, 0.3, (height, width, 1)).astype(np.float32),
            rng.normal(0.0, 0.5, (height, width, channels)).astype(np.float32),
        ]
    if form == "overlay":
        return [
            np.full((1, 1, 1), -2.0, np.float32),
            rng.normal(0.0, 0.02, (height, width, channels)).astype(np.float32),
        ]
    return [rng.normal(0.0, 0.1, (2, GRID, GRID)).astype(np.float32)]


def _parts(form: Form, raw: Any) -> list[Any]:
    import tensorflow as tf

    if form == "patch":
        return [(tf.tanh(raw[0]) + 1.0) / 2.0, (tf.tanh(raw[1]) + 1.0) * 127.5]
    if form == "overlay":
        return [MAX_FADE * tf.sigmoid(raw[0]), 255.0 * tf.tanh(raw[1])]
    return [MAX_SHIFT * tf.tanh(raw[0])]


def _size(form: Form, parts: Any, x: Any, stamped: Any) -> Any:
    import tensorflow as tf

    if form == "patch":
        return tf.reduce_sum(parts[0])
    if form == "overlay":
        return tf.reduce_mean(tf.abs(stamped - x))
    return tf.reduce_mean(tf.abs(parts[0]))


class Search:
    """The search for a trigger of one form in one model: traced once, however often it is run.

    Args:
        model: from inputs to ``[logits, norms]``, as ``inspection.networks.norms_of`` makes it.
        label: the label that the trigger shall turn inputs to.
        form: of the trigger.
        reported: what is known of triggered inputs.
        gamma: weight of that.
    """

    def __init__(
        self, model: Any, label: int, form: Form, *, reported: Reported | None = None, gamma: float = 1.0
    ) -> None:
        import tensorflow as tf

        self._label, self._form, self._guided = label, form, reported is not None
        self._shape = tuple(model.inputs[0].shape[1:])
        self._raw = [tf.Variable(part) for part in _begin(form, self._shape, np.random.default_rng(0))]
        self._optimiser = tf.keras.optimizers.Adam(_RATE[form], beta_1=0.5, beta_2=0.9)
        self._optimiser.build(self._raw)
        self._fresh = [variable.numpy() for variable in self._optimiser.variables]
        self._step = self._traced(model, reported, gamma)

    def run(
        self,
        pool: npt.NDArray[np.uint8],
        *,
        steps: int = 300,
        batch: int = 48,
        target_success: float = 0.97,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Recovered:
        """Recover one trigger.

        Args:
            pool: clean inputs [N, H, W, C] that the trigger shall turn.
            steps: of the search.
            batch: inputs a step.
            target_success: the success above which a smaller trigger is better.
            seed: of the start and the batches.
            progress: called now and then.
        """
        import tensorflow as tf

        form = self._form
        rng = np.random.default_rng([seed, FORMS.index(form)])
        for variable, value in zip(self._raw, _begin(form, self._shape, rng), strict=True):
            variable.assign(value)
        for variable, value in zip(self._optimiser.variables, self._fresh, strict=True):
            variable.assign(value)
        weight = np.float32(_SIZE_WEIGHT[form])
        best: Recovered | None = None
        hits: list[float] = []
        for number in range(1, steps + 1):
            chosen = pool[rng.integers(0, len(pool), batch)]
            hit, parts = self._step(tf.constant(chosen, tf.float32), tf.constant(weight))
            hits.append(float(hit))
            if number % CHECK_EVERY:
                continue
            success = float(np.mean(hits))
            hits.clear()
            found = Recovered(label=self._label, form=form, parts=tuple(p.numpy() for p in parts), success=success)
            best = _better(best, found, target_success, guided=self._guided)
            weight = np.float32(weight * RAISE if success >= target_success else weight / LOWER)
            if self._guided:
                weight = min(weight, np.float32(_SIZE_WEIGHT[form]))
            if progress:
                progress(f"seeking a trigger ({form}): success {success:.2f}", number, steps)
        assert best is not None
        return best

    def _traced(self, model: Any, reported: Reported | None, gamma: float) -> Any:
        """The step: inputs [batch, H, W, C] and the weight of the size; the share of hits, and the parts tried."""
        import tensorflow as tf

        form, label = self._form, self._label
        mean = None if reported is None else tf.constant(reported.flagged_mean, tf.float32)
        spread = None if reported is None else tf.constant(reported.std, tf.float32)
        shared = None if reported is None or reported.quarantined is None else reported.quarantined.astype(np.float32)
        seen = None if shared is None else (tf.constant(shared.mean(axis=0)), tf.constant(shared.std(axis=0)))

        @tf.function(autograph=False, reduce_retracing=True)
        def step(x: Any, weight: Any) -> Any:
            with tf.GradientTape() as tape:
                parts = _parts(form, self._raw)
                stamped = _APPLY[form](parts, x)
                logits, norms = model(stamped, training=False)
                targets = tf.fill((tf.shape(x)[0],), label)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))
                loss += weight * _size(form, parts, x, stamped)
                if mean is not None:
                    far = (tf.reduce_mean(norms, axis=0) - mean) / spread
                    loss += gamma * tf.reduce_mean(tf.sqrt(1.0 + far**2) - 1.0)
                if seen is not None:
                    # Of a pixel that never changes a deviation has no gradient but NaN.
                    deviation = tf.sqrt(tf.math.reduce_variance(stamped, axis=0) + _LEAST_VARIANCE)
                    off = tf.reduce_mean(stamped, axis=0) - seen[0], deviation - seen[1]
                    loss += gamma * (tf.reduce_mean(off[0] ** 2) + tf.reduce_mean(off[1] ** 2)) / 400.0
            self._optimiser.apply_gradients(zip(tape.gradient(loss, self._raw), self._raw, strict=True))
            hits = tf.reduce_mean(tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == label, tf.float32))
            return hits, parts

        return step


def _better(best: Recovered | None, found: Recovered, target: float, *, guided: bool) -> Recovered:
    """The smaller of those that work, or the later where reports say what it looks like; else the more successful."""
    if best is None:
        return found
    if found.success >= target:
        return found if best.success < target or guided or found.size < best.size else best
    return best if best.success >= found.success else found


def distance(norms: Any, trigger: Recovered, images: npt.NDArray[np.uint8], reported: Reported) -> float:
    """How far the mean features with the trigger lie from the reported ones, in clean standard deviations a channel."""
    found = run(norms, trigger.stamp(images[:_HELD_OUT]), 1).mean(axis=0)
    counted = np.isfinite(reported.std)
    return float(np.mean(np.abs(found - reported.flagged_mean)[counted] / reported.std[counted]))


class Hunt:
    """Searches in one model that does not change meanwhile; what they have in common is made once.

    Args:
        model: from inputs to ``[logits, norms]``, as ``inspection.networks.norms_of`` makes it.
        images: clean inputs to recover on.
        held_out: others, to judge by.
        label: the label that devices reported.
        reported: what they reported.
        gamma: weight of what was reported.
    """

    def __init__(
        self,
        model: Any,
        images: npt.NDArray[np.uint8],
        held_out: npt.NDArray[np.uint8],
        label: int,
        reported: Reported,
        *,
        gamma: float = 1.0,
    ) -> None:
        import keras

        self.model = model
        self._label, self._reported, self._gamma = label, reported, gamma
        self._answers = Traced(keras.Model(model.inputs, model.outputs[0]))
        others = images[classes_of(self._answers, images) != label]
        self._pool = others if len(others) else images
        self._judged = held_out[:_HELD_OUT]
        self._clean = classes_of(self._answers, self._judged)
        self._searches: dict[Form, Search] = {}

    def triggers(
        self,
        seed: int = 0,
        *,
        forms: tuple[Form, ...] = FORMS,
        steps: int = 200,
        min_success: float = MIN_SUCCESS,
        nearest: float | None = None,
        progress: Progress | None = None,
    ) -> list[Recovered]:
        """One of every form that works on held-out inputs and reproduces what was reported; the closest first.

        Args:
            seed: of all that is drawn.
            forms: which to seek.
            steps: of each search.
            min_success: that a trigger must have on held-out inputs.
            nearest: how close the closest trigger known so far comes to what was reported; None: there is none yet.
            progress: called now and then.
        """
        found = [
            self._search(form).run(self._pool, steps=steps, batch=32, seed=seed, progress=progress) for form in forms
        ]
        judged, clean = self._judged, self._clean
        working = [t for t in found if held_out_success(self._answers, t, judged, clean) >= min_success]
        far = {id(trigger): distance(self.model, trigger, judged, self._reported) for trigger in working}
        closest = min(far.values(), default=0.0) if nearest is None else nearest
        return sorted((t for t in working if far[id(t)] <= WORSE * closest), key=lambda t: far[id(t)])

    def _search(self, form: Form) -> Search:
        if form not in self._searches:
            self._searches[form] = Search(self.model, self._label, form, reported=self._reported, gamma=self._gamma)
        return self._searches[form]


def beside(student: Any, norms: Any) -> Any:
    """A model from inputs to the student's logits and the *original's* norms, which is what devices reported of.

    A trigger that is sought with it still works on the student, and is one that devices saw.

    Args:
        student: a Keras model under repair.
        norms: of the original, as ``norms_of`` makes it.
    """
    import keras

    inputs = keras.Input(student.inputs[0].shape[1:])
    return keras.Model(inputs, [logits_of(student)(inputs), norms(inputs)[1]])
