"""The whole conversion: source -> float TFLite -> int8 -> plan taps -> fit -> bake -> verify.

Each step is a function from plain values to plain values, and :class:`Conversion` holds what each returned. Nothing is
written before it is verified.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from converters import calibration as calibrating
from converters import quantise, sources
from converters.calibration import Guarded
from converters.lowering import Lowered, lower
from converters.quantise import Parity
from converters.taps import TapPlan
from converters.verify import Verified, verify
from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

MAX_RANGE_INPUTS = 500
LATENCY_RUNS = 300
SYNTHETIC_INPUTS = 1000


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median microseconds of one inference, outputs read."""

    bare_us: float
    guarded_us: float

    @property
    def ratio(self) -> float:
        """Guarded over bare."""
        return self.guarded_us / self.bare_us


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What each step of a conversion returned, and one input that both files take."""

    lowered: Lowered
    parity: Parity
    plan: TapPlan
    result: Guarded
    verified: Verified
    example: Array

    @functools.cached_property
    def latency(self) -> Latency:
        """Of both files on ``example``, measured when it is first asked for: many conversions are never released."""
        bare_us, guarded_us = compare_latency(self.bare, self.guarded, self.example)
        return Latency(bare_us=bare_us, guarded_us=guarded_us)

    @property
    def bare(self) -> bytes:
        """The file without guard."""
        return self.result.bare

    @property
    def guarded(self) -> bytes:
        """The file with it."""
        return self.result.content

    @property
    def metadata(self) -> GuardMetadata:
        """What the guarded file says of itself."""
        return self.result.metadata


def convert(
    source: Path | str | sources.Source,
    calibration: Array,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    classes: Sequence[str] = (),
    fpr: float = 0.01,
    taps: int | Sequence[str] = 2,
    quantised: bool = True,
    input_type: Literal["int8", "uint8"] | None = None,
    keras: Literal[".keras", ".h5"] | None = None,
    sidecar: bool = False,
    synthetic: bool = False,
    groups: npt.NDArray[np.int64] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Convert and guard a model.

    Args:
        source: a .keras, .h5, .onnx or .tflite file or a SavedModel folder, read in a child process with limits; or a
            model in memory, as ``sources.of_keras`` made it.
        calibration: clean inputs [N, ...] in the owner's own type (uint8 pixels, or numbers).
        labels: their true labels [N], so that accuracy is known; optional.
        classes: names of the classes; numbered where absent.
        fpr: the false-positive rate asked of the joint decision.
        taps: how many activations the guard listens to, or their names: of tensors or of layers.
        quantised: False leaves a float model float.
        input_type: of the quantised model's input; int8 unless told.
        keras: also return the trainable Keras model, as a file of this kind.
        sidecar: also make the sidecar.
        synthetic: the inputs are made up: for structure and latency, not for detection. The file says so, and a device
            then reports "not checked".
        groups: of the inputs [N]: those of one group, such as the frames of one video, never stand in both halves.
        seed: of the split into halves.
        progress: called with a text, the steps done and the steps in total.

    Raises:
        ConfigError: no such file, or a rate outside (0, 0.5].
        ModelError: the model cannot be read, the calibration set does not fit or is too small, int8 does not answer as
            float did, or the guard cannot be verified.
    """
    note = progress or (lambda text, done, total: None)
    inputs = calibrating.prepare(calibration, fpr)
    if labels is not None and len(labels) != len(inputs):
        raise ModelError("labels", got=f"{len(labels)}", expected=f"{len(inputs)}, one per calibration input")
    split = calibrating.halves(len(inputs), seed, groups)
    origin = Path(source) if isinstance(source, str) else source

    ranges = inputs[split.fit[:MAX_RANGE_INPUTS]]
    lowered = lower(origin, ranges, quantise=quantised, input_type=input_type, keras=keras, progress=note)
    ready = lowered.int8_tflite or lowered.float_tflite
    assert ready is not None

    names = () if isinstance(taps, int) else tuple(taps)
    count = taps if isinstance(taps, int) else max(1, len(names))
    bare, plan = calibrating.plan(ready, count=count, names=names, layers=lowered.layers)
    model = TfliteModel(bare)
    calibrating.check_fit(inputs, model.input_shape, model.input_dtype, model.input_quantization)

    note("comparing with the float model", 0, 1)
    parity = _parity(lowered, bare, inputs, labels, plan, synthetic=synthetic)
    result = calibrating.guard_model(
        bare,
        plan,
        inputs,
        fpr=fpr,
        classes=classes,
        seed=seed,
        synthetic=synthetic,
        sidecar=sidecar,
        groups=groups,
        progress=note,
    )
    note("verifying", 0, 1)
    verified = verify(bare, result.content, result.compiled, inputs[split.threshold])
    note("done", 1, 1)
    return Conversion(
        lowered=lowered,
        parity=parity,
        plan=plan,
        result=result,
        verified=verified,
        example=inputs[0],
    )


