"""Fits a guard to a bare TFLite file with clean data, and bakes it in: the last half of a conversion.

It is also all that a device needs to calibrate a guarded file anew, so it imports NumPy, flatbuffers and a TFLite
runtime, and never a training framework.

Rules enforced here:

* calibration inputs fit the model's input in shape, type and range, are finite, and are enough for the false-positive
  rate asked for; a refusal says how many are needed;
* they are split into two disjoint halves, at random but reproducibly: one fits, the other sets the thresholds; inputs
  of one group, where groups are known, stay on one side;
* the same file, data, runtime, threads and CPU family give the same bytes;
* the guard adds at most 32 KiB or a tenth of the file, whichever is more, as far as storing its matrices in bytes, and
  then fewer factors, can help it.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from converters import flatbuffer, guard, taps
from edgeguard.contract.guard import Calibration, Detector, Environment, GuardMetadata, ModelInput, logit_columns
from edgeguard.detection import cascade
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection import sidecar as sidecars
from edgeguard.detection.guarded import TfliteModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.statistics import (
    MAX_FACTORS,
    Statistics,
    Thresholds,
    fit,
    inputs_needed,
    raw_scores,
    set_thresholds,
    shares,
    tails,
)
from edgeguard.errors import ConfigError, ModelError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]

MIN_FACTORS = 4
MIN_GROWTH = 32 << 10
GROWTH_SHARE = 0.1
MIN_CLASS_SHARE = 0.5
MAX_OUTSIDE = 0.05
MIN_STEPS = 4
OVERLAYS = len(cascade.OVERLAID)
FOLDS = 4
MIN_GROUPS = 4
SELF_TEST_INPUTS = 16
_SIDECAR_OVERHEAD = 64 << 10
_INPUT_TYPES = ("uint8", "int8", "int16", "float32")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Indices of the calibration inputs: ``fit`` and ``threshold`` are disjoint and together all of them."""

    fit: Ints
    threshold: Ints


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Features [N, D] and predicted classes [N] (0 without classes) of clean inputs, and where they were measured."""

    features: Floats
    predicted: Ints
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A bare file, the guarded one, what was compiled into it, and the sidecar where one was asked for."""

    bare: bytes
    content: bytes
    plan: taps.TapPlan
    compiled: guard.Compiled
    metadata: GuardMetadata
    sidecar: bytes | None


def prepare(inputs: Array, fpr: float) -> Array:
    """Calibration inputs [N, ...] in a type that the contract knows: uint8, int8, int16 or float32.

    Raises:
        ConfigError: a false-positive rate outside (0, 0.5].
        ModelError: too few different inputs for it, inputs of another type, or not finite.
    """
    if not 0 < fpr <= 0.5:
        raise ConfigError("--fpr", got=fpr, expected="a rate above 0 and at most 0.5")
    if np.issubdtype(inputs.dtype, np.floating):
        with np.errstate(over="ignore"):
            inputs = inputs.astype(np.float32, copy=False)
    if inputs.dtype.name not in _INPUT_TYPES:
        raise ModelError(
            "calibration set", got=f"inputs of type {inputs.dtype}", expected=f"one of {', '.join(_INPUT_TYPES)}"
        )
    if inputs.dtype == np.float32 and not np.isfinite(inputs).all():
        raise ModelError("calibration set", got="NaN or infinite values", expected="finite numbers")
    needed = 2 * inputs_needed(fpr)
    different = len({hashlib.sha256(np.ascontiguousarray(one).tobytes()).digest() for one in inputs})
    if different < needed:
        raise ModelError(
            "calibration set",
            got=f"{len(inputs)} inputs" + (f", {different} of them different" if different < len(inputs) else ""),
            expected=f"at least {needed} for a false-positive rate of {fpr:g}",
            do="bring more clean inputs or raise --fpr",
        )
    return inputs


