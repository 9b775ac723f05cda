"""Proves that a guard changed nothing but what it added. Runs on every runtime installed.

The runtimes are those of devices (TensorFlow's own only where there is no other) and TFLite Micro. A microcontroller
runtime that does not know an op of the *model* is listed with its reason; every other difference is an error.

Rules enforced here:

* the model's own outputs are bit-identical with and without the guard, on calibration inputs and on random ones;
* the scores of the graph equal NumPy's, computed from that run's own features;
* a guard that fails either is never written; a runtime that was not used is named, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import micro
from converters.guard import Compiled
from edgeguard.detection import runtime as runtimes
from edgeguard.detection.guarded import TfliteModel
from edgeguard.detection.statistics import raw_scores
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

RELATIVE, ABSOLUTE = 1e-4, 1e-5
CALIBRATION_INPUTS = 64
MICRO_INPUTS = 16


@dataclass(frozen=True)
class Verified:
    """The runtimes that were used, how many inputs each saw at least, and why others were not used."""

    runtimes: tuple[str, ...]
    inputs: int
    not_run: Mapping[str, str] = field(default_factory=dict)


def verify(
    bare: bytes,
    guarded: bytes,
    compiled: Compiled,
    inputs: Array,
    *,
    random_inputs: int = 64,
    seed: int = 0,
) -> Verified:
    """Compare a guarded file with the bare one.

    Args:
        bare: the file without guard.
        guarded: the file with it.
        compiled: what was baked into it.
        inputs: calibration inputs [N, ...], in the owner's own type; the first CALIBRATION_INPUTS of them are used.

    Raises:
        ModelError: any difference.
    """
    installed = runtimes.available()
    names = [n for n in installed if n != "tensorflow"] or list(installed)
    not_run = {name: "not installed" for name in runtimes.known() if name not in installed}
    tensors: list[Array] = []
    for name in names:
        before, after = TfliteModel(bare, runtime=name), TfliteModel(guarded, runtime=name)
        if not tensors:
            rng = np.random.default_rng(seed)
            tensors = [after.quantise(x) for x in inputs[:CALIBRATION_INPUTS]]
            tensors += [_random(rng, (1, *after.input_shape), after.input_dtype) for _ in range(random_inputs)]
        for tensor in tensors:
            _compare(name, before.invoke(tensor), after.invoke(tensor), compiled)
    if "tensorflow" in installed and "tensorflow" not in names:
        not_run["tensorflow"] = "a device runtime is there"
    some = [*tensors[: MICRO_INPUTS // 2], *tensors[-MICRO_INPUTS // 2 :]]
    reason = _verify_micro(bare, guarded, compiled, some)
    if reason is None:
        names.append(micro.NAME)
    else:
        not_run[micro.NAME] = reason
    return Verified(tuple(names), min(len(tensors), len(some) if reason is None else len(tensors)), not_run)


def _verify_micro(bare: bytes, guarded: bytes, compiled: Compiled, tensors: Sequence[Array]) -> str | None:
    """None where TFLite Micro runs the guarded file as the bare one; why it was not used, where it cannot."""
    if not micro.available():
        return "not installed"
    own = len(TfliteModel(bare).outputs)
    try:
        before = micro.run(bare, tensors, own)
    except ModelError as error:
        return f"does not run the model itself: {error.got}"
    after = micro.run(guarded, tensors, own + 2)
    for one, other in zip(before, after, strict=True):
        _compare(micro.NAME, one, other, compiled)
    return None


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, size=shape, dtype=dtype, endpoint=True)
    # Pixels, and numbers of either sign and of any size that a model may meet.
    if rng.random() < 0.5:
        return rng.uniform(0.0, 255.0, size=shape).astype(dtype)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-3.0, 2.0)).astype(dtype)


def _compare(name: str, before: Sequence[Array], after: Sequence[Array], compiled: Compiled) -> None:
    _same_outputs(name, before, after)
    _same_scores(name, after, compiled)


def _same_outputs(name: str, before: Sequence[Array], after: Sequence[Array]) -> None:
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


def _same_scores(name: str, outputs: Sequence[Array], compiled: Compiled) -> None:
    features = outputs[-1].astype(np.float64)
    expected = raw_scores(compiled.statistics, features) / np.asarray(compiled.thresholds)
    if not np.all(np.abs(outputs[-2] - expected) <= ABSOLUTE + RELATIVE * expected):
        raise ModelError(
            "guarded model",
            got=f"scores {outputs[-2][0]} in the graph on {name}",
            expected=f"{expected[0]}, as NumPy computes them",
            do="report this model; nothing was written",
        )