def _parity(
    lowered: Lowered,
    bare: bytes,
    inputs: Array,
    labels: npt.NDArray[np.int64] | None,
    plan: TapPlan,
    *,
    synthetic: bool,
) -> Parity:
    reference = lowered.float_tflite if lowered.int8_tflite is not None else None
    parity = quantise.compare(reference, bare, inputs, labels, class_output=plan.class_output)
    if reference is not None and not synthetic:
        quantise.gate(parity, lambda: quantise.layer_errors(reference, bare, inputs)[0])
    return parity


def made_up(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    quantization: tuple[float, int] = (0.0, 0),
    count: int = SYNTHETIC_INPUTS,
    *,
    seed: int = 0,
) -> Array:
    """Synthetic calibration inputs [count, ...] for an input tensor of this shape (without batch), type and scale.

    They fill the range of an integer input, as uint8 where that is 0 to 255; a float one gets normal numbers.
    """
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        scale, zero_point = quantization if quantization[0] else (1.0, 0)
        low, high = (limits.min - zero_point) * scale, (limits.max - zero_point) * scale
        if round(low) == 0 and round(high) == 255:
            return rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        if not quantization[0]:
            return rng.integers(limits.min, limits.max, (count, *shape), dtype=dtype, endpoint=True)
        return rng.uniform(low, high, size=(count, *shape)).astype(np.float32)
    return rng.normal(size=(count, *shape)).astype(np.float32)


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


def peak_memory() -> int:
    """Bytes that this process, or the largest of its finished children, has had resident at most."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def summary(conversion: Conversion, output: Path | None) -> dict[str, Any]:
    """What ``edgeguard convert --json`` prints."""
    described = conversion.metadata
    parity = conversion.parity
    return {
        "output": None if output is None else str(output),
        "model_digest": described.model_digest,
        "guard_digest": described.guard_digest,
        "sidecar_digest": described.sidecar_digest,
        "bytes": {
            "bare": len(conversion.bare),
            "guarded": len(conversion.guarded),
            "growth_allowed": calibrating.allowed_growth(len(conversion.bare)),
        },
        "float_accuracy": parity.float_accuracy,
        "int8_accuracy": parity.int8_accuracy,
        "agreement": parity.agreement,
        "output_error": parity.output_error,
        "taps": msgspec.to_builtins(described.taps),
        "fpr": described.fpr,
        "validated": not described.calibration.synthetic,
        "latency": {"bare_us": conversion.latency.bare_us, "guarded_us": conversion.latency.guarded_us},
        "runtimes_verified": list(conversion.verified.runtimes),
        "runtimes_not_run": dict(conversion.verified.not_run),
        "peak_memory_bytes": peak_memory(),
    }


__all__ = [
    "Conversion",
    "Latency",
    "compare_latency",
    "convert",
    "made_up",
    "peak_memory",
    "summary",
]
