"""The whole conversion: source -> int8 -> plan taps -> fit -> bake -> verify. Nothing is written before it is verified.

The calibration set is split into two disjoint halves, at random but reproducibly: one fits the statistics, the other
sets the thresholds. The quantised ranges are set with the fit half.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from converters import flatbuffer, guard, sources, taps, untrusted
from converters.verify import Verified, verify
from edgeguard.contract.guard import Calibration, Detector, Environment, GuardMetadata, ModelInput
from edgeguard.detection.guarded import TfliteModel
from edgeguard.detection.statistics import fit, inputs_needed, raw_scores, set_thresholds
from edgeguard.errors import ConfigError, ModelError

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

MAX_RANGE_INPUTS = 500
VERIFY_INPUTS = 64
LATENCY_RUNS = 300
MIN_AGREEMENT = 0.98
MAX_ACCURACY_LOSS = 0.005


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The outcome: both files in memory, and what was measured."""

    bare: bytes
    guarded: bytes
    metadata: GuardMetadata
    verified: Verified
    agreement: float | None
    float_accuracy: float | None
    int8_accuracy: float | None
    latency_bare_us: float
    latency_guarded_us: float


def convert(
    source: sources.Source,
    calibration: Array,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    classes: Sequence[str] = (),
    fpr: float = 0.01,
    tap_count: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Convert and guard a model.

    Args:
        source: as :mod:`converters.sources` read it.
        calibration: clean inputs [N, ...] in the owner's own type (uint8 pixels, or float32).
        labels: their true labels, to report accuracy; optional.
        classes: names of the classes; numbered where absent.
        fpr: the false-positive rate asked of the joint decision.
        tap_count: how many activations the guard listens to.
        seed: of the split into halves.
        progress: called with a text, the steps done and the steps in total.

    Raises:
        ConfigError: a rate outside (0, 0.5].
        ModelError: the calibration set does not fit or is too small, int8 does not answer as float did, or the guard
            cannot be verified.
    """
    if not 0 < fpr <= 0.5:
        raise ConfigError("--fpr", got=fpr, expected="a rate above 0 and at most 0.5")
    if len(calibration) // 2 < inputs_needed(fpr):
        raise ModelError(
            "calibration set",
            got=f"{len(calibration)} inputs",
            expected=f"at least {2 * inputs_needed(fpr)} for a false-positive rate of {fpr:g}",
            do="bring more clean inputs or raise --fpr",
        )
    if np.issubdtype(calibration.dtype, np.floating) and not np.isfinite(calibration).all():
        raise ModelError("calibration set", got="NaN or infinite values", expected="finite numbers")
    _check_shape(source, calibration)
    if source.tflite is not None:
        # The first contact of a file from outside with a native runtime happens in a child process.
        flatbuffer.parse(source.tflite)
        untrusted.probe(source.tflite)
    note = progress or (lambda text, done, total: None)
    order = np.random.default_rng(seed).permutation(len(calibration))
    fit_half, threshold_half = order[: len(order) // 2], order[len(order) // 2 :]

    note("quantising", 0, 4)
    bare, reference = _int8(source, calibration[fit_half[:MAX_RANGE_INPUTS]])
    agreement, float_accuracy, int8_accuracy = _compare(bare, reference, calibration, labels)

    note("planning taps and measuring features", 1, 4)
    model = flatbuffer.parse(bare)
    guard.strip(model)
    guard.normalise(model)
    bare = flatbuffer.pack(model)
    plan = taps.plan_taps(model, count=tap_count, layers=source.layers)
    features, predicted, environment = measure_features(guard.bake_features(bare, plan), plan, calibration)

    note("fitting statistics and thresholds", 2, 4)
    layout = guard.layout(plan)
    statistics = fit(features[fit_half], predicted[fit_half], guard.blocks(layout), plan.classes)
    raw = raw_scores(statistics, features[threshold_half], predicted[threshold_half])
    limits = set_thresholds(raw, predicted[threshold_half], plan.classes, fpr)
    compiled = guard.Compiled(statistics, limits.thresholds)
    pixels = calibration.dtype == np.uint8
    metadata = GuardMetadata(
        model_digest="0" * 64,
        guard_digest="0" * 64,
        detectors=tuple(
            Detector(name=n, threshold=t) for n, t in zip(statistics.detectors, limits.thresholds, strict=True)
        ),
        taps=layout,
        class_output=plan.class_output,
        classes=_class_names(classes, plan),
        input=ModelInput(
            shape=tuple(int(n) for n in calibration.shape[1:]),
            dtype="uint8" if pixels else "float32",
            range=(0.0, 255.0) if pixels else (float(calibration.min()), float(calibration.max())),
        ),
        fpr=fpr,
        fpr_upper=limits.fpr_upper,
        score_to_p=limits.score_to_p,
        calibration=Calibration(
            n_fit=len(fit_half),
            n_threshold=len(threshold_half),
            digest=hashlib.sha256(np.ascontiguousarray(calibration[order]).tobytes()).hexdigest(),
        ),
        environment=environment,
    )
    guarded, metadata = guard.bake(bare, plan, compiled, metadata)

    note("verifying", 3, 4)
    verified = verify(bare, guarded, metadata, compiled, calibration[threshold_half[:VERIFY_INPUTS]])
    latency = compare_latency(bare, guarded, calibration[threshold_half[0]])
    note("done", 4, 4)
    return Conversion(
        bare=bare,
        guarded=guarded,
        metadata=metadata,
        verified=verified,
        agreement=agreement,
        float_accuracy=float_accuracy,
        int8_accuracy=int8_accuracy,
        latency_bare_us=latency[0],
        latency_guarded_us=latency[1],
    )


def _int8(source: sources.Source, calibration: Array) -> tuple[bytes, bytes | None]:
    """The file to guard, and the float file it must answer like; None where the source is TFLite already."""
    if source.tflite is not None:
        return source.tflite, None
    return sources.to_int8(source, calibration), sources.to_float(source)


def _check_shape(source: sources.Source, calibration: Array) -> None:
    expected = sources.input_shape(source)
    if tuple(calibration.shape[1:]) != expected:
        raise ModelError(
            "calibration set",
            got=f"inputs of shape {list(calibration.shape[1:])}",
            expected=f"{list(expected)}, as the model takes them",
            do="resize the data or bring another model",
        )


def _compare(
    bare: bytes, reference: bytes | None, inputs: Array, labels: npt.NDArray[np.int64] | None
) -> tuple[float | None, float | None, float | None]:
    """Top-1 agreement with the float file, and both accuracies; None for what cannot be said."""
    answers = TfliteModel(bare).predict(inputs)
    if answers.ndim != 2 or answers.shape[1] < 2:
        return None, None, None
    int8 = answers.argmax(axis=1)
    int8_accuracy = None if labels is None else float(np.mean(int8 == labels))
    if reference is None:
        return None, None, int8_accuracy
    floats = TfliteModel(reference).predict(inputs).argmax(axis=1)
    agreement = float(np.mean(floats == int8))
    float_accuracy = None if labels is None else float(np.mean(floats == labels))
    _gate_int8(agreement, float_accuracy, int8_accuracy)
    return agreement, float_accuracy, int8_accuracy


def _gate_int8(agreement: float, float_accuracy: float | None, int8_accuracy: float | None) -> None:
    """Refuse an int8 model that does not answer as the float model did.

    Raises:
        ModelError: agreement below MIN_AGREEMENT and, where labels say so, accuracy lost beyond MAX_ACCURACY_LOSS.
    """
    if agreement >= MIN_AGREEMENT:
        return
    got, expected = f"{agreement:.1%} of its answers agree with the float model", f"at least {MIN_AGREEMENT:.0%}"
    if float_accuracy is not None and int8_accuracy is not None:
        if float_accuracy - int8_accuracy <= MAX_ACCURACY_LOSS:
            return
        got += f", accuracy {int8_accuracy:.1%} after {float_accuracy:.1%}"
        expected += f", or accuracy within {MAX_ACCURACY_LOSS * 100:g} points"
    raise ModelError(
        "int8 model", got=got, expected=expected, do="bring calibration inputs that cover the range of real ones"
    )


def measure_features(
    content: bytes, plan: taps.TapPlan, inputs: Array
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], Environment]:
    """Features [N, D] and predicted classes [N] of a file from ``guard.bake_features``, and where."""
    model = TfliteModel(content)
    features = np.empty((len(inputs), int(model.outputs[-1]["shape"][-1])), dtype=np.float64)
    predicted = np.zeros(len(inputs), dtype=np.int64)
    for row, one in enumerate(inputs):
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
    return features, predicted, environment


def compare_latency(bare: bytes, guarded: bytes, one: Array, *, runs: int = LATENCY_RUNS) -> tuple[float, float]:
    """Median microseconds of one inference, bare and guarded, outputs read; interleaved, so that noise hits both."""
    models = (TfliteModel(bare), TfliteModel(guarded))
    tensor = models[0].quantise(one)
    times: tuple[list[int], list[int]] = ([], [])
    for run in range(runs + 20):
        for model, taken in zip(models, times, strict=True):
            started = time.perf_counter_ns()
            model.invoke(tensor)
            if run >= 20:
                taken.append(time.perf_counter_ns() - started)
    return float(np.median(times[0])) / 1000.0, float(np.median(times[1])) / 1000.0


def _class_names(classes: Sequence[str], plan: taps.TapPlan) -> tuple[str, ...]:
    if plan.class_output is None:
        return ()
    if classes and len(classes) != plan.classes:
        raise ModelError("class names", got=f"{len(classes)}", expected=f"{plan.classes}, one per class of the model")
    return tuple(classes) or tuple(str(c) for c in range(plan.classes))


def write(content: bytes, path: Path) -> None:
    """Write a file so that it is there in full or not at all.

    Raises:
        ConfigError: the folder does not exist, is not writable, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigError(f"output file {path}", got=error.strerror or str(error), do="choose another place") from error


def summary(conversion: Conversion, output: Path | None) -> dict[str, Any]:
    """What ``edgeguard convert --json`` prints."""
    described = conversion.metadata
    return {
        "output": None if output is None else str(output),
        "model_digest": described.model_digest,
        "guard_digest": described.guard_digest,
        "bytes": {"bare": len(conversion.bare), "guarded": len(conversion.guarded)},
        "float_accuracy": conversion.float_accuracy,
        "int8_accuracy": conversion.int8_accuracy,
        "agreement": conversion.agreement,
        "taps": msgspec.to_builtins(described.taps),
        "fpr": described.fpr,
        "latency": {"bare_us": conversion.latency_bare_us, "guarded_us": conversion.latency_guarded_us},
        "runtimes_verified": list(conversion.verified.runtimes),
    }


__all__ = ["Conversion", "compare_latency", "convert", "measure_features", "summary", "write"]