def check_fit(
    inputs: Array,
    shape: tuple[int, ...],
    dtype: np.dtype[Any] = np.dtype(np.float32),  # noqa: B008 - a dtype never changes
    quantization: tuple[float, int] = (0.0, 0),
) -> None:
    """Raise ModelError unless inputs [N, ...] fit a model's input.

    Args:
        inputs: as :func:`prepare` returned them.
        shape: of one input, without the batch axis.
        dtype: of the input tensor.
        quantization: its scale and zero point; a scale of 0 where it is not quantised.
    """
    if tuple(inputs.shape[1:]) != shape:
        raise ModelError(
            "calibration set",
            got=f"inputs of shape {list(inputs.shape[1:])}",
            expected=f"{list(shape)}, as the model takes them",
            do="resize the data or bring another model",
        )
    if not np.issubdtype(dtype, np.integer):
        return
    limits = np.iinfo(dtype)
    scale, zero_point = quantization
    if not scale:
        _check_whole(inputs, limits)
        return
    low, high = (limits.min - zero_point) * scale, (limits.max - zero_point) * scale
    least, most = float(inputs.min()), float(inputs.max())
    outside = float(np.mean((inputs < low - scale) | (inputs > high + scale)))
    if outside > MAX_OUTSIDE or most - least < MIN_STEPS * scale:
        raise ModelError(
            "calibration set",
            got=f"values from {least:g} to {most:g}, {outside:.0%} of them outside the model's range",
            expected=f"values that fill the {low:.4g} to {high:.4g} that the model's input was quantised for",
            do="scale the data as the model was trained with",
        )


def _check_whole(inputs: Array, limits: np.iinfo[Any]) -> None:
    """Raise ModelError unless inputs are whole numbers that an input tensor without a scale can hold."""
    least, most = float(inputs.min()), float(inputs.max())
    fractions = float(np.mean(inputs != np.round(inputs)))
    if fractions or least < limits.min or most > limits.max:
        raise ModelError(
            "calibration set",
            got=f"values from {least:g} to {most:g}, {fractions:.0%} of them fractions",
            expected=f"whole numbers from {limits.min} to {limits.max}, as the model takes them",
            do="scale the data as the model was trained with",
        )


def halves(count: int, seed: int = 0, groups: Ints | None = None) -> Halves:
    """Split ``count`` inputs in two; those of one group [N], such as the frames of one video, stay together.

    Groups whose numbers follow each other go to different halves: where data stands sorted by class, each half gets
    every class.

    Raises:
        ModelError: groups of another number of inputs, or fewer than four of them.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(count).astype(np.int64)
    if groups is None:
        return Halves(fit=order[: count // 2], threshold=order[count // 2 :])
    names, member = np.unique(groups, return_inverse=True)
    if len(groups) != count or len(names) < MIN_GROUPS:
        raise ModelError(
            "calibration set",
            got=f"{len(names)} groups of {len(groups)} inputs",
            expected=f"at least {MIN_GROUPS} groups, and a group for each of the {count} inputs",
        )
    sizes, sides = np.bincount(member), np.zeros(len(names), dtype=np.int64)
    totals = [0, 0]
    for first in range(0, len(names), 2):
        pair = sorted(range(first, min(first + 2, len(names))), key=lambda name: (-sizes[name], rng.random()))
        smaller = int(totals[1] < totals[0] or (totals[0] == totals[1] and rng.random() < 0.5))
        for place, name in enumerate(pair):  # the larger of two neighbours goes to the half that has less
            sides[name] = smaller if place == 0 else 1 - smaller
            totals[sides[name]] += int(sizes[name])
    fits = (sides == 0)[member]
    return Halves(fit=order[fits[order]], threshold=order[~fits[order]])


def plan(
    bare: bytes, *, count: int = 2, names: Sequence[str] = (), layers: Sequence[str] = ()
) -> tuple[bytes, taps.TapPlan]:
    """The file in canonical form, without a guard and with a signature, and where to tap it.

    Raises:
        ModelError: the file is damaged, or has no activation that can be tapped.
    """
    model = flatbuffer.parse(bare)
    canonical = _canonical(model, bare)
    return canonical, taps.plan_taps(model, count=count, names=names, layers=layers)


def _canonical(model: flatbuffer.Model, content: bytes) -> bytes:
    """A parsed file without a guard and with a signature; ``model`` is changed in place."""
    guard.strip(model)
    guard.normalise(model)
    return flatbuffer.attach(flatbuffer.pack(model), flatbuffer.associated(content))


def measure(content: bytes, plan: taps.TapPlan, inputs: Array, progress: Progress | None = None) -> Measured:
    """Features and predictions of a file from ``guard.bake_features`` on inputs [N, ...]."""
    model = TfliteModel(content)
    features = np.empty((len(inputs), int(model.outputs[-1]["shape"][-1])), dtype=np.float64)
    predicted = np.zeros(len(inputs), dtype=np.int64)
    for row, one in enumerate(inputs):
        if progress is not None and row % 50 == 0:
            progress("measuring features", row, len(inputs))
        outputs = model.invoke(model.quantise(one))
        features[row] = outputs[-1][0]
        if plan.class_output is not None:
            predicted[row] = int(np.argmax(outputs[plan.class_output][0]))
    environment = Environment(
        runtime=model.runtime.name,
        version=model.runtime.version,
        threads=model.runtime.threads,
        cpu=platform.machine(),
    )
    return Measured(features=features, predicted=predicted, environment=environment)


def check_classes(predicted: Ints, classes: int) -> None:
    """Raise ModelError unless predictions [N] cover enough of the model's classes to say what is usual for them."""
    seen, needed = len(np.unique(predicted)), math.ceil(MIN_CLASS_SHARE * classes)
    if seen < needed:
        raise ModelError(
            "calibration set",
            got=f"inputs that the model calls {seen} of its {classes} classes",
            expected=f"inputs of at least {needed} classes",
            do="bring clean inputs of every class",
        )


