"""Proves that a guard changed nothing but what it added. Runs on every device runtime installed.

TensorFlow's own runtime is used only where no device runtime is there; the result lists which were.

Rules enforced here:

* the model's own outputs are bit-identical with and without the guard, on calibration inputs and on random ones;
* the scores of the graph equal NumPy's, computed from that run's own features and prediction;
* a guard that fails either is never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.guard import Compiled
from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection import runtime as runtimes
from edgeguard.detection.guarded import TfliteModel
from edgeguard.detection.statistics import raw_scores
from edgeguard.errors import ModelError

RELATIVE, ABSOLUTE = 1e-4, 1e-5


@dataclass(frozen=True)
class Verified:
    """The runtimes that were used, and how many inputs each saw."""

    runtimes: tuple[str, ...]
    inputs: int


def verify(
    bare: bytes,
    guarded: bytes,
    metadata: GuardMetadata,
    compiled: Compiled,
    inputs: npt.NDArray[Any],
    *,
    random_inputs: int = 64,
    seed: int = 0,
) -> Verified:
    """Compare a guarded file with the bare one.

    Args:
        bare: the file without guard.
        guarded: the file with it.
        metadata: of the guarded file.
        compiled: what was baked into it.
        inputs: some calibration inputs [N, ...], in the owner's own type.

    Raises:
        ModelError: any difference.
    """
    names = tuple(n for n in runtimes.available() if n != "tensorflow") or runtimes.available()
    for name in names:
        before = TfliteModel(bare, runtime=name)
        after = TfliteModel(guarded, runtime=name)
        rng = np.random.default_rng(seed)
        tensors = [after.quantise(x) for x in inputs]
        tensors += [_random(rng, (1, *after.input_shape), after.input_dtype) for _ in range(random_inputs)]
        for tensor in tensors:
            _same_outputs(name, before.invoke(tensor), after.invoke(tensor))
            _same_scores(name, after.invoke(tensor), metadata, compiled)
    return Verified(names, len(inputs) + random_inputs)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, size=shape, dtype=dtype, endpoint=True)
    return rng.uniform(0.0, 255.0, size=shape).astype(dtype)


def _same_outputs(name: str, before: list[npt.NDArray[Any]], after: list[npt.NDArray[Any]]) -> None:
    if len(after) != len(before) + 2:
        raise ModelError("guarded model", got=f"{len(after)} outputs on {name}", expected=f"{len(before) + 2}")
    for index, (one, other) in enumerate(zip(before, after[:-2], strict=True)):
        if one.tobytes() != other.tobytes():
            raise ModelError(
                "guarded model",
                got=f"output {index} differs from the bare model's on {name}",
                expected="bit-identical outputs",
                do="report this model; nothing was written",
            )


def _same_scores(name: str, outputs: list[npt.NDArray[Any]], metadata: GuardMetadata, compiled: Compiled) -> None:
    predicted = 0 if metadata.class_output is None else int(np.argmax(outputs[metadata.class_output][0]))
    features = outputs[-1].astype(np.float64)
    expected = raw_scores(compiled.statistics, features, np.asarray([predicted])) / np.asarray(compiled.thresholds)
    # A score is a difference of two sums of squares; its error is relative to the larger of them.
    extended = np.concatenate([features, features @ compiled.statistics.projection.T], axis=1)
    sums = (extended - compiled.statistics.table[predicted]) ** 2 @ np.abs(compiled.statistics.weights).T
    allowed = ABSOLUTE + RELATIVE * np.maximum(expected, sums / np.asarray(compiled.thresholds))
    if not np.all(np.abs(outputs[-2] - expected) <= allowed):
        raise ModelError(
            "guarded model",
            got=f"scores {outputs[-2][0]} in the graph on {name}",
            expected=f"{expected[0]}, as NumPy computes them",
            do="report this model; nothing was written",
        )
