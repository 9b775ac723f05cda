"""Reads from a guarded file what firmware needs of it: the operators, the outputs, the guard in whole numbers.

Rules enforced here:

* the file's digests are compared with its content first, and it is run in a child process before it is run in this one;
* what a microcontroller cannot tell is refused: a class output that is neither int8, uint8 nor float32, more
  detectors, longer names of theirs or more classes than a message holds;
* golden inputs are those where nothing hangs on rounding: their joint score is off the threshold by a third, and the
  output of the predicted class is more than ``APART`` steps of 8 bits above any other.

How far a feature x is from what the guard expects of class c is counted in steps of 1/256 of the deviation that alone
would bring a score to its threshold: steps = x * 256 sqrt(w) - mean - expected_c, with w the largest weight that a
detector gives to the square of that deviation (:mod:`edgeguard.detection.statistics`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from converters import flatbuffer, guard, untrusted
from converters.flatbuffer import Model, text
from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection import metadata, sidecar
from edgeguard.detection.guarded import MAX_SQUARE, GuardedModel, TfliteModel, layout_of
from edgeguard.detection.statistics import STEPS
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

UNIT = 256
MOST_DETECTORS = 6
MOST_CLASSES = 4096
MOST_NAMES = 40
"""Characters of the detectors' names with their commas: what a hello holds."""
GOLDEN = 4
_LARGEST_MEAN = 1 << 29
_LARGEST_EXPECTED = 32767
_TRIES = 32
APART = 2
_OFF = 1.34
"""Golden joint scores are this factor below or above the threshold: kernels of two runtimes differ by less."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One feature in steps: a 16-bit mantissa times ``factor``, shifted right by ``exponent`` less its own exponent."""

    factor: int
    exponent: int
    mean: int


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One input as the model takes it, and what came out.

    ``scores`` and ``features`` are float32 ``[detectors]`` and ``[D]``; ``label`` is -1 for a model without classes.
    """

    tensor: bytes
    label: int
    status: str
    scores: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Described:
    """A guarded file as firmware sees it.

    ``class_output``: index of the output with the classes and its type, None for a model without. ``outputs``: how
    many outputs there are, the guard's last. ``expected`` ``[classes, D]``: int16, None where nothing hangs on the
    class. ``largest``: bit pattern of the largest feature that scores can speak about.
    """

    metadata: GuardMetadata
    operators: tuple[str, ...]
    outputs: int
    class_output: tuple[int, str] | None
    scales: tuple[Scale, ...]
    expected: npt.NDArray[np.int16] | None
    largest: int
    golden: tuple[Golden, ...]


def describe(content: bytes, sidecar_content: bytes | None = None) -> Described:
    """Everything that the firmware's tables are made of.

    Args:
        content: a guarded ``.tflite`` file.
        sidecar_content: its sidecar, whose inputs become golden ones; without it they are made up.

    Raises:
        ModelError: not a guarded file, or one that a microcontroller could not tell verdicts of.
        TrustError: its digests do not fit its content.
    """
    described = metadata.read(content)
    model = flatbuffer.parse(content)
    guard.check_digests(model, described)
    untrusted.probe(content)
    if len(described.detectors) > MOST_DETECTORS or len(described.classes) > MOST_CLASSES:
        raise ModelError(
            "guard",
            got=f"{len(described.detectors)} detectors and {len(described.classes)} classes",
            expected=f"at most {MOST_DETECTORS} and {MOST_CLASSES} on a microcontroller",
        )
    names = ",".join(detector.name for detector in described.detectors)
    if len(names) > MOST_NAMES:
        raise ModelError("guard", got=f"detectors {names}", expected=f"at most {MOST_NAMES} characters of names")
    runner = TfliteModel(content)
    layout = layout_of(runner.outputs, described)
    scales, expected = _tables(model, described)
    bound = np.float32(math.sqrt(MAX_SQUARE / described.feature_count))
    return Described(
        metadata=described,
        operators=_operators(model),
        outputs=len(runner.outputs),
        class_output=None if layout.classes is None else _class_output(runner, layout.classes),
        scales=scales,
        expected=expected,
        largest=int(bound.view(np.uint32)),
        golden=_golden(content, described, runner, layout.classes, sidecar_content),
    )


def _operators(model: Model) -> tuple[str, ...]:
    """Names of the built-in operators that the graphs use, sorted."""
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    codes = {flatbuffer.builtin_code(model, op) for graph in model.subgraphs for op in graph.operators}
    return tuple(sorted(names[code] for code in codes))


def _class_output(runner: TfliteModel, index: int) -> tuple[int, str]:
    dtype = np.dtype(runner.outputs[index]["dtype"]).name
    if dtype not in ("int8", "uint8", "float32"):
        raise ModelError("model file", got=f"a class output of {dtype}", expected="int8, uint8 or float32")
    return index, dtype


def _tables(model: Model, described: GuardMetadata) -> tuple[tuple[Scale, ...], npt.NDArray[np.int16] | None]:
    """What each feature is in steps, and what is expected of each class, from the guard's constants."""
    width = described.feature_count
    weights = _constant(model, "edgeguard_weights").reshape(len(described.detectors), -1)[:, :width].max(axis=0)
    by_class = _has(model, "edgeguard_expected_bias")
    usual = _constant(model, "edgeguard_expected_bias" if by_class else "edgeguard_expected")
    unit = 1.0 / _constant(model, "edgeguard_scaled_by") if _has(model, "edgeguard_scaled_by") else np.ones(width)
    steps = UNIT * np.sqrt(np.maximum(weights, 0.0))
    means = np.clip(np.round(usual * steps), -_LARGEST_MEAN, _LARGEST_MEAN)
    scales = tuple(_scale(float(per), int(mean)) for per, mean in zip(steps / unit, means, strict=True))
    if not by_class:
        return scales, None
    if _has(model, "edgeguard_table_int8"):
        table = _constant(model, "edgeguard_table_int8", np.int8) / STEPS
    else:
        table = _constant(model, "edgeguard_table")
    beyond = np.round(table.reshape(width, -1).T * steps)
    return scales, np.clip(beyond, -_LARGEST_EXPECTED, _LARGEST_EXPECTED).astype(np.int16)