def guard_model(
    bare: bytes,
    plan: taps.TapPlan,
    inputs: Array,
    *,
    fpr: float = 0.01,
    classes: Sequence[str] = (),
    seed: int = 0,
    synthetic: bool = False,
    sidecar: bool = False,
    groups: Ints | None = None,
    expected: ModelInput | None = None,
    progress: Progress | None = None,
) -> Guarded:
    """Fit a guard to a canonical bare file and bake it in. What comes back is still to be verified.

    Args:
        bare: as :func:`plan` returned it.
        plan: likewise.
        inputs: clean inputs [N, ...], as :func:`prepare` returned them.
        fpr: the false-positive rate asked of the joint decision.
        classes: names of the classes; numbered where absent.
        seed: of the split into halves.
        synthetic: the inputs are no real ones; the file says so and its scores mean nothing.
        sidecar: also make one.
        groups: see :func:`halves`.
        expected: what the file says that it takes; None: what ``inputs`` are.
        progress: called with a text, the steps done and the steps in total.

    Raises:
        ModelError: the inputs do not fit the model, or the model's features cannot be used.
    """
    model = TfliteModel(bare)
    check_fit(inputs, model.input_shape, model.input_dtype, model.input_quantization)
    names = _class_names(classes, plan)
    split = halves(len(inputs), seed, groups)
    needed = inputs_needed(fpr)
    if groups is not None and min(len(split.fit), len(split.threshold)) < needed:
        raise ModelError(
            "calibration set",
            got=f"groups that divide into halves of {len(split.fit)} and {len(split.threshold)} inputs",
            expected=f"at least {needed} in each for a false-positive rate of {fpr:g}",
            do="bring more or smaller groups",
        )
    probe = guard.bake_features(bare, plan)
    measured = measure(probe, plan, inputs, progress)
    if not synthetic:
        check_classes(measured.predicted[split.fit], plan.classes)
    order = np.concatenate([split.fit, split.threshold])
    calibration = Calibration(
        n_fit=len(split.fit),
        n_threshold=len(split.threshold),
        digest=hashlib.sha256(np.ascontiguousarray(inputs[order]).tobytes()).hexdigest(),
        synthetic=synthetic,
    )
    factors, compact = MAX_FACTORS, False
    statistics, limits = _fit(measured, split, plan, fpr, factors, groups)
    while True:
        metadata = GuardMetadata(
            model_digest=_NO_DIGEST,
            guard_digest=_NO_DIGEST,
            detectors=tuple(
                Detector(name=n, threshold=t) for n, t in zip(statistics.detectors, limits.thresholds, strict=True)
            ),
            taps=guard.layout(plan),
            class_output=plan.class_output,
            classes=names,
            input=expected or _input(inputs),
            fpr=fpr,
            fpr_upper=_rounded(limits.fpr_upper),
            score_to_p=tuple((_round(score), _round(p)) for score, p in limits.score_to_p),
            calibration=calibration,
            environment=measured.environment,
            sidecar_digest=_NO_DIGEST if sidecar else None,
        )
        compiled = guard.Compiled(statistics, limits.thresholds, compact)
        content, described = guard.bake(bare, plan, compiled, metadata)
        excess = len(content) - len(bare) - allowed_growth(len(bare))
        if excess <= 0 or (compact and factors <= MIN_FACTORS):
            break
        if compact:
            factors = _fewer_factors(factors, excess, statistics)
            statistics, limits = _fit(measured, split, plan, fpr, factors, groups)
        compact = True
    companion = None
    if sidecar:
        stages: dict[str, tuple[float, ...]] = {}
        if statistics.logits and not synthetic:
            together = np.arange(len(inputs)) if groups is None else groups
            fresh = _as_fresh(measured.features[split.fit], together[split.fit], metadata, factors)
            fresh = fresh[OVERLAYS:]  # what is laid over others says nothing of itself
            unseen = raw_scores(statistics, measured.features[split.threshold]) / np.asarray(limits.thresholds)
            stages = _stages(
                probe, inputs, split, (fresh, unseen.max(axis=1)), statistics.logits, fpr, groups, progress
            )
        companion = _sidecar(inputs, measured, split, plan, statistics, limits, stages)
        metadata = msgspec.structs.replace(metadata, sidecar_digest=sidecars.digest(companion))
        content, described = guard.bake(bare, plan, compiled, metadata)
    return Guarded(bare=bare, content=content, plan=plan, compiled=compiled, metadata=described, sidecar=companion)


def recalibrate(
    content: bytes,
    inputs: Array,
    *,
    fpr: float | None = None,
    seed: int = 0,
    synthetic: bool = False,
    sidecar: bool | None = None,
    groups: Ints | None = None,
    progress: Progress | None = None,
) -> Guarded:
    """Fit the guard of a guarded file anew: same model, taps, classes and, unless told otherwise, false-positive rate.

    Args:
        content: the guarded file; it must have passed ``untrusted.probe`` where it comes from outside.
        inputs: clean inputs [N, ...] in the owner's own type. Never inputs from the field that nobody looked at: they
            may hold triggers.
        fpr, seed, synthetic, groups, progress: as for :func:`guard_model`.
        sidecar: also make one; None: where the file had one.

    Raises:
        ModelError: the file has no guard, or the inputs do not fit.
        TrustError: its digests do not fit its content: model or guard were changed since.
        ConfigError: see :func:`prepare`.
    """
    described = metadata_reader.read(content)
    rate = described.fpr if fpr is None else fpr
    ready = prepare(inputs, rate)
    if ready.dtype.name != described.input.dtype:
        raise ModelError(
            "calibration set",
            got=f"inputs of type {ready.dtype}",
            expected=f"{described.input.dtype}, as the file was calibrated with",
            do="bring the data to that type, or convert the model again",
        )
    model = flatbuffer.parse(content)
    guard.check_digests(model, described)
    tensors = guard.tapped(model, described)
    bare = _canonical(model, content)
    source_layers = {tap.tensor: tap.source_layer for tap in described.taps}
    return guard_model(
        bare,
        taps.plan_tensors(model, tensors, source_layers),
        ready,
        fpr=rate,
        classes=described.classes,
        seed=seed,
        synthetic=synthetic,
        sidecar=described.sidecar_digest is not None if sidecar is None else sidecar,
        groups=groups,
        expected=described.input,  # pictures are scaled to its range: other clean data must not move it
        progress=progress,
    )


def allowed_growth(size: int) -> int:
    """Bytes that a guard may add to a file of ``size`` bytes."""
    return max(MIN_GROWTH, int(GROWTH_SHARE * size))


def _fewer_factors(factors: int, excess: int, statistics: Statistics) -> int:
    """The most factors per detector that save ``excess`` bytes: each is a row of bytes, a bias and its weights."""
    detectors, width = len(statistics.detectors), statistics.projection.shape[1]
    fitted = (statistics.weights[:, width:] != 0).sum(axis=1)  # a detector of few columns may have fewer than asked for
    for fewer in range(factors - 1, MIN_FACTORS, -1):
        if np.maximum(fitted - fewer, 0).sum() * (width + 4 * (1 + detectors)) >= excess:
            return fewer
    return MIN_FACTORS


def _fit(
    measured: Measured, split: Halves, plan: taps.TapPlan, fpr: float, factors: int, groups: Ints | None
) -> tuple[Statistics, Thresholds]:
    layout = guard.layout(plan)
    features, predicted = measured.features, measured.predicted[split.threshold]
    blocks = guard.blocks(layout)
    together = None if groups is None else groups[split.fit]
    statistics = fit(features[split.fit], blocks, logit_columns(layout), max_factors=factors, groups=together)
    scale = tails(raw_scores(statistics, features[split.fit]), fpr) * np.asarray([block.stretch for block in blocks])
    return statistics, set_thresholds(
        raw_scores(statistics, features[split.threshold]),
        predicted,
        plan.classes,
        fpr,
        scale=scale,
        groups=None if groups is None else groups[split.threshold],
    )