def _scale(per: float, mean: int) -> Scale:
    """A factor of 16 bits and a power of two that bring a float32 to steps, ``per`` of them to one."""
    if per <= 0.0 or not math.isfinite(per):
        return Scale(factor=0, exponent=0, mean=0)
    fraction, exponent = math.frexp(per)
    factor = round(fraction * (1 << 16))
    if factor == 1 << 16:
        factor, exponent = 1 << 15, exponent + 1
    # A float32 of exponent field e is its 16-bit mantissa times 2^(e - 142); per is factor times 2^(exponent - 16).
    return Scale(factor=factor, exponent=142 + 16 - exponent, mean=mean)


def _has(model: Model, name: str) -> bool:
    return any(text(tensor.name) == name for tensor in model.subgraphs[0].tensors)


def _constant(model: Model, name: str, dtype: npt.DTypeLike = np.float32) -> Floats:
    for tensor in model.subgraphs[0].tensors:
        if text(tensor.name) == name:
            return np.frombuffer(flatbuffer.constant(model, tensor), dtype=dtype).astype(np.float64)
    raise ModelError("guarded file", got=f"no {name} in its guard", do="convert the model again")


def _golden(
    content: bytes,
    described: GuardMetadata,
    runner: TfliteModel,
    classes: int | None,
    sidecar_content: bytes | None,
) -> tuple[Golden, ...]:
    """Some inputs of the sidecar, and made-up ones up to ``GOLDEN``; none that lies near the threshold or two classes.

    ``classes``: index of the class output, None for a model without.
    """
    guarded = GuardedModel.load(content)
    clean: list[Array] = []
    if sidecar_content is not None and described.sidecar_digest is not None:
        beside = sidecar.decode(sidecar_content, digest=described.sidecar_digest, metadata=described)
        clean = list(beside.self_test[: GOLDEN // 2])
    random = np.random.default_rng(0)
    chosen: list[Golden] = []
    for x in [*clean, *(_made_up(described, random) for _ in range(_TRIES))]:
        found = guarded.infer(x)
        score = found.verdict.score
        if 1.0 / _OFF < score < _OFF:
            continue
        if classes is not None and not _apart(runner.invoke(runner.quantise(x))[classes]):
            continue
        chosen.append(
            Golden(
                tensor=runner.quantise(x).tobytes(),
                label=-1 if found.verdict.predicted is None else found.verdict.predicted,
                status=found.verdict.status,
                scores=np.asarray([found.verdict.scores[d.name] for d in described.detectors], dtype=np.float32),
                features=found.features.astype(np.float32),
            )
        )
        if len(chosen) == GOLDEN:
            break
    return tuple(chosen)


def _apart(outputs: Array) -> bool:
    """Whether the largest of a class output, as the model gives it, is one that another runtime finds too."""
    values = np.sort(outputs.ravel().astype(np.float64))
    step = 1.0 if np.issubdtype(outputs.dtype, np.integer) else np.ptp(values) / 255
    return values.size < 2 or bool(values[-1] - values[-2] > APART * step)


def _made_up(described: GuardMetadata, random: np.random.Generator) -> Array:
    low, high = described.input.range
    values = random.uniform(low, high, described.input.shape)
    dtype = np.dtype(described.input.dtype)
    return (np.round(values) if np.issubdtype(dtype, np.integer) else values).astype(dtype)