def _stages(
    probe: bytes,
    inputs: Array,
    split: Halves,
    scores: tuple[Floats, Floats],
    logits: Sequence[int],
    fpr: float,
    groups: Ints | None,
    progress: Progress | None,
) -> dict[str, tuple[float, ...]]:
    """What the further looks are calibrated to, from the joint scores of both halves; nothing with too few inputs."""
    model = TfliteModel(probe)

    def answer(x: Array) -> Floats:
        return np.asarray(shares(model.invoke(model.quantise(x))[-1].astype(np.float64), logits)[0])

    found = cascade.calibrate(
        inputs[split.fit[OVERLAYS:]],
        scores[0],
        inputs[split.threshold],
        scores[1],
        fpr=fpr,
        answer=answer,
        overlays=inputs[split.fit[:OVERLAYS]],
        groups=None if groups is None else groups[split.threshold],
        progress=progress,
    )
    return {} if found is None else found.stages()


def _as_fresh(features: Floats, groups: Ints, described: GuardMetadata, factors: int) -> Floats:
    """Joint scores [N] of the fit half, each by statistics of other groups' inputs: about what fresh inputs score."""
    taps, thresholds = described.taps, np.asarray([detector.threshold for detector in described.detectors])
    found = np.empty(len(features))
    folds = np.unique(groups, return_inverse=True)[1] % FOLDS
    for fold in range(FOLDS):
        held = folds == fold
        # A group that is most of the half has none to be judged by: then by what was fitted to it too.
        others = ~held if (~held).sum() >= len(features) / 2 else np.ones(len(features), dtype=bool)
        statistics = fit(
            features[others], guard.blocks(taps), logit_columns(taps), max_factors=factors, groups=groups[others]
        )
        found[held] = (raw_scores(statistics, features[held]) / thresholds).max(axis=1)
    return found


def _sidecar(
    inputs: Array,
    measured: Measured,
    split: Halves,
    plan: taps.TapPlan,
    statistics: Statistics,
    limits: Thresholds,
    stages: dict[str, tuple[float, ...]],
) -> bytes:
    room = (sidecars.MAX_SIDECAR - _SIDECAR_OVERHEAD) // inputs[0].nbytes
    share = min(1.0, room / (OVERLAYS + SELF_TEST_INPUTS))
    chosen = split.threshold[: max(1, int(share * SELF_TEST_INPUTS))]
    raw = raw_scores(statistics, measured.features[chosen])
    unknown = np.full(len(chosen), -1, dtype=np.int64)
    return sidecars.encode(
        Sidecar(
            overlays=inputs[split.fit[: max(1, int(share * OVERLAYS))]],
            self_test=inputs[chosen],
            predicted=unknown if plan.class_output is None else measured.predicted[chosen],
            scores=(raw / np.asarray(limits.thresholds)).astype(np.float32),
            stages=stages,
        )
    )


def _input(inputs: Array) -> ModelInput:
    pixels = inputs.dtype == np.uint8
    return ModelInput(
        shape=tuple(int(n) for n in inputs.shape[1:]),
        dtype=inputs.dtype.name,  # type: ignore[arg-type]  # prepare() lets only the contract's types through
        range=(0.0, 255.0) if pixels else (float(inputs.min()), float(inputs.max())),
    )


def _class_names(classes: Sequence[str], plan: taps.TapPlan) -> tuple[str, ...]:
    if plan.class_output is None:
        return ()
    if classes and len(classes) != plan.classes:
        raise ModelError("class names", got=f"{len(classes)}", expected=f"{plan.classes}, one per class of the model")
    return tuple(classes) or tuple(str(c) for c in range(plan.classes))


def _round(value: float) -> float:
    """Five digits: more than the number of inputs can tell, and fewer bytes in the file."""
    return float(f"{value:.5g}")


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(_round(value) for value in values)


__all__ = [
    "Guarded",
    "Halves",
    "Measured",
    "allowed_growth",
    "check_classes",
    "check_fit",
    "guard_model",
    "halves",
    "measure",
    "plan",
    "prepare",
    "recalibrate",
]
